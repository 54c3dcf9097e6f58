import inspect
import re

import pytest

from services.contracts import errors
from services.contracts.errors import KeepwarmError

ENTRY = re.compile(r"^(?P<branches>[│├└─ ]*)(?P<name>[A-Z]\w+)(?: \((?P<code>\d+)\))?(?: |$)")


def drawn_tree() -> dict[str, tuple[str | None, int]]:
    """Name -> parent and exit code, as the module's docstring draws them."""
    tree: dict[str, tuple[str | None, int]] = {}
    path: list[tuple[int, str]] = []
    for line in inspect.getdoc(errors).splitlines()[1:]:
        entry = ENTRY.match(line)
        if entry is None or not (entry["branches"] or entry["code"]):
            continue
        depth, name = len(entry["branches"]), entry["name"]
        path = [step for step in path if step[0] < depth]
        parent = path[-1][1] if path else None
        code = int(entry["code"]) if entry["code"] else tree[parent][1]
        tree[name] = (parent, code)
        path.append((depth, name))
    return tree


def defined_errors() -> dict[str, type[KeepwarmError]]:
    return {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, KeepwarmError)
    }


def test_the_drawn_tree_is_the_whole_tree() -> None:
    assert drawn_tree().keys() == defined_errors().keys()


@pytest.mark.parametrize("name", sorted(defined_errors()))
def test_an_error_has_the_parent_and_the_exit_code_that_are_drawn(name: str) -> None:
    parent, code = drawn_tree()[name]
    kind = defined_errors()[name]
    assert kind.exit_code == code
    assert kind.__base__.__name__ == (parent or "Exception")
