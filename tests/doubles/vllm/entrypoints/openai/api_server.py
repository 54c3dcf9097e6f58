"""A stand-in for vLLM's server that answers at once. The interpreters of tests/interpreters.py find
it in vLLM's place, so that the worker's own code starts it unchanged.

It speaks as much of the protocol as a worker needs: `/health`, `/metrics`, `/sleep`, `/wake_up`,
`/v1/load_lora_adapter`, and `/v1/completions` with token ids and `logprob_token_ids`, as a stream.
A prompt's answer depends on its token ids and the adapter alone. `VLLM_TEST_…` variables make it
slow or faulty.
"""

import argparse
import asyncio
import json
import math
import os
import sys
import tempfile
import time
import zlib
from pathlib import Path

from pydantic_core import from_json

START_SECONDS = float(os.environ.get("VLLM_TEST_START_SECONDS", "0"))
CLAIM_SECONDS = float(os.environ.get("VLLM_TEST_CLAIM_SECONDS", "0"))
HURRY = os.environ.get("VLLM_TEST_HURRY", "")
"""A file: once it is there, a claim takes no time any more."""
FAULT = os.environ.get("VLLM_TEST_FAULT", "")
"""`no-start`: end with an error; `abort`: say that requests were aborted; `unscored`: leave label
scores out where several prompts come at once; `refuse-long`: refuse requests that hold a prompt of
over 200 tokens; `refuse-repeats`: refuse those that hold a prompt with one token 50 times;
`crash-long`: end at a prompt of over 200 tokens; `oom-long`: the same, for lack of memory;
`nan-long`: score such a prompt with NaN; `wakes-wrong`: answer otherwise once it has been woken;
`drifts`: answer the probe otherwise each time;
`thinks`: say `<think>` and hardly ever a label; `crash-once`, `hang-once`: end, or fall silent, in
the midst of the first request after the probe, the first time (a file remembers)."""
JOURNAL = os.environ.get("VLLM_TEST_JOURNAL", "")
"""A file that gets a line for each prompt of a claim whose answer was sent, and for each time that
the engine was put to sleep or woken."""
LITTER = os.environ.get("VLLM_TEST_LITTER", "")
"""Leave a directory and a socket where temporary files go, as vLLM does."""
LONG_TOKENS = 200
answered = {"tokens": 0, "probes": 0, "woken": 0}
PROBE_TOKENS = 3
adapters: dict[str, str] = {}
"""The directory of each adapter that was loaded, by the name that it is asked by."""


def is_long(prompt: list[int]) -> bool:
    return len(prompt) > LONG_TOKENS


def repeats(prompt: list[int]) -> bool:
    return max(map(prompt.count, set(prompt)), default=0) >= 50


def is_refused(arguments: argparse.Namespace, prompt: list[int]) -> str:
    """In vLLM's words where it is too long."""
    if len(prompt) >= arguments.max_model_len:
        return f"This model's maximum context length is {arguments.max_model_len} tokens."
    if FAULT == "refuse-long" and is_long(prompt):
        return "a prompt is too long"
    return "a prompt repeats itself" if FAULT == "refuse-repeats" and repeats(prompt) else ""


def written(request: dict, index: int) -> dict:
    """A text before an answer: the prompt's own first tokens."""
    prompt = request["prompt"][index]
    return {
        "index": index,
        "text": "",
        "finish_reason": "abort" if FAULT == "abort" else "length",
        "stop_reason": None,
        "token_ids": prompt[: request["max_tokens"]],
    }


def choice(request: dict, index: int) -> dict:
    if "stop" in request:
        return written(request, index)
    tokens, prompt = request["logprob_token_ids"], request["prompt"][index]
    # An adapter answers otherwise than its model.
    chosen = (sum(prompt) + len(adapters.get(request["model"], ""))) % len(tokens)
    scores = {
        f"token_id:{token}": (-0.25 if position == chosen else -3.0 - position)
        for position, token in enumerate(tokens)
    }
    if FAULT == "unscored" and len(request["prompt"]) > 1:
        scores.popitem()
    if FAULT == "thinks":
        scores = {name: score - 6 for name, score in scores.items()}
    if len(prompt) <= PROBE_TOKENS:
        answered["probes"] += 1
    if (FAULT == "wakes-wrong" and answered["woken"]) or FAULT == "drifts":
        scores = {name: score - 3 * answered["probes"] for name, score in scores.items()}
    if FAULT == "nan-long" and is_long(prompt):
        scores = dict.fromkeys(scores, math.nan)
    return {
        "index": index,
        "text": "<think>" if FAULT == "thinks" else f"word{chosen}",
        "finish_reason": "abort" if FAULT == "abort" and len(prompt) > PROBE_TOKENS else "length",
        "logprobs": {"top_logprobs": [scores]},
    }


def once(arguments: argparse.Namespace) -> bool:
    """True the first time, in this engine and in those that come after it."""
    marker = Path(arguments.uds).with_suffix(f".{FAULT}")
    if marker.exists():
        return False
    marker.touch()
    return True


def note(prompts: list[list[int]]) -> None:
    answered["tokens"] += sum(map(len, prompts))
    if JOURNAL:
        claims = [prompt for prompt in prompts if len(prompt) > PROBE_TOKENS]
        with Path(JOURNAL).open("a") as file:
            file.write("".join(f"{zlib.crc32(repr(claim).encode())}\n" for claim in claims))


def note_sleep(head: str) -> None:
    answered["woken"] += head.startswith("POST /wake_up")
    if JOURNAL and head.startswith(("POST /sleep", "POST /wake_up")):
        with Path(JOURNAL).open("a") as file:
            file.write(f"{head.split()[1]}\n")


