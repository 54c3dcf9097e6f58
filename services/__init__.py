"""The way of a claim: producer -> broker -> gpu_worker -> broker -> collector."""

import os

# Pydantic would look for plugins of others in every package of the environment, which takes a worker
# that starts longer than all of its own models, and longest on the file system of a cluster.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
