"""Whether a model answers with label words at all."""

from collections import Counter
from collections.abc import Collection
from statistics import median

LOW_MASS = 0.1
"""Where half of the claims have less mass than this, the model does not answer with label words.

Prompts that it answers have a median of 0.3 and more, even with a model of 135 million parameters;
templates that open a thought, or words that no model says, 0.04 and less.
"""


def find_low_mass(answers: Collection[tuple[float, str]]) -> tuple[float, str] | None:
    """The median mass of these answers (mass, raw text), and the text that is the most frequent,
    where the label words hold less than `LOW_MASS`; None where they hold more. One answer at least.
    """
    middle = median(mass for mass, _ in answers)
    if middle >= LOW_MASS:
        return None
    text, _ = Counter(text for _, text in answers).most_common(1)[0]
    return middle, text
