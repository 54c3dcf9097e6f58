"""Makes text from outside safe for a terminal. Without rich, which workers do not import."""

import re

# Characters that control a terminal, or that reorder or hide text: control characters
# except tab and line feed, line separators, marks of direction, tags, halves of surrogate pairs.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """`text` with U+FFFD for each control character."""
    return _CONTROLS.sub("\ufffd", text)
