"""The files of weights in a directory, by their headers: whether they are complete, and whether an
adapter fits its model. An engine needs many seconds to find out, or never does.

The format: https://huggingface.co/docs/safetensors/index#format.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.contracts.errors import ModelError

_INDEX = "model.safetensors.index.json"
_LFS_POINTER = b"version https://git-lfs.github.com/spec"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_NEXT_STEP = (
    "Fetch the file again (`git lfs pull` in a clone), or give the name on the hub instead of a "
    "directory"
)
_ADAPTER = "adapter_model.safetensors"
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
# A module's path from its numbered layer on: what is before differs between files of one model.
_IN_LAYER = re.compile(r"(?:^|\.)(?P<path>[^.]+\.\d+(?:\..+)?)$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
# Weights of these types have their module's shape; those of quantized models are often packed.
_UNPACKED = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

_Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as the header of its file describes it."""

    dtype: str
    shape: _Shape


def check_model(directory: Path) -> None:
    """Raises ModelError for a configuration or weights that are not complete, and OSError. Weights
    may be absent, because engines accept other formats too.
    """
    _json_object(directory / "config.json")
    for path in _weights(directory):
        tensors(path)


def check_adapter(adapter: Path, model: Path | None) -> None:
    """Raises ModelError for a LoRA adapter whose weights are absent or incomplete, or do not fit
    the model in the directory `model` (not compared if that is None), and OSError. An engine
    ignores tensors whose names are not the model's, and computes with some of a wrong shape.
    """
    path = adapter / _ADAPTER
    if not path.is_file():
        if any((adapter / f"adapter_model.{suffix}").is_file() for suffix in ("bin", "pt")):
            return
        raise ModelError(
            f"the adapter {adapter} has no weights: {_ADAPTER} is absent. Save it again with "
            "PEFT's save_pretrained, or fetch it again"
        )
    found = tensors(path)
    if not any(".lora_" in name for name in found):
        raise ModelError(
            f"{path} has no tensor of a LoRA adapter, so that all answers would be the model's "
            "own. Save it again with PEFT's save_pretrained"
        )
    mismatch = model and _mismatch(_lora_shapes(found), _module_shapes(model))
    if mismatch:
        raise ModelError(
            f"the adapter {adapter} does not fit the model {model}: {mismatch}. If it was trained "
            "for another model (base_model_name_or_path in its adapter_config.json), give that "
            "one with --model; otherwise give another --adapter"
        )


def _mismatch(
    adapter: dict[str, dict[str, _Shape]], model: dict[str, list[_Shape | None]]
) -> str | None:
    """What does not fit; None if everything does, or nothing can be compared."""
    layers = {path: module for module in adapter if (path := _path_in_layer(module))}
    kinds = {_NUMBER.sub("N", path) for path in model}
    unknown = [path for path in layers if path not in model]
    # Names may differ where an engine maps them, but then those of the other layers differ too.
    if model and unknown:
        some = next((path for path in unknown if _NUMBER.sub("N", path) in kinds), None)
        if some or len(unknown) == len(layers):
            return f"the model has no module for {layers[some or unknown[0]]}"
    for path, module in layers.items():
        a, b = (adapter[module].get(part, ()) for part in "AB")
        weights = model.get(path, [None])
        if len(a) != 2 or len(b) != 2 or None in weights:
            continue
        # Modules of GPT-2 have their weights transposed.
        if a[0] != b[1] or (b[0], a[1]) not in {
            shape for weight in weights if weight for shape in (weight, weight[::-1])
        }:
            sizes = " or ".join(_size(weight) for weight in weights if weight)
            return f"{module} has lora_A of {_size(a)} and lora_B of {_size(b)} for {sizes} weights"
    return None


def _lora_shapes(found: dict[str, Tensor]) -> dict[str, dict[str, _Shape]]:
    """The shapes of A and B for each module. Those of experts are left out, because engines and
    files differ in how they name them.
    """
    shapes: dict[str, dict[str, _Shape]] = {}
    for name, tensor in found.items():
        match = _LORA.fullmatch(name)
        if match and ".experts" not in name:
            shapes.setdefault(match["module"], {})[match["part"]] = tensor.shape
    return shapes


def _module_shapes(model: Path) -> dict[str, list[_Shape | None]]:
    """The shapes of the weights of all modules with this path in a layer, such as those of text
    and images; None for a shape that is unknown.
    """
    modules: dict[str, _Shape | None] = {}
    for file in _weights(model):
        for name, tensor in tensors(file).items():
            module, _, part = name.rpartition(".")
            if part == "weight" and tensor.dtype in _UNPACKED and len(tensor.shape) == 2:
                modules[module] = tensor.shape
            else:
                modules.setdefault(module, None)
    found: dict[str, list[_Shape | None]] = {}
    for module, shape in modules.items():
        path = _path_in_layer(module)
        if path:
            found.setdefault(path, []).append(shape)
    return found


def _path_in_layer(module: str) -> str | None:
    match = _IN_LAYER.search(module)
    return match["path"] if match else None


def _size(shape: _Shape) -> str:
    return "x".join(map(str, shape))


def tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name. Raises ModelError if it is not complete, and
    OSError.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        _refuse_pointer(path, file.read(len(_LFS_POINTER)))
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ModelError(
                f"{path} is incomplete, or not in the safetensors format: it has {size} bytes, and "
                f"its first eight announce a header of {length}. {_NEXT_STEP}"
            )
        content = file.read(length) if length <= _MAX_HEADER_BYTES else b""
    try:
        header: dict[str, Any] = json.loads(content)
        header.pop("__metadata__", None)
        found = {
            name: Tensor(str(each["dtype"]), tuple(map(int, each["shape"])))
            for name, each in header.items()
        }
        end = max((int(each["data_offsets"][1]) for each in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ModelError(
            f"{path} is not in the safetensors format: its header cannot be read. {_NEXT_STEP}"
        ) from error
    if size != 8 + length + end:
        raise ModelError(
            f"{path} is {'incomplete' if size < 8 + length + end else 'damaged'}: it has {size} "
            f"bytes, and its header describes {8 + length + end}. {_NEXT_STEP}"
        )
    return found


def _weights(directory: Path) -> list[Path]:
    """The safetensors files that vLLM 0.32 reads. Raises ModelError if the index names others."""
    found = sorted(directory.glob("*.safetensors"))
    index = directory / _INDEX
    if not index.is_file():
        return found
    try:
        parts = {directory / name for name in _json_object(index)["weight_map"].values()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} has no map of weights to files. {_NEXT_STEP}") from error
    absent = sorted(path.name for path in parts if not path.is_file())
    if absent:
        raise ModelError(
            f"{directory} has {len(parts) - len(absent)} of the {len(parts)} files of weights that "
            f"{_INDEX} names; {absent[0]} is absent. {_NEXT_STEP}"
        )
    return [path for path in found if path in parts or path.name.startswith("consolidated")]


def _json_object(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    _refuse_pointer(path, content)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}. {_NEXT_STEP}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} is not a JSON object. {_NEXT_STEP}")
    return found


def _refuse_pointer(path: Path, content: bytes) -> None:
    if content.startswith(_LFS_POINTER):
        raise ModelError(f"{path} is a Git LFS pointer, and not the file itself. {_NEXT_STEP}")
