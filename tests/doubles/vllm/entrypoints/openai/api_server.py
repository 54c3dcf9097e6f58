"""A stand-in for vLLM's server that answers at once. It stands where `python -m vllm.entrypoints…`
finds it when PYTHONPATH names `tests/doubles`, so that the worker's own code starts it unchanged.

It speaks as much of the protocol as a worker needs: `/health` and `/v1/completions` with token ids
and `logprob_token_ids`. A prompt's answer depends on its token ids alone. `TEST_ENGINE_…` variables
make it slow or faulty.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path

from pydantic_core import from_json

START_SECONDS = float(os.environ.get("TEST_ENGINE_START_SECONDS", "0"))
CLAIM_SECONDS = float(os.environ.get("TEST_ENGINE_CLAIM_SECONDS", "0"))
FAULT = os.environ.get("TEST_ENGINE_FAULT", "")
"""`no-start`: end with an error; `abort`: say that requests were aborted; `unscored`: leave label
scores out; `refuse-long`: refuse requests that hold a prompt of over 200 tokens; `crash-once`: end
at the first request after the probe, the first time (a file remembers)."""


def answer(request: dict) -> tuple[int, dict]:
    tokens = request["logprob_token_ids"]
    prompts = request["prompt"]
    if FAULT == "refuse-long" and any(len(prompt) > 200 for prompt in prompts):
        return 400, {"error": {"message": "a prompt is too long"}}
    choices = []
    for index, prompt in enumerate(prompts):
        chosen = sum(prompt) % len(tokens)
        scores = {
            f"token_id:{token}": (-0.25 if position == chosen else -3.0 - position)
            for position, token in enumerate(tokens)
        }
        if FAULT == "unscored" and len(prompts) > 1:
            scores.popitem()
        choices.append(
            {
                "index": index,
                "text": f"word{chosen}",
                "finish_reason": "abort" if FAULT == "abort" and len(prompt) > 3 else "length",
                "logprobs": {"top_logprobs": [scores]},
            }
        )
    return 200, {"choices": choices}


def crash_once(arguments: argparse.Namespace, request: dict) -> None:
    marker = Path(arguments.uds).with_suffix(".crashed")
    if FAULT == "crash-once" and len(request["prompt"][0]) > 3 and not marker.exists():
        marker.touch()
        os._exit(9)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--uds", required=True)
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
                status, reply = 200, {}
                if head.startswith("POST"):
                    request = from_json(body)
                    crash_once(arguments, request)
                    if CLAIM_SECONDS and len(request["prompt"][0]) > 3:  # not the worker's probe
                        async with turn:
                            await asyncio.sleep(CLAIM_SECONDS * len(request["prompt"]))
                    status, reply = answer(request)
                content = json.dumps(reply).encode()
                writer.write(
                    f"HTTP/1.1 {status} OK\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(content)}\r\n\r\n".encode()
                    + content
                )
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(serve, arguments.uds, limit=1 << 24)
    async with server:
        await server.serve_forever()


asyncio.run(main())
