"""What `keepwarm doctor` looks at on a node: the machine, and what engines need of it."""

import ctypes
import json
import platform
import resource
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import keepwarm_start
from services.contracts import Settings
from services.contracts.errors import EngineStartError, UsageError
from services.doctor.findings import GIB, ROOM_BYTES, Finding, note, shared_file_system, well

_FILES, _FEW_FILES = 4_096, 256
# An engine on processors has some hundreds of threads, and all that a user has running count.
_THREADS = 4_096
_IMPORT_SECONDS = 300
_EXTRAS = {
    "producer": ("tokenizers", "jinja2", "huggingface_hub", "pyarrow"),
    "gpu-worker": ("tokenizers", "jinja2", "huggingface_hub", "pynvml"),
    "collector": ("sqlalchemy", "psycopg", "sklearn", "scipy", "pyarrow"),
}
_ASK_ENGINE = f"""
import sys
sys.path.append({str(Path(keepwarm_start.__file__).parent)!r})
import keepwarm_start
keepwarm_start.isolate()
import json, vllm
try:
    from torch.version import cuda
except ImportError:
    cuda = None
print(json.dumps({{"vllm": getattr(vllm, "__version__", "unknown"), "cuda": cuda}}))
"""
# adjtimex(2): the kernel's clock is not held by any other.
_TIME_ERROR = 5


def python(_: Settings) -> Finding:
    return well(f"Python {platform.python_version()} on {platform.platform()}")


def packages(_: Settings) -> Finding:
    """Raises UsageError where no service's packages are complete."""
    try:
        ours = version("keepwarm")
    except PackageNotFoundError:
        ours = "of a checkout"
    missing = {
        extra: [module for module in modules if find_spec(module) is None]
        for extra, modules in _EXTRAS.items()
    }
    whole = [extra for extra, modules in missing.items() if not modules]
    lacking = "; ".join(
        f"{extra} lacks {', '.join(modules)}" for extra, modules in missing.items() if modules
    )
    if not whole:
        raise UsageError(f"no service can run: {lacking}. Run `make setup`")
    says = f"Keepwarm {ours}, ready for: {', '.join(whole)}"
    return note(f"{says}; {lacking}, which only matters on its node") if lacking else well(says)


def device(_: Settings) -> Finding:
    """Raises EngineStartError when the environment names a GPU that is not there."""
    from services.node.device import find_device

    device = find_device()
    memory = f"{device.memory_bytes / GIB:.1f} GiB free"
    if device.kind == "cuda":
        return well(f"{device.name}, {memory}, driver {_driver()}")
    return note(
        f"no GPU, so the processors: {device.name}, {len(device.cores)} cores, {memory}. Where "
        "there should be one, see whether `nvidia-smi` lists it and CUDA_VISIBLE_DEVICES does not "
        "hide it"
    )


def _driver() -> str:
    import pynvml

    from services.node.device import nvml

    with nvml():
        return str(pynvml.nvmlSystemGetDriverVersion())


