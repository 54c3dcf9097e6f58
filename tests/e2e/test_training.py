"""What the training of an adapter computes, on a small random model."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from training.shared_prefixes import log_probabilities  # noqa: E402

GROUPS = [
    [(1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 7, 8, 9), (1, 2, 3, 4, 5)],
    [(1, 2, 9, 9, 9, 9, 9, 4), (1, 2, 9, 9, 3)],
    [(1, 2, 30)],
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def alone(model, prompt):
    return torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1], -1)


def test_what_prompts_share_is_computed_once_and_changes_nothing(model) -> None:
    found = log_probabilities(model, GROUPS)
    expected = torch.stack([alone(model, prompt) for group in GROUPS for prompt in group])
    assert torch.allclose(found, expected, atol=1e-5)


def test_gradients_flow_through_what_is_shared(model) -> None:
    gradients = []
    for compute in (
        lambda: log_probabilities(model, GROUPS),
        lambda: torch.stack([alone(model, prompt) for group in GROUPS for prompt in group]),
    ):
        model.zero_grad()
        (-compute()[:, 5].mean()).backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    for shared, separate in zip(*gradients, strict=True):
        assert torch.allclose(shared, separate, atol=1e-5)


def test_prompts_without_a_token_in_common_are_refused(model) -> None:
    with pytest.raises(ValueError, match="give the prompt instructions"):
        log_probabilities(model, [[(1, 2)], [(2, 3)]])
