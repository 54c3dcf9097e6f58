"""Safetensors files with zeros for weights."""

import json
import math
from collections.abc import Mapping
from pathlib import Path


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F32") -> int:
    """Write tensors of these shapes, four bytes a number; returns the size of the file."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
    content = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
    return 8 + len(content) + end
