"""How long until an engine answers: vLLM in one process, its server as it comes, and Keepwarm's.

    .venv/bin/python benchmarks/cold_start.py

The same model and arguments, taking turns in one run; each from the start of a process to the first
answer. vLLM in one process is at its best: like Keepwarm's engines it compiles nothing. "First" is
the first start on a node, with keeper and imports, "later" another one while the keeper lives.
Caches of vLLM are empty before each start. Prints seconds, and the ratio to vLLM in one process,
which has no server and is the least that a start can take.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from services.contexts.engine_client import EngineClient  # noqa: E402
from services.contexts.engine_command import (  # noqa: E402
    ENGINE_MODULE,
    engine_arguments,
    engine_environment,
)
from services.contexts.keeper_client import drain, evict  # noqa: E402
from services.contexts.lease import EngineLease  # noqa: E402
from services.contexts.plan import EnginePlan  # noqa: E402
from services.contracts import ContextSpec, Settings, load_settings  # noqa: E402
from services.models.files import pin_model  # noqa: E402
from services.node.device import find_device  # noqa: E402

MODEL = REPOSITORY / ".models" / "SmolLM2-135M-Instruct"
NEVER = threading.Event()
ONE_PROCESS = """
import sys
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], dtype="bfloat16", max_model_len=1024, max_num_seqs=64,
          max_num_batched_tokens=4096, enforce_eager=True, distributed_executor_backend="uni",
          generation_config="vllm")
llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(max_tokens=1), use_tqdm=False)
"""
console = Console(width=100)


def vllm_environment(plan: EnginePlan, directory: Path) -> dict[str, str]:
    cache = directory / "vllm-alone"
    shutil.rmtree(cache, ignore_errors=True)
    return {**os.environ, "VLLM_NO_USAGE_STATS": "1", **engine_environment(plan, cache)}


def one_process(plan: EnginePlan, directory: Path) -> float:
    environment = {
        **vllm_environment(plan, directory),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Keepwarm's engines do not compile vLLM's sampler either.
        "TORCHDYNAMO_DISABLE": "1",
    }
    command = [sys.executable, "-c", ONE_PROCESS, plan.spec.model]
    started = time.monotonic()
    subprocess.run(command, env=environment, capture_output=True, check=True)
    return time.monotonic() - started


def server(plan: EnginePlan, directory: Path) -> float:
    path = directory / "server.sock"
    path.unlink(missing_ok=True)
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", ENGINE_MODULE, *engine_arguments(plan, path)],
        env=vllm_environment(plan, directory),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    client = EngineClient(path, plan.spec.context_id, 60)
    try:
        while not client.healthy():
            assert process.poll() is None, "the server ended"
            time.sleep(0.05)
        assert list(client.score([[1, 2, 3]], [1, 2]))
        return time.monotonic() - started
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def attached(plan: EnginePlan, settings: Settings) -> float:
    shutil.rmtree(settings.cache_dir, ignore_errors=True)
    started = time.monotonic()
    attachment = EngineLease(plan, settings)
    assert attachment.start(NEVER)
    seconds = time.monotonic() - started
    attachment.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    spec = pin_model(ContextSpec(model=str(MODEL)))
    taken: dict[str, list[float]] = {
        name: [] for name in ("one process", "server as it comes", "first", "later")
    }
    with tempfile.TemporaryDirectory(prefix="kw-") as name:
        directory = Path(name)
        settings = load_settings(runtime_dir=directory / "run", cache_dir=directory / "cache")
        plan = EnginePlan.of(spec, find_device(), settings)
        try:
            for _ in range(arguments.rounds):
                taken["one process"].append(one_process(plan, directory))
                taken["server as it comes"].append(server(plan, directory))
                taken["first"].append(attached(plan, settings))
                evict(settings, (plan.name,))
                taken["later"].append(attached(plan, settings))
                drain(settings)
        finally:
            drain(settings)
    table = Table(box=None)
    for heading in ("start", "seconds: median", "least", "most", "of one process"):
        table.add_column(heading, justify="left" if heading == "start" else "right")
    alone = statistics.median(taken["one process"])
    for how, seconds in taken.items():
        median = statistics.median(seconds)
        row = (f"{median:.1f}", f"{min(seconds):.1f}", f"{max(seconds):.1f}")
        table.add_row(how, *row, f"{median / alone:.2f}")
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(taken, indent=2) + "\n")


if __name__ == "__main__":
    main()
