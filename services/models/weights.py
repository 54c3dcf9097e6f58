"""The files of weights in a directory, by their headers: whether they are complete, and whether an
adapter fits its model. An engine needs many seconds to find out, or never does.

The format: https://huggingface.co/docs/safetensors/index#format.
"""

import json
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


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as the header of its file describes it."""

    dtype: str
    shape: tuple[int, ...]


def check_model(directory: Path) -> None:
    """Raises ModelError for a configuration or weights that are not complete, and OSError. Weights
    may be absent, because engines accept other formats too.
    """
    _json_object(directory / "config.json")
    for path in _weights(directory):
        tensors(path)


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
