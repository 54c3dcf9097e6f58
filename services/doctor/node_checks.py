"""Checks of `keepwarm doctor` on a node: the machine, and what engines need."""

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
from services.doctor.findings import (
    GIB,
    RECOMMENDED_FREE_BYTES,
    Finding,
    ok,
    warning,
)
from services.node.file_systems import network_file_system

_RECOMMENDED_FILES, _MIN_FILES = 4_096, 256
# A CPU engine has hundreds of threads, and the limit counts all threads of the user.
_RECOMMENDED_THREADS = 4_096
_IMPORT_SECONDS = 300
_EXTRAS = {
    "producer": ("tokenizers", "jinja2", "huggingface_hub", "pyarrow"),
    "gpu-worker": ("tokenizers", "jinja2", "huggingface_hub", "pynvml"),
    "collector": ("sqlalchemy", "psycopg", "pyarrow"),
}
_ENGINE_VERSIONS = f"""
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
# adjtimex(2): the clock is not synchronised.
_TIME_ERROR = 5


def python(_: Settings) -> Finding:
    return ok(f"Python {platform.python_version()} on {platform.platform()}")


def packages(_: Settings) -> Finding:
    """Raises UsageError when no service has all its packages."""
    try:
        installed = version("keepwarm")
    except PackageNotFoundError:
        installed = "from a checkout"
    missing = {
        extra: [module for module in modules if find_spec(module) is None]
        for extra, modules in _EXTRAS.items()
    }
    complete = [extra for extra, modules in missing.items() if not modules]
    incomplete = "; ".join(
        f"{extra} needs {', '.join(modules)}" for extra, modules in missing.items() if modules
    )
    if not complete:
        raise UsageError(f"no service can run: {incomplete}. Run `make setup`")
    message = f"Keepwarm {installed}, ready for: {', '.join(complete)}"
    if incomplete:
        return warning(f"{message}; not for: {incomplete}. Install them only where they are used")
    return ok(message)


def device(_: Settings) -> Finding:
    """Raises EngineStartError when the environment names a GPU that does not exist."""
    from services.node.device import find_device

    device = find_device()
    memory = f"{device.memory_bytes / GIB:.1f} GiB free"
    if device.kind == "cuda":
        return ok(f"{device.name}, {memory}, driver {_driver()}")
    return warning(
        f"no GPU, engines use the CPU: {device.name}, {len(device.cores)} cores, {memory}. If this "
        "node has a GPU, check that `nvidia-smi` lists it and that CUDA_VISIBLE_DEVICES does not "
        "hide it"
    )


def _driver() -> str:
    import pynvml

    from services.node.device import nvml

    with nvml():
        return str(pynvml.nvmlSystemGetDriverVersion())


def engine(settings: Settings) -> Finding:
    """Raises EngineStartError when the engine's interpreter cannot import vLLM, or when the GPU's
    driver is too old for it.
    """
    from services.contexts.keeper_client import environment_without_passwords
    from services.node.device import find_device

    python = settings.engine_python
    try:
        done = subprocess.run(
            [str(python), "-c", _ENGINE_VERSIONS],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=_IMPORT_SECONDS,
            stdin=subprocess.DEVNULL,
            env=environment_without_passwords(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineStartError(
            f"{python} cannot import vLLM: {error}; name another interpreter with "
            "KEEPWARM_ENGINE_PYTHON"
        ) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EngineStartError(
            f"{python} cannot import vLLM: {last}. Run `make setup`, or name an interpreter that "
            "has it with KEEPWARM_ENGINE_PYTHON"
        )
    found = json.loads(done.stdout.splitlines()[-1])
    cuda = found["cuda"]
    message = f"vLLM {found['vllm']} in {python}, built for {f'CUDA {cuda}' if cuda else 'CPUs'}"
    if (find_device().kind == "cuda") != bool(cuda):
        return warning(
            f"{message}, which does not match this node; run `make setup ENGINE=cpu` or "
            "`make setup ENGINE=cuda`"
        )
    supported = _driver_cuda() if cuda else None
    if supported is None:
        return ok(message)
    return _compare_cuda(message, _version(cuda), supported)


def _compare_cuda(message: str, built_for: tuple[int, ...], supported: tuple[int, ...]) -> Finding:
    """Raises EngineStartError when the driver is too old for this engine."""
    message = f"{message}; the driver supports CUDA {'.'.join(map(str, supported))}"
    # Within a major version an older driver runs code that was built for a newer minor version,
    # except code that is compiled at run time:
    # https://docs.nvidia.com/deploy/cuda-compatibility/
    if supported[:1] < built_for[:1]:
        raise EngineStartError(
            f"{message}, which is too old for this engine; ask the administrator for a newer one"
        )
    if supported < built_for:
        return warning(
            f"{message}, which is older than the engine's; install a newer driver if engines fail"
        )
    return ok(message)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _driver_cuda() -> tuple[int, ...] | None:
    """The newest CUDA version that the driver supports; None when it does not report one."""
    import pynvml

    from services.node.device import nvml

    try:
        with nvml():
            number = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
    except pynvml.NVMLError:
        return None
    return number // 1000, number % 1000 // 10


def runtime_dir(settings: Settings) -> Finding:
    """Raises UsageError when another user owns the directory, its path is too long, or other nodes
    share it.
    """
    from services.node.runtime_dir import open_runtime_dir, socket_path

    directory = open_runtime_dir(settings.runtime_dir)
    # An engine's name is a context's id and a digest.
    longest = socket_path(directory, f"ctx-{16 * 'f'}-{8 * 'f'}")
    kind = network_file_system(directory)
    if kind:
        raise UsageError(
            f"KEEPWARM_RUNTIME_DIR: {directory} is on {kind}, but its sockets and locks belong to "
            "one node; name a directory on a local disk"
        )
    return ok(f"{directory}, private; the longest socket path has {len(str(longest))} bytes")


def caches(settings: Settings) -> Finding:
    """Raises UsageError when another user owns the directory."""
    from services.node.runtime_dir import open_private_dir

    directory = open_private_dir(settings.cache_dir, "KEEPWARM_CACHE_DIR")
    free = shutil.disk_usage(directory).free
    message = f"{directory}, {free / GIB:.1f} GiB free"
    kind = network_file_system(directory)
    if kind:
        return warning(f"{message}, on {kind}; a directory on a local disk is faster")
    if free < RECOMMENDED_FREE_BYTES:
        return warning(
            f"{message}; free some space, or name another directory with KEEPWARM_CACHE_DIR"
        )
    return ok(message)


def keeper(settings: Settings) -> Finding:
    from services.contexts.keeper_client import connect, engines
    from services.node.runtime_dir import open_runtime_dir

    directory = open_runtime_dir(settings.runtime_dir)
    channel = connect(directory)
    if channel is None:
        return ok("not running; a worker starts it")
    channel.close()
    return ok(f"running; engines: {len(engines(directory))}")


def limits(_: Settings) -> Finding:
    """Raises UsageError when no service could work."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    threads, _most = resource.getrlimit(resource.RLIMIT_NPROC)
    space, _most = resource.getrlimit(resource.RLIMIT_AS)
    message = f"open files: {files:,} (at most {most:,})"
    if files < _MIN_FILES:
        raise UsageError(
            f"{message}, too few for a service; run `ulimit -n {_RECOMMENDED_FILES}` first"
        )
    message += f"; processes and threads: {_count(threads)}; address space: {_count(space)}"
    advice = []
    if files < _RECOMMENDED_FILES:
        advice.append(
            f"engines and brokers need {_RECOMMENDED_FILES:,} files: "
            f"`ulimit -n {_RECOMMENDED_FILES}`"
        )
    if threads != resource.RLIM_INFINITY and threads < _RECOMMENDED_THREADS:
        advice.append(
            f"engines need {_RECOMMENDED_THREADS:,} threads: `ulimit -u {_RECOMMENDED_THREADS}`"
        )
    if space != resource.RLIM_INFINITY:
        advice.append(
            "CUDA reserves more address space than there is memory: `ulimit -v unlimited`"
        )
    return warning("; ".join((message, *advice))) if advice else ok(message)


def _count(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"


def clock(_: Settings) -> Finding:
    # A buffer for a struct timex. Its first field, zero, means: read only.
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))
    if state == _TIME_ERROR:
        return warning(
            "not synchronised: times in results may be wrong, and a wrong date makes TLS fail; "
            "install chrony, or ask the administrator"
        )
    return ok("synchronised")
