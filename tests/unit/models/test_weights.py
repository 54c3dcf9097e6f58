"""Files of weights that are not complete, and adapters of other models: found before an engine is
started.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from services.contracts import ContextSpec
from services.contracts.errors import ModelError
from services.models.files import pin_model
from tests.safetensors_files import write_safetensors

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 2471645608\n"
FETCH_AGAIN = r"\. Fetch the file again \(`git lfs pull` in a clone\), or give the name on the hub"
HIDDEN, OUT, LAYERS = 576, 192, 2


@pytest.fixture
def weights(model_dir: Path) -> Path:
    path = model_dir / "model.safetensors"
    shapes = {
        f"model.layers.{layer}.self_attn.{name}.weight": (out, HIDDEN)
        for layer in range(LAYERS)
        for name, out in (("q_proj", HIDDEN), ("k_proj", OUT))
    }
    write_safetensors(path, {"model.embed_tokens.weight": (8, HIDDEN)} | shapes)
    return path


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def with_header(header: bytes, length: int | None = None) -> Callable[[Path], object]:
    content = (len(header) if length is None else length).to_bytes(8, "little") + header
    return lambda path: path.write_bytes(content)


def test_complete_weights_are_accepted(weights: Path) -> None:
    assert pin_model(ContextSpec(model=str(weights.parent))).revision


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.write_bytes(POINTER), "is a Git LFS pointer, and not the file itself"),
        (cut, r"is incomplete: it has \d+ bytes, and its header describes \d+"),
        (lengthen, r"is damaged: it has \d+ bytes, and its header describes \d+"),
        (lambda path: path.write_bytes(b""), "has 0 bytes, and its first eight announce"),
        (lambda path: path.write_bytes(b"\xff" * 4096), "incomplete, or not in the safetensors"),
        (with_header(b"\xff" * 64), "not in the safetensors format: its header cannot be read"),
        (with_header(b"[]"), "its header cannot be read"),
        (with_header(b"[" * 100_000), "its header cannot be read"),
        (with_header(b'{"w": {"dtype": "F32"}}'), "its header cannot be read"),
    ],
)
def test_weights_that_are_not_complete_are_reported_with_the_next_step(
    spoil: Callable[[Path], object], says: str, weights: Path
) -> None:
    spoil(weights)
    with pytest.raises(ModelError, match=f"{weights} .*{says}.*{FETCH_AGAIN}"):
        pin_model(ContextSpec(model=str(weights.parent)))


def test_a_header_over_the_formats_limit_is_not_read(weights: Path) -> None:
    with_header(b"{}", 100_000_001)(weights)
    with weights.open("r+b") as file:
        file.truncate(200_000_000)
    with pytest.raises(ModelError, match="its header cannot be read"):
        pin_model(ContextSpec(model=str(weights.parent)))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "is not JSON: Expecting property name"),
        (b"\xff", "is not JSON: "),
        (b"[]", "is not a JSON object"),
        (POINTER, "is a Git LFS pointer"),
    ],
)
def test_a_configuration_that_is_not_a_json_object_is_reported(
    content: bytes, says: str, model_dir: Path
) -> None:
    (model_dir / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=rf"config\.json {says}.*{FETCH_AGAIN}"):
        pin_model(ContextSpec(model=str(model_dir)))


def test_each_file_that_the_index_of_weights_names_must_be_there(weights: Path) -> None:
    parts = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = weights.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"a": parts[0], "b": parts[1], "c": parts[1]}}))
    weights.rename(weights.with_name(parts[0]))
    spec = ContextSpec(model=str(weights.parent))
    with pytest.raises(
        ModelError, match=f"has 1 of the 2 files .*; {parts[1]} is absent{FETCH_AGAIN}"
    ):
        pin_model(spec)
    write_safetensors(weights.with_name(parts[1]), {"b": (4,)})
    weights.write_bytes(POINTER)  # the index does not name it, and vLLM does not read it
    assert pin_model(spec)
    index.write_text('{"weight_map": []}')
    with pytest.raises(ModelError, match="has no map of weights to files"):
        pin_model(spec)


# Adapters.


Shapes = dict[str, tuple[int, ...]]


def lora(module: str, rows: int, columns: int, rank: int = 8) -> Shapes:
    name = f"base_model.model.{module}.lora_"
    return {f"{name}A.weight": (rank, columns), f"{name}B.weight": (rows, rank)}


def attention(layer: int, prefix: str = "model.layers") -> Shapes:
    module = f"{prefix}.{layer}.self_attn"
    return lora(f"{module}.q_proj", HIDDEN, HIDDEN) | lora(f"{module}.k_proj", OUT, HIDDEN)


def pinned(weights: Path, shapes: Shapes | None) -> ContextSpec:
    adapter = weights.parent.parent / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 8}')
    if shapes is not None:
        write_safetensors(adapter / "adapter_model.safetensors", shapes)
    return pin_model(ContextSpec(model=str(weights.parent), adapter=str(adapter)))


@pytest.mark.parametrize(
    "shapes",
    [
        attention(0) | attention(1),
        attention(0, "model.language_model.layers"),  # another prefix for the same layers
        lora("lm_head", 8, HIDDEN),  # its weights may be those of the embedding
        {"base_model.model.model.embed_tokens.lora_embedding_A": (8, 8)},
        lora("model.layers.0.mlp.experts", 1, 2),
        attention(0) | lora("model.layers.0.self_attn.qkv_proj", 1, 2),  # one that vLLM splits
    ],
)
def test_an_adapter_that_fits_its_model_is_accepted(shapes: Shapes, weights: Path) -> None:
    assert pinned(weights, shapes).adapter_revision


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (None, r"has no weights: adapter_model\.safetensors is absent\. Save it again"),
        ({}, "no tensor of a LoRA adapter, so that all answers would be the model's own"),
        (
            lora("transformer.h.0.attn.c_attn", 3 * HIDDEN, HIDDEN),
            r"the model has no module for base_model\.model\.transformer\.h\.0\.attn\.c_attn\. If",
        ),
        (attention(1) | attention(LAYERS), r"has no module for .*\.layers\.2\.self_attn\.q_proj"),
        (
            attention(0) | lora("model.layers.1.self_attn.q_proj", HIDDEN, 500),
            r"1\.self_attn\.q_proj has lora_A of 8x500 and lora_B of 576x8 for 576x576 weights",
        ),
        (
            lora("model.layers.1.self_attn.k_proj", HIDDEN, HIDDEN),
            "lora_A of 8x576 and lora_B of 576x8 for 192x576 weights",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_its_model_is_refused(
    shapes: Shapes | None, says: str, weights: Path
) -> None:
    with pytest.raises(ModelError, match=says):
        pinned(weights, shapes)


def test_a_truncated_adapter_is_refused(weights: Path) -> None:
    spec = pinned(weights, attention(0))
    cut(Path(spec.adapter or "", "adapter_model.safetensors"))
    with pytest.raises(
        ModelError, match=rf"adapter_model\.safetensors is incomplete.*{FETCH_AGAIN}"
    ):
        pin_model(spec.model_copy(update={"adapter_revision": None}))


def test_weights_that_may_be_packed_or_transposed_are_not_taken_for_a_misfit(
    weights: Path,
) -> None:
    quantized = {"model.layers.0.self_attn.q_proj.weight": (HIDDEN * HIDDEN // 2, 1)}
    write_safetensors(weights, quantized, dtype="U8")
    assert pinned(weights, lora("model.layers.0.self_attn.q_proj", HIDDEN, HIDDEN))
    write_safetensors(weights, {"h.0.attn.c_attn.weight": (HIDDEN, 3 * HIDDEN)})
    adapter = weights.parent.parent / "adapter"
    shapes = lora("transformer.h.0.attn.c_attn", 3 * HIDDEN, HIDDEN)
    write_safetensors(adapter / "adapter_model.safetensors", shapes)
    assert pin_model(ContextSpec(model=str(weights.parent), adapter=str(adapter)))


def test_an_adapter_in_another_format_is_left_to_the_engine(weights: Path) -> None:
    adapter = weights.parent.parent / "adapter"
    spec = pinned(weights, attention(0))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert pin_model(spec.model_copy(update={"adapter_revision": None}))
