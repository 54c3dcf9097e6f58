"""The `keepwarm` command as the next version may be: it reads messages of one version more, and
each that it sends has a field that this version does not know.

NEWER_NEEDS=1: a reader of its messages about claims has to be of that version, too.
"""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType

REPOSITORY = Path(__file__).resolve().parents[2]
WIRE = "services.contracts.wire"
FILE = str(REPOSITORY / "services" / "contracts" / "wire.py")
CHANGES = {
    "PROOFS_VERSION = 2\n": f"PROOFS_VERSION = {4 if os.environ.get('NEWER_NEEDS') else 2}\n",
    "\nVERSION = REASONING_VERSION\n": "\nVERSION = 4\n",
    "le=VERSION)] = 1\n": 'le=VERSION)] = 1\n    hue: str = "blue"\n',
}


class NewerLoader(SourceFileLoader):
    def get_code(self, name: str) -> CodeType:
        source = Path(FILE).read_text(encoding="utf-8")
        for now, then in CHANGES.items():
            assert source.count(now) == 1, now
            source = source.replace(now, then)
        return compile(source, FILE, "exec")


class NewerFinder:
    @staticmethod
    def find_spec(name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != WIRE:
            return None
        return importlib.util.spec_from_file_location(name, FILE, loader=NewerLoader(name, FILE))


sys.path.insert(0, str(REPOSITORY))
sys.meta_path.insert(0, NewerFinder)  # type: ignore[arg-type]

from services.cli.main import main  # noqa: E402

main()
