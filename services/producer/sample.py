"""`--limit`: the first lines, or a seeded sample in the file's order, in constant memory."""

import random
from collections.abc import Iterator

from services.producer.source import Line


def chosen(
    lines: Iterator[Line], total: int, limit: int | None, seed: int | None
) -> Iterator[Line]:
    """`limit` of `total` lines: the first ones, or with a `seed` a uniform sample without
    replacement (selection sampling: Knuth, The Art of Computer Programming 2, 3.4.2, algorithm S).
    """
    wanted = total if limit is None else min(limit, total)
    draw = random.Random(seed) if seed is not None else None
    for line in lines:
        if wanted == 0:
            return
        left = total - line.position
        if draw is None or draw.random() * left < wanted:
            wanted -= 1
            yield line
