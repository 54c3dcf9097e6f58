"""Messages of older and newer versions: read, or refused by name, and never half understood.

`version_1` holds the bytes that version 1 wrote, `version_2` those with proofs, `version_3` those
about claims whose prompt reasons first, so that whoever changes a message sees what is in queues
already.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from services.contracts import (
    ClaimBatch,
    ContextReady,
    ControlUpdate,
    DeadClaim,
    PromptSpec,
    RunAnnouncement,
    VerdictBatch,
    WorkerHeartbeat,
    decode,
    encode,
)
from services.contracts.errors import MessageInvalid, MessageTooNew
from services.contracts.prompts import Reasoning
from services.contracts.wire import PROOFS_VERSION, REASONING_VERSION, VERSION, Message

HERE = Path(__file__).parent
KINDS: dict[str, type[Message]] = {
    kind.wire_type: kind
    for kind in (
        *(ClaimBatch, VerdictBatch, DeadClaim, RunAnnouncement, ControlUpdate, ContextReady),
        WorkerHeartbeat,
    )
}
GOLDEN = sorted(HERE.glob("version_*/*.json"))


def changed(kind: str, **fields: object) -> bytes:
    body: dict[str, Any] = json.loads((HERE / "version_1" / f"{kind}.json").read_bytes())
    return json.dumps({**body, **fields}).encode()


def test_there_are_bytes_of_every_version_and_of_every_kind_of_message() -> None:
    assert {path.stem for path in GOLDEN if path.parent.name == "version_1"} == set(KINDS)
    assert {path.parent.name for path in GOLDEN} == {f"version_{n + 1}" for n in range(VERSION)}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_an_older_version_wrote_is_read_and_written_again_byte_for_byte(path: Path) -> None:
    """The latter is what an older reader gets from us while nothing in it is new."""
    body = path.read_bytes()
    assert encode(decode(KINDS[path.stem], body)) == body


def test_identities_are_what_they_were() -> None:
    batch = decode(ClaimBatch, (HERE / "version_1" / "ClaimBatch.json").read_bytes())
    assert batch.run.run_id == "run-1a960dfdf8493c16"


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_that_a_newer_version_added_and_one_need_not_know_is_ignored(kind: str) -> None:
    assert decode(KINDS[kind], changed(kind, hue={"blue": [1]})) == decode(
        KINDS[kind], changed(kind)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_that_one_has_to_be_newer_for_says_so(kind: str) -> None:
    for fields in ({}, {"hue": 1}, {"worker_id": None, "run": None}):
        body = changed(kind, schema_version=VERSION + 1, **fields)
        with pytest.raises(MessageTooNew) as refused:
            decode(KINDS[kind], body)
        left = "is ignored" if kind in ("WorkerReport", "Notice") else "stays in its queue"
        assert str(refused.value) == (
            f"a {kind} of version {VERSION + 1} came, and this Keepwarm reads up to {VERSION}; it "
            f"{left}. Install the sender's version of Keepwarm (docs/operations.md, Upgrade)"
        )


@pytest.mark.parametrize("version", [0, -1, str(VERSION + 1), None, [3], 2.5, True])
def test_a_version_that_is_none_is_refused(version: object) -> None:
    if version is True:  # JSON's true is Python's 1
        return
    with pytest.raises(MessageInvalid, match="not a Notice: schema_version"):
        decode(ControlUpdate, changed("Notice", schema_version=version))


@pytest.mark.parametrize("part", ["run", "context", "prompt"])
def test_nothing_unknown_is_left_out_of_an_identity(part: str) -> None:
    """Who ignored a part of it would make another identity of it than its sender."""
    body: dict[str, Any] = json.loads(changed("ClaimBatch"))
    run = body["run"]
    (run if part == "run" else run[part])["hue"] = 1
    with pytest.raises(MessageInvalid, match=r"not a ClaimBatch: run\..*hue"):
        decode(ClaimBatch, json.dumps(body).encode())


def test_a_batch_whose_prompt_reasons_needs_a_reader_that_lets_the_model_reason() -> None:
    """An older reader leaves it in its queue and ends; it never answers without the reasoning."""
    read = decode(ClaimBatch, (HERE / "version_2" / "ClaimBatch.json").read_bytes())
    plain = PromptSpec(template="{claim}\nReasoning:")
    reasoning = plain.model_copy(update={"reasoning": Reasoning(max_tokens=8)})
    for prompt, version in ((plain, PROOFS_VERSION), (reasoning, REASONING_VERSION)):
        run = read.run.model_copy(update={"prompt": prompt})
        batch = ClaimBatch.with_proofs(run, "sub-1", "0-0", read.claims, bytes(16))
        assert batch.schema_version == version
        assert (b"reasoning" in encode(batch)) == (version == REASONING_VERSION)
        assert decode(ClaimBatch, encode(batch)).run.run_id == run.run_id


def test_an_unknown_field_excuses_no_other_fault() -> None:
    with pytest.raises(MessageInvalid, match="not a DeadClaim: attempt"):
        decode(DeadClaim, changed("DeadClaim", hue=1, attempt=0))
    with pytest.raises(MessageInvalid, match="not a ClaimBatch: .*a proof for each claim"):
        decode(ClaimBatch, changed("ClaimBatch", hue=1, proofs=["a", "b"]))
