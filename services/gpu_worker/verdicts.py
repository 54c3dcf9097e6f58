"""From an engine's scores to a verdict. Pure functions."""

import math

from services.contexts.completions import Answer
from services.contracts import INVALID, Claim, PromptSpec, Verdict
from services.contracts.bounds import MAX_RAW_TEXT_CHARS

_DIGITS = 6


def read_verdict(claim: Claim, answer: Answer, prompt: PromptSpec, prompt_tokens: int) -> Verdict:
    """The verdict on `claim`: the likeliest label, unless the labels were hardly likely at all.

    `probabilities` are the softmax over the label tokens' log probabilities; `mass` is the sum of
    their probabilities over the whole vocabulary. INVALID when a label has no score, or when the
    mass is under the prompt's `minimum_mass`.
    """
    scores = [score for score in answer.logprobs if score is not None]
    label, mass = INVALID, 0.0
    probabilities: tuple[float, ...] = ()
    if len(scores) == len(prompt.labels):
        highest = max(scores)
        weights = [math.exp(score - highest) for score in scores]
        total = sum(weights)
        probabilities = tuple(round(weight / total, _DIGITS) for weight in weights)
        mass = min(1.0, total * math.exp(min(highest, 0.0)))
        if mass >= prompt.minimum_mass:
            label = prompt.label_names[scores.index(highest)]
    return Verdict(
        claim_id=claim.claim_id,
        position=claim.position,
        text=claim.text,
        gold=claim.gold,
        label=label,
        probabilities=probabilities,
        mass=round(mass, _DIGITS),
        raw_text=answer.text.replace("\0", "")[:MAX_RAW_TEXT_CHARS],
        prompt_tokens=prompt_tokens,
    )
