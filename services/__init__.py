"""The way of a claim: producer -> broker -> gpu_worker -> broker -> collector."""

import os

# Pydantic would look for plugins of others in every package of the environment. A worker that
# starts has no time for that, least of all on the file system of a cluster.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