def load_adapter(arguments: argparse.Namespace, request: dict) -> tuple[str, str]:
    """The status and the text of the answer, in vLLM's words."""
    name, path = request["lora_name"], request["lora_path"]
    if not arguments.enable_lora:
        return "404 Not Found", '{"detail":"Not Found"}'
    if name in adapters:
        return "400 Bad Request", f"The lora adapter '{name}' has already been loaded."
    if not (Path(path) / "adapter_model.safetensors").is_file():
        return "404 Not Found", f"Loading lora {name} failed: No adapter found for {path}"
    adapters[name] = path
    if JOURNAL:
        with Path(JOURNAL).open("a") as file:
            file.write(f"adapter:{Path(path).name}\n")
    return "200 OK", f"Success: LoRA adapter '{name}' added successfully."


def answer_shortly(writer: asyncio.StreamWriter, status: str, text: str) -> None:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(text.encode())}\r\n\r\n"
    writer.write(head.encode() + text.encode())


def metrics(arguments: argparse.Namespace) -> bytes:
    """A little of what vLLM tells, in its form."""
    labels = f'{{engine="0",model_name="{arguments.served_model_name}"}}'
    return (
        "# HELP vllm:num_requests_running Number of requests in model execution batches.\n"
        "# TYPE vllm:num_requests_running gauge\n"
        f"vllm:num_requests_running{labels} 0.0\n"
        "# HELP vllm:prompt_tokens_total Number of prefill tokens processed.\n"
        "# TYPE vllm:prompt_tokens_total counter\n"
        f"vllm:prompt_tokens_total{labels} {answered['tokens']}\n"
        "# HELP process_open_fds Number of open file descriptors.\n"
        "# TYPE process_open_fds gauge\n"
        "process_open_fds 12.0\n"
    ).encode()


async def events(arguments: argparse.Namespace, request: dict, turn: asyncio.Lock):
    """What is to be sent, piece by piece."""
    prompts = request["prompt"]
    is_probe = len(prompts[0]) <= PROBE_TOKENS
    pieces = []
    for index, prompt in enumerate(prompts):
        if FAULT == "crash-long" and is_long(prompt):
            print("Segmentation fault, says the test engine", flush=True)
            os._exit(9)
        if FAULT == "oom-long" and is_long(prompt):
            print("torch.OutOfMemoryError: CUDA out of memory, says the test engine", flush=True)
            os._exit(9)
        if FAULT in ("crash-once", "hang-once") and not is_probe and index == len(prompts) // 2:
            yield b"".join(pieces)
            pieces = []
            await asyncio.sleep(0.2)
            if once(arguments):
                if FAULT == "crash-once":
                    os._exit(9)
                time.sleep(3600)
        if CLAIM_SECONDS and not is_probe and not (HURRY and Path(HURRY).exists()):
            async with turn:
                await asyncio.sleep(CLAIM_SECONDS)
        pieces.append(f"data: {json.dumps({'choices': [choice(request, index)]})}\n\n".encode())
        if CLAIM_SECONDS:
            yield pieces.pop()
    yield b"".join([*pieces, b"data: [DONE]\n\n"])


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--uds", required=True)
    parser.add_argument("--served-model-name", default="")
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--max-model-len", type=int, default=10_000_000)
    arguments, _ = parser.parse_known_args()
    print("the test engine is starting", flush=True)
    if FAULT == "no-start":
        print("RuntimeError: out of memory, says the test engine", flush=True)
        sys.exit(3)
    time.sleep(START_SECONDS)
    turn = asyncio.Lock()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                length = next(
                    (
                        int(line.partition(":")[2])
                        for line in head.splitlines()
                        if line.lower().startswith("content-length:")
                    ),
                    0,
                )
                body = await reader.readexactly(length)
                request = from_json(body) if body else {"prompt": []}
                note_sleep(head)
                if head.startswith("POST /v1/load_lora_adapter"):
                    answer_shortly(writer, *load_adapter(arguments, request))
                elif request.get("model", arguments.served_model_name) not in (
                    arguments.served_model_name,
                    *adapters,
                ):
                    text = f"The model `{request['model']}` does not exist."
                    answer_shortly(writer, "404 Not Found", text)
                elif why := next(
                    filter(None, (is_refused(arguments, one) for one in request["prompt"])), ""
                ):
                    message = json.dumps({"error": {"message": why}})
                    answer_shortly(writer, "400 Bad Request", message)
                elif head.startswith("GET /v1/models"):
                    model = {"id": arguments.served_model_name}
                    model["max_model_len"] = arguments.max_model_len
                    answer_shortly(writer, "200 OK", json.dumps({"data": [model]}))
                elif head.startswith("GET /metrics"):
                    content = metrics(arguments)
                    kind = "Content-Type: text/plain; version=0.0.4; charset=utf-8"
                    told = f"HTTP/1.1 200 OK\r\n{kind}\r\nContent-Length: {len(content)}\r\n\r\n"
                    writer.write(told.encode() + content)
                elif not request["prompt"]:
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                else:
                    writer.write(
                        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                        b"Transfer-Encoding: chunked\r\n\r\n"
                    )
                    sent = 0
                    async for piece in events(arguments, request, turn):
                        if piece:
                            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                            await writer.drain()
                            await asyncio.sleep(0)
                            if writer.is_closing():
                                return  # the client has gone: so does what it asked for
                            # One piece a claim where the engine is slow, all of them otherwise.
                            first = sent
                            sent += piece.count(b"data: {")
                            note(request["prompt"][first:sent])
                    writer.write(b"0\r\n\r\n")
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    if LITTER:
        tempfile.mkdtemp(prefix="vllm_dist_")
        Path(os.environ["VLLM_RPC_BASE_PATH"], "socket").touch()
    server = await asyncio.start_unix_server(serve, arguments.uds, limit=1 << 24)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
