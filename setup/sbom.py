"""Write the software bill of materials of an image, as CycloneDX 1.5 JSON, to standard output.

    python3 sbom.py VENV

It names the packages of Debian and of Python that are installed, with their versions and package
URLs. Run by setup/image.sh in the image itself. Standard library alone.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from urllib.parse import quote

Component = dict[str, str]


def debian_packages() -> Iterator[Component]:
    """Those that dpkg has installed."""
    fields = "${db:Status-Status}\\t${Package}\\t${Version}\\t${Architecture}\\n"
    listed = subprocess.run(
        ["dpkg-query", "--show", f"--showformat={fields}"],
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    for line in listed.splitlines():
        status, name, version, architecture = line.split("\t")
        if status == "installed":
            url = f"pkg:deb/debian/{quote(name)}@{quote(version)}?arch={architecture}"
            yield _component(name, version, url)


def python_packages(venv: Path) -> Iterator[Component]:
    """Those of a virtual environment."""
    places = [str(place) for place in venv.glob("lib/python3*/site-packages")]
    for each in distributions(path=places):
        name = re.sub(r"[-_.]+", "-", each.metadata["Name"]).lower()
        yield _component(name, each.version, f"pkg:pypi/{quote(name)}@{quote(each.version)}")


def _component(name: str, version: str, url: str) -> Component:
    return {"type": "library", "bom-ref": url, "name": name, "version": version, "purl": url}


def main() -> None:
    components = [*debian_packages(), *python_packages(Path(sys.argv[1]))]
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "components": sorted(components, key=lambda each: each["purl"]),
    }
    json.dump(bill, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
