"""Detect a model that does not answer with label words."""

from collections import Counter
from collections.abc import Collection
from statistics import median

LOW_MASS = 0.1
"""If half of the claims have less mass than this, the model does not answer with label words.

Prompts that work have a median mass of at least 0.3, even with a model of 135 million parameters.
Chat templates that begin with reasoning, and label words that a model never uses, have at most
0.04.
"""


def find_low_mass(answers: Collection[tuple[float, str]]) -> tuple[float, str] | None:
    """The median mass and the most frequent text, if the median is less than `LOW_MASS`; else None.
    `answers` are pairs of mass and raw text, at least one.
    """
    middle = median(mass for mass, _ in answers)
    if middle >= LOW_MASS:
        return None
    text, _ = Counter(text for _, text in answers).most_common(1)[0]
    return middle, text
