"""The products of LoRA on processors, beside one row after another."""

import pytest

from services.contexts import cpu_lora

torch = pytest.importorskip("torch", reason="needs an engine's packages")


@pytest.mark.parametrize("adapters", [[1] * 7, [0, 2, 2, -1, 0, 1, -1], [-1] * 7])
@pytest.mark.parametrize("shape", [(3, 1, 8, 5), (3, 8, 5)])
def test_each_row_is_multiplied_by_its_own_adapter_or_by_none(
    adapters: list[int], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(1)
    inputs, weights, before = torch.randn(7, 5), torch.randn(shape), torch.randn(7, 12)
    indices = torch.tensor(adapters)
    products = torch.stack(
        [
            weights[index].reshape(8, 5) @ row if index >= 0 else torch.zeros(8)
            for index, row in zip(adapters, inputs, strict=True)
        ]
    )

    shrunk = before.clone()
    cpu_lora.bgmv_shrink(inputs, weights, shrunk, indices, 0.5)
    torch.testing.assert_close(shrunk[:, :8], 0.5 * products)
    assert shrunk[:, 8:].equal(before[:, 8:])

    expanded = before.clone()
    cpu_lora.bgmv_expand(inputs, weights, expanded, indices)
    torch.testing.assert_close(expanded[:, :8], before[:, :8] + products)
    assert expanded[:, 8:].equal(before[:, 8:])

    sliced = before.clone()
    cpu_lora.bgmv_expand_slice(inputs, weights, sliced, indices, 3, 8, False)
    torch.testing.assert_close(sliced[:, 3:11], products)
    assert sliced[:, :3].equal(before[:, :3]) and sliced[:, 11:].equal(before[:, 11:])


def test_a_padded_output_takes_the_columns_that_it_has() -> None:
    output = torch.zeros(2, 4)
    cpu_lora.bgmv_expand(torch.ones(2, 5), torch.ones(1, 8, 5), output, torch.tensor([0, 0]))
    assert output.equal(torch.full((2, 4), 5.0))


def test_vllm_calls_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    caller = pytest.importorskip(cpu_lora.CALLER, reason="needs vLLM")
    ops = pytest.importorskip(cpu_lora.OPS, reason="needs vLLM")
    for module in (caller, ops):
        for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice"):
            monkeypatch.setattr(module, name, getattr(module, name))  # set back afterwards
    cpu_lora.install()
    output = torch.zeros(2, 4)
    caller.sgmv_expand(  # one of its functions that call others
        *(torch.ones(2, 5), torch.ones(1, 1, 4, 5), output, torch.tensor([0]), torch.tensor([2])),
        *(torch.tensor([-1]), 1, 2, 2, True),
    )
    assert caller.bgmv_shrink is cpu_lora.bgmv_shrink
    assert output.equal(torch.zeros(2, 4))  # vLLM's own takes the last adapter for "none"
