"""The `keepwarm` command with other constants, where a test would wait for minutes otherwise:
TEST_WAITS="services.broker.link._REFUSED_SECONDS=5 …".
"""

import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

for change in os.environ["TEST_WAITS"].split():
    name, _, value = change.partition("=")
    module_name, _, constant = name.rpartition(".")
    module = importlib.import_module(module_name)
    setattr(module, constant, type(getattr(module, constant))(value))

from services.cli.main import main  # noqa: E402

main()
