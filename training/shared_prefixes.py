"""The next token after many prompts that begin alike: what they share is computed once.

Instructions and examples are the same in all prompts of a batch, and evidence in those of a group.
An engine with a prefix cache computes each once, and so does this, with gradients.
"""

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

Prompt = Sequence[int]


def log_probabilities(model: PreTrainedModel, groups: Sequence[Sequence[Prompt]]) -> torch.Tensor:
    """The log probability of every token after each prompt, prompts x vocabulary.

    `groups` are prompts that have much in common, such as the evidence. Raises ValueError if not
    even the first token is the same in all.
    """
    flat = [prompt for group in groups for prompt in group]
    # Each prompt needs a token of its own, of which the next is predicted.
    head = min(common(flat), min(map(len, flat)) - 1)
    if not head:
        raise ValueError("the prompts have no token in common; give the prompt instructions")
    stems = [group[0][head : min(common(group), min(map(len, group)) - 1)] for group in groups]
    owners = [index for index, group in enumerate(groups) for _ in group]
    starts = [head + len(stems[index]) for index in owners]
    tails = [prompt[start:] for prompt, start in zip(flat, starts, strict=True)]
    cache, seen = DynamicCache(), torch.ones(1, 0, dtype=torch.long)
    _, seen = extend(model, cache, seen, [flat[0][:head]], [0], [0])
    _, seen = extend(model, cache, seen, stems, [0] * len(stems), [head] * len(stems))
    states, _ = extend(model, cache, seen, tails, owners, starts)
    last = torch.tensor([len(tail) - 1 for tail in tails])
    return torch.log_softmax(model.lm_head(states[torch.arange(len(tails)), last]).float(), -1)


def extend(
    model: PreTrainedModel,
    cache: DynamicCache,
    seen: torch.Tensor,
    texts: Sequence[Sequence[int]],
    owners: Sequence[int],
    starts: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Continue the rows `owners` of a cache with a text each, which begins at a position each.

    `seen` tells which tokens of the cache are real, rows x tokens. Returns the last layer's states,
    texts x tokens x size, and `seen` with the texts.
    """
    width = max(map(len, texts))
    tokens = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts]).long()
    real = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts]).long()
    rows = torch.tensor(owners)
    cache.batch_select_indices(rows)
    seen = torch.cat([seen[rows], real], dim=1)
    if not width:
        return torch.empty(len(texts), 0), seen
    states = model.model(
        input_ids=tokens,
        attention_mask=seen,
        position_ids=torch.tensor(starts)[:, None] + torch.arange(width),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return states, seen


def common(prompts: Sequence[Prompt]) -> int:
    """How many tokens the prompts begin with in common."""
    first, last = min(prompts), max(prompts)
    return next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first)
    )
