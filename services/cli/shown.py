"""Text from outside, made harmless for a terminal. Without rich, which workers do not import."""

import re

# Characters that a terminal obeys, or that reorder or hide the text around them: control characters
# but for tab and line feed, line separators, marks of direction, tags, halves of surrogate pairs.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def shown(text: str) -> str:
    """`text` with U+FFFD for each character that a terminal would obey."""
    return _OBEYED.sub("\ufffd", text)
