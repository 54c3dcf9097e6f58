"""LoRA on processors, in the engine's own process: all rows of an adapter are multiplied at once.

vLLM's functions for processors (`vllm.lora.ops.torch_ops`) copy an adapter's matrices for every
row, that is for every token, in every layer; copying then takes nearly all of an engine's time. The
functions here have the same names and arguments, and give the same products.
"""

import importlib
from typing import Any

OPS = "vllm.lora.ops.torch_ops.lora_ops"
CALLER = "vllm.lora.punica_wrapper.punica_cpu"


def install() -> None:
    """Replace vLLM's functions, which it calls on processors only, in this process; nothing where
    this vLLM does not have them.
    """
    try:
        modules = [importlib.import_module(OPS), importlib.import_module(CALLER)]
    except ImportError:
        return
    for module in modules:
        for function in (bgmv_shrink, bgmv_expand, bgmv_expand_slice):
            if hasattr(module, function.__name__):
                setattr(module, function.__name__, function)


def bgmv_shrink(inputs: Any, weights: Any, output: Any, indices: Any, scaling: float = 1.0) -> None:
    """`output[row] = scaling * weights[indices[row]] @ inputs[row]`."""
    product = _multiply(inputs, weights, output, indices)
    output[:, : product.shape[1]] = scaling * product


def bgmv_expand(
    inputs: Any, weights: Any, output: Any, indices: Any, add_inputs: bool = True
) -> None:
    """`output[row] += weights[indices[row]] @ inputs[row]`; `=` without `add_inputs`."""
    width = min(output.shape[1], weights.shape[-2])  # either may be padded
    bgmv_expand_slice(inputs, weights, output, indices, 0, width, add_inputs)


def bgmv_expand_slice(
    inputs: Any,
    weights: Any,
    output: Any,
    indices: Any,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """The same for the columns of `output` from `slice_offset` on."""
    product = _multiply(inputs, weights, output, indices)[:, :slice_size]
    part = output[: len(product), slice_offset : slice_offset + slice_size]
    if add_inputs:
        part += product
    else:
        part[:] = product


def _multiply(inputs: Any, weights: Any, output: Any, indices: Any) -> Any:
    """The product for each row, rows x out, of the type of `output`.

    `inputs` is rows x in, `weights` adapters (x 1) x out x in, and `indices` each row's adapter, or
    less than zero.
    """
    inputs = inputs.to(output.dtype)
    product = inputs.new_zeros(len(inputs), weights.shape[-2])
    for adapter in indices.unique().tolist():
        if adapter >= 0:
            rows = indices == adapter
            matrix = weights[adapter].reshape(weights.shape[-2:]).to(output.dtype)
            product[rows] = inputs[rows] @ matrix.T
    return product