def engine(settings: Settings) -> Finding:
    """Raises EngineStartError when its interpreter cannot import vLLM."""
    from services.contexts.start_keeper import without_secrets
    from services.node.device import find_device

    python = settings.engine_python
    try:
        done = subprocess.run(
            [str(python), "-c", _ASK_ENGINE],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=_IMPORT_SECONDS,
            stdin=subprocess.DEVNULL,
            env=without_secrets(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineStartError(
            f"{python} does not import vLLM: {error}; KEEPWARM_ENGINE_PYTHON names another"
        ) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EngineStartError(
            f"{python} does not import vLLM: {last}. Run `make setup`, or name an interpreter that "
            "has it with KEEPWARM_ENGINE_PYTHON"
        )
    found = json.loads(done.stdout.splitlines()[-1])
    cuda = found["cuda"]
    says = f"vLLM {found['vllm']} in {python}, built for {f'CUDA {cuda}' if cuda else 'processors'}"
    if (find_device().kind == "cuda") != bool(cuda):
        return note(
            f"{says}, which is not what this node has; `make setup ENGINE=cpu` or `ENGINE=cuda` "
            "installs the other"
        )
    knows = _driver_cuda() if cuda else None
    return well(says) if knows is None else _judged(says, _version(cuda), knows)


def _judged(says: str, wants: tuple[int, ...], knows: tuple[int, ...]) -> Finding:
    """Raises EngineStartError where the driver is too old for this engine."""
    says = f"{says}; the driver knows CUDA {'.'.join(map(str, knows))}"
    # Within a major version an older driver runs what was built for a newer minor one, but for code
    # that is compiled on the spot: https://docs.nvidia.com/deploy/cuda-compatibility/
    if knows[:1] < wants[:1]:
        raise EngineStartError(
            f"{says}, which is too old for this engine; ask the administrator for a newer one"
        )
    if knows < wants:
        return note(f"{says}, which is older; a newer driver is better where an engine fails")
    return well(says)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _driver_cuda() -> tuple[int, ...] | None:
    """The newest CUDA that the driver knows; None where it does not say."""
    import pynvml

    from services.node.device import nvml

    try:
        with nvml():
            told = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
    except pynvml.NVMLError:
        return None
    return told // 1000, told % 1000 // 10


def runtime_dir(settings: Settings) -> Finding:
    """Raises UsageError for a directory that is not ours, too long, or shared with other nodes."""
    from services.node.runtime_dir import open_runtime_dir, socket_path

    directory = open_runtime_dir(settings.runtime_dir)
    # As long as an engine's name: a context's and a digest.
    longest = socket_path(directory, f"ctx-{16 * 'f'}-{8 * 'f'}")
    kind = shared_file_system(directory)
    if kind:
        raise UsageError(
            f"KEEPWARM_RUNTIME_DIR: {directory} is on {kind}, and its sockets and locks belong to "
            "one node; name a directory on the node itself"
        )
    return well(f"{directory}, ours alone; its longest socket path has {len(str(longest))} bytes")


def caches(settings: Settings) -> Finding:
    """Raises UsageError for a directory that is not ours."""
    from services.node.runtime_dir import open_private_dir

    directory = open_private_dir(settings.cache_dir, "KEEPWARM_CACHE_DIR")
    free = shutil.disk_usage(directory).free
    says = f"{directory}, {free / GIB:.1f} GiB free"
    kind = shared_file_system(directory)
    if kind:
        return note(f"{says}, on {kind}; a directory on the node's own disk is faster")
    if free < ROOM_BYTES:
        return note(f"{says}; make room, or name another with KEEPWARM_CACHE_DIR")
    return well(says)


def keeper(settings: Settings) -> Finding:
    from services.contexts.records import live_records
    from services.contexts.start_keeper import connected
    from services.node.runtime_dir import open_runtime_dir

    directory = open_runtime_dir(settings.runtime_dir)
    line = connected(directory)
    if line is None:
        return well("none runs here; a worker starts it")
    line.close()
    return well(f"it answers; engines: {len(live_records(directory))}")


def limits(_: Settings) -> Finding:
    """Raises UsageError where nothing could work."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    threads, _most = resource.getrlimit(resource.RLIMIT_NPROC)
    space, _most = resource.getrlimit(resource.RLIMIT_AS)
    says = f"open files: {files:,} (at most {most:,})"
    if files < _FEW_FILES:
        raise UsageError(f"{says}, which is too few; run `ulimit -n {_FILES}` before the service")
    says += f"; processes and threads: {_count(threads)}; address space: {_count(space)}"
    wants = []
    if files < _FILES:
        wants.append(f"engines and brokers want {_FILES:,} files: `ulimit -n {_FILES}`")
    if threads != resource.RLIM_INFINITY and threads < _THREADS:
        wants.append(f"engines want {_THREADS:,} threads: `ulimit -u {_THREADS}`")
    if space != resource.RLIM_INFINITY:
        wants.append("CUDA reserves more addresses than there is memory: `ulimit -v unlimited`")
    return note("; ".join((says, *wants))) if wants else well(says)


def _count(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"


def clock(_: Settings) -> Finding:
    # Room for a struct timex, whose first field, all zero, asks and sets nothing.
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))
    if state == _TIME_ERROR:
        return note(
            "nothing keeps it right (install chrony, or ask the administrator); results stay "
            "right, their times of day may not be, and a wrong date fails TLS"
        )
    return well("kept right by another")
