import contextlib
import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.broker import Delivery
from services.contracts import (
    Claim,
    ClaimBatch,
    ContextDemand,
    ContextReady,
    ContextSpec,
    ControlUpdate,
    DeadClaim,
    DeadReason,
    Label,
    PromptSpec,
    Run,
    RunAnnouncement,
    StartupPhases,
    Totals,
    Verdict,
    VerdictBatch,
    WorkerHeartbeat,
    decode,
    encode,
)
from services.contracts.bounds import MAX_EVIDENCE_CHARS, MAX_MESSAGE_BYTES
from services.contracts.errors import MessageInvalid, MessageTooNew
from services.contracts.prompts import Example
from services.contracts.wire import Message

KINDS: dict[str, type[Message]] = {
    kind.wire_type: kind
    for kind in (
        *(ClaimBatch, VerdictBatch, DeadClaim, RunAnnouncement, ControlUpdate, ContextReady),
        WorkerHeartbeat,
    )
}

# What people write in any script, with all that JSON escapes; no NUL and no lone surrogates.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")


def text(size: int, *, least: int = 0) -> st.SearchStrategy[str]:
    return st.text(CHARACTERS, min_size=least, max_size=size)


BATCH_IDS = st.from_regex(r"[!-~]{1,128}", fullmatch=True)


def words(size: int) -> st.SearchStrategy[str]:
    return text(size, least=1).filter(str.strip)


COUNT = st.integers(min_value=0, max_value=2**40)
PROBABILITY = st.floats(min_value=0, max_value=1)
SECONDS = st.floats(min_value=0, max_value=1e6)


@st.composite
def labels(draw: st.DrawFn) -> tuple[Label, ...]:
    count = draw(st.integers(2, 5))
    return tuple(
        Label(name=f"L{index} {draw(text(20))}x", word=draw(words(20))) for index in range(count)
    )


@st.composite
def prompts(draw: st.DrawFn) -> PromptSpec:
    declared = draw(labels())
    examples = st.builds(
        Example,
        claim=words(40),
        evidence=st.none() | text(40),
        label=st.sampled_from([label.name for label in declared]),
    )
    return PromptSpec(
        name=draw(words(20)),
        instructions=draw(text(60)),
        examples=tuple(draw(st.lists(examples, max_size=2))),
        template=draw(text(20).map(lambda s: s.replace("{", "").replace("}", ""))) + "{claim}",
        labels=declared,
        chat=draw(st.booleans()),
        minimum_mass=draw(PROBABILITY),
    )


OWN_IDS = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,19}\Z")
CONTEXTS = st.builds(
    ContextSpec,
    model=words(40),
    revision=st.none() | words(20),
    dtype=st.sampled_from(["auto", "bfloat16", "float16", "float32"]),
    max_model_tokens=st.integers(16, 10_000_000),
    engine_arguments=st.lists(words(20), max_size=3).map(tuple),
)
RUNS = st.builds(
    Run,
    source=words(40),
    source_digest=OWN_IDS,
    context=CONTEXTS,
    prompt=prompts(),
    limit=st.none() | st.integers(1, 2**40),
    seed=st.none() | st.integers(-(2**40), 2**40),
)
CLAIMS = st.builds(
    Claim,
    claim_id=words(30),
    position=COUNT,
    text=words(200),
    evidence=st.none() | text(200),
    gold=st.none() | words(20),
)


@st.composite
def verdict_batches(draw: st.DrawFn) -> VerdictBatch:
    names = tuple(label.name for label in draw(labels()))
    scores = st.lists(PROBABILITY, min_size=len(names), max_size=len(names)).map(tuple)
    verdicts = st.builds(
        Verdict,
        claim_id=words(30),
        position=COUNT,
        text=words(200),
        gold=st.none() | words(20),
        label=st.sampled_from([*names, "INVALID"]),
        probabilities=st.just(()) | scores,
        mass=PROBABILITY,
        raw_text=text(20),
        prompt_tokens=st.integers(0, 10**6),
    )
    return VerdictBatch(
        run_id=draw(OWN_IDS),
        batch_id=draw(BATCH_IDS),
        labels=names,
        verdicts=tuple(draw(st.lists(verdicts, min_size=1, max_size=3))),
        worker_id=draw(OWN_IDS),
        device=draw(words(20)),
        attempt=draw(st.integers(1, 1000)),
        engine_seconds=draw(st.floats(min_value=0, max_value=604_800)),
    )


MESSAGES: dict[str, st.SearchStrategy[Message]] = {
    "ClaimBatch": st.builds(
        ClaimBatch,
        run=RUNS,
        submission_id=OWN_IDS,
        batch_id=BATCH_IDS,
        claims=st.lists(CLAIMS, min_size=1, max_size=3).map(tuple),
    ),
    "VerdictBatch": verdict_batches(),
    "DeadClaim": st.builds(
        DeadClaim,
        run_id=OWN_IDS,
        claim=CLAIMS,
        reason=st.sampled_from(DeadReason),
        detail=text(60),
        worker_id=OWN_IDS,
        attempt=st.integers(1, 1000),
        failures=st.integers(0, 1000),
    ),
    "RunAnnouncement": st.builds(
        RunAnnouncement,
        run=RUNS,
        submission_id=OWN_IDS,
        totals=st.none()
        | st.tuples(COUNT, COUNT, COUNT).map(
            lambda c: Totals(lines=sum(c), claims=c[0], repeated=c[1], rejected=c[2])
        ),
    ),
    "Notice": st.builds(
        ControlUpdate,
        cancelled=st.lists(OWN_IDS, max_size=3).map(tuple),
        contexts=st.lists(
            st.builds(
                ContextDemand,
                context=CONTEXTS,
                claims_ready=COUNT,
                claims_in_flight=COUNT,
                workers_warm=st.integers(0, 10_000),
            ),
            max_size=3,
        ).map(tuple),
    ),
    "ContextReady": st.builds(
        ContextReady,
        startup_id=OWN_IDS,
        worker_id=OWN_IDS,
        context_id=OWN_IDS,
        device=words(20),
        warm=st.booleans(),
        seconds=SECONDS,
        phases=st.builds(
            StartupPhases,
            **{name: st.none() | SECONDS for name in StartupPhases.model_fields},
        ),
    ),
    "WorkerReport": st.builds(
        WorkerHeartbeat,
        worker_id=OWN_IDS,
        context_id=st.none() | OWN_IDS,
        device=words(20),
        state=st.sampled_from(["starting", "serving", "draining", "stopped"]),
        claims_per_second=st.none() | st.floats(min_value=0, max_value=1e9),
        restart_reason=st.none() | st.sampled_from(["engine-ended", "out-of-memory"]),
        claims_answered=st.integers(0, 2**63 - 1),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_message_comes_out_of_the_wire_as_it_went_in(kind: str, data: st.DataObject) -> None:
    message = data.draw(MESSAGES[kind])
    assert decode(KINDS[kind], encode(message)) == message


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_is_json_in_utf_8_with_its_schema_version(
    kind: str, messages: dict[str, Message]
) -> None:
    body = json.loads(encode(messages[kind]).decode("utf-8"))
    assert body["schema_version"] == 1
    assert body == messages[kind].model_dump(mode="json")


def test_an_identity_is_made_from_content_and_never_sent(messages: dict[str, Message]) -> None:
    batch = messages["ClaimBatch"]
    assert batch.run.run_id and batch.run.context.context_id and batch.run.prompt.prompt_id
    assert not any(name in encode(batch) for name in (b"run_id", b"context_id", b"prompt_id"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("body", [b"", b"{", b"nonsense", b'{"run": "\xff"}', b"[" * 10_000])
def test_what_is_not_json_is_refused_as_such(kind: str, body: bytes) -> None:
    with pytest.raises(MessageInvalid, match=f"not a {kind}: Invalid JSON"):
        decode(KINDS[kind], body)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("body", [b"null", b"1", b'"text"', b"[]", b"true"])
def test_json_that_is_no_object_is_refused(kind: str, body: bytes) -> None:
    with pytest.raises(MessageInvalid, match=f"not a {kind}"):
        decode(KINDS[kind], body)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", KINDS)
def test_a_message_of_another_kind_is_refused(
    kind: str, wanted: str, messages: dict[str, Message]
) -> None:
    """By its type: what is a field of the one may be one that the other need not know."""
    delivery = Delivery("q", encode(messages[kind]), {}, "m", False, 1, 1, kind=kind)
    if kind == wanted:
        assert delivery.message(KINDS[wanted]) == messages[kind]
    else:
        with pytest.raises(MessageInvalid, match=f"its type is '{kind}', not {wanted}"):
            delivery.message(KINDS[wanted])


def test_a_body_over_the_bound_is_refused_unread(messages: dict[str, Message]) -> None:
    body = encode(messages["DeadClaim"])
    at_the_bound = body + b" " * (MAX_MESSAGE_BYTES - len(body))
    assert decode(DeadClaim, at_the_bound) == messages["DeadClaim"]
    with pytest.raises(MessageInvalid, match="8,388,609 bytes are over the limit of 8,388,608"):
        decode(DeadClaim, at_the_bound + b" ")


def test_a_message_over_the_bound_is_not_even_sent(run: Run) -> None:
    evidence = "e" * MAX_EVIDENCE_CHARS
    claims = tuple(
        Claim(claim_id=str(number), position=number, text="c", evidence=evidence)
        for number in range(MAX_MESSAGE_BYTES // MAX_EVIDENCE_CHARS + 1)
    )
    with pytest.raises(MessageInvalid, match="a ClaimBatch of 8.* use a smaller --batch-size"):
        encode(ClaimBatch(run=run, submission_id="s", batch_id="b", claims=claims))


# What Keepwarm itself makes may name a file, a queue, a line on a screen.
OWN_ID_FIELDS = (
    ("ClaimBatch", "submission_id"),
    ("ClaimBatch", "run.source_digest"),
    ("VerdictBatch", "run_id"),
    ("VerdictBatch", "worker_id"),
    ("DeadClaim", "run_id"),
    ("DeadClaim", "worker_id"),
    ("RunAnnouncement", "submission_id"),
    ("Notice", "cancelled.0"),
    ("ContextReady", "startup_id"),
    ("ContextReady", "worker_id"),
    ("ContextReady", "context_id"),
    ("WorkerReport", "worker_id"),
    ("WorkerReport", "context_id"),
)
# A number must fit the store: BIGINT for positions and totals, INTEGER for attempts and tokens.
BOUNDS: list[tuple[str, str, object]] = [
    *(
        (kind, field, bad)
        for kind, field in OWN_ID_FIELDS
        for bad in ("../x", ".x", "-x", "a b", "[/red]", "\x1b[2J", "=cmd", "a\n", "é", "a/b", "")
    ),
    *(("ClaimBatch", "batch_id", bad) for bad in ("", " ", "i" * 129, "a\0", "é")),
    *(("ClaimBatch", "submission_id", bad) for bad in ("", " ", "i" * 257, "a\0", None)),
    *(("ClaimBatch", "claims", bad) for bad in ([], {})),
    *(("ClaimBatch", "claims.0.claim_id", bad) for bad in ("", " ", "i" * 257, "a\0")),
    *(("ClaimBatch", "claims.0.text", bad) for bad in ("", " \t\n", "t" * 8_193, "a\0b", 5)),
    *(("ClaimBatch", "claims.0.evidence", bad) for bad in ("e" * 65_537, "a\0b")),
    *(("ClaimBatch", "claims.0.gold", bad) for bad in ("", " ", "g" * 65, "a\0")),
    *(("ClaimBatch", "claims.0.position", bad) for bad in (-1, 0.5, "x", 2**63)),
    *(("ClaimBatch", "run.source", bad) for bad in ("", "s" * 513, "a\0")),
    *(("ClaimBatch", "run.source_digest", bad) for bad in ("", "s" * 257)),
    *(("ClaimBatch", "run.limit", bad) for bad in (0, -1)),
    *(("ClaimBatch", "run.context.model", bad) for bad in ("", "m" * 513)),
    ("ClaimBatch", "run.context.revision", "r" * 513),
    ("ClaimBatch", "run.context.dtype", "int8"),
    *(("ClaimBatch", "run.context.max_model_tokens", bad) for bad in (15, 10_000_001)),
    ("ClaimBatch", "run.context.engine_arguments", ["--x"] * 129),
    ("ClaimBatch", "run.context.engine_arguments.0", "-" * 513),
    *(("ClaimBatch", "run.prompt.name", bad) for bad in ("", "n" * 513)),
    *(("ClaimBatch", "run.prompt.instructions", bad) for bad in ("i" * 65_537, "a\0")),
    ("ClaimBatch", "run.prompt.template", "{claim}" + "t" * 65_530),
    ("ClaimBatch", "run.prompt.no_evidence", "n" * 65_537),
    ("ClaimBatch", "run.prompt.examples", [{"claim": "c", "label": "SUPPORTS"}] * 65),
    ("ClaimBatch", "run.prompt.examples.0.claim", "c" * 8_193),
    ("ClaimBatch", "run.prompt.examples.0.evidence", "e" * 65_537),
    ("ClaimBatch", "run.prompt.examples.0.label", "l" * 65),
    ("ClaimBatch", "run.prompt.labels", [{"name": "A", "word": "a"}]),
    ("ClaimBatch", "run.prompt.labels", [{"name": f"A{i}", "word": "a"} for i in range(33)]),
    ("ClaimBatch", "run.prompt.labels.0.name", "n" * 65),
    ("ClaimBatch", "run.prompt.labels.0.word", ""),
    ("ClaimBatch", "run.prompt.labels.0.aliases", [f"a{i}" for i in range(17)]),
    *(("ClaimBatch", "run.prompt.minimum_mass", bad) for bad in (-0.1, 1.1, float("nan"))),
    *(("VerdictBatch", "run_id", bad) for bad in ("", "i" * 257)),
    ("VerdictBatch", "labels", ["A"]),
    ("VerdictBatch", "labels", [f"A{i}" for i in range(33)]),
    ("VerdictBatch", "verdicts", []),
    ("VerdictBatch", "verdicts.0.claim_id", "i" * 257),
    ("VerdictBatch", "verdicts.0.text", "t" * 8_193),
    ("VerdictBatch", "verdicts.0.label", ""),
    *(("VerdictBatch", "verdicts.0.position", bad) for bad in (-1, 2**63)),
    ("VerdictBatch", "verdicts.0.probabilities", [0.0] * 33),
    *(("VerdictBatch", "verdicts.0.probabilities.0", bad) for bad in (-0.1, 1.1, float("nan"))),
    *(("VerdictBatch", "verdicts.0.mass", bad) for bad in (-0.1, 1.1, float("inf"))),
    *(("VerdictBatch", "verdicts.0.raw_text", bad) for bad in ("r" * 1_025, "a\0")),
    *(("VerdictBatch", "verdicts.0.prompt_tokens", bad) for bad in (-1, 2**31)),
    *(("VerdictBatch", "worker_id", bad) for bad in ("", "w" * 513)),
    *(("VerdictBatch", "device", bad) for bad in ("", "d" * 513)),
    *(("VerdictBatch", "attempt", bad) for bad in (0, 2**31)),
    *(("VerdictBatch", "engine_seconds", bad) for bad in (-1, 1e308, float("inf"), float("nan"))),
    ("DeadClaim", "reason", "bored"),
    *(("DeadClaim", "detail", bad) for bad in ("d" * 16_385, "a\0")),
    ("DeadClaim", "attempt", 0),
    *(("DeadClaim", "failures", bad) for bad in (-1, 0.5, 2**31)),
    *(("RunAnnouncement", "submission_id", bad) for bad in ("", "i" * 257, None)),
    *(("RunAnnouncement", "totals.lines", bad) for bad in (-1, 1.5, 2**63)),
    *(("Notice", "cancelled", bad) for bad in (None, "sub-1", ["s"] * 1_001)),
    *(("Notice", "cancelled.0", bad) for bad in ("", "i" * 257, "a\0", 5)),
]


def replaced(message: Message, path: str, value: object) -> bytes:
    body: Any = message.model_dump(mode="json")
    parent, key = body, path.split(".")
    for step in key[:-1]:
        parent = parent[int(step) if step.isdecimal() else step]
    parent[int(key[-1]) if key[-1].isdecimal() else key[-1]] = value
    return json.dumps(body).encode()


@pytest.mark.parametrize(
    ("kind", "path", "value"), BOUNDS, ids=[f"{k}-{p}-{str(v)[:12]!a}" for k, p, v in BOUNDS]
)
def test_what_is_out_of_bounds_is_refused_by_name(
    kind: str, path: str, value: object, messages: dict[str, Message], secret_texts: tuple[str, ...]
) -> None:
    with pytest.raises(MessageInvalid) as refused:
        decode(KINDS[kind], replaced(messages[kind], path, value))
    assert str(refused.value).startswith(f"not a {kind}: {path}: ")
    assert not any(text in str(refused.value) for text in secret_texts)


def test_a_batch_of_too_many_claims_is_refused(messages: dict[str, Message]) -> None:
    body = messages["ClaimBatch"].model_dump(mode="json")
    body["claims"] = body["claims"] * 1_024
    assert len(decode(ClaimBatch, json.dumps(body).encode()).claims) == 1_024
    body["claims"].append(body["claims"][0])
    with pytest.raises(MessageInvalid, match="not a ClaimBatch: claims: .*at most 1024"):
        decode(ClaimBatch, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("ClaimBatch", "claims.0.claim_id", "i" * 256),
        ("ClaimBatch", "claims.0.text", "t" * 8_192),
        ("ClaimBatch", "claims.0.evidence", "e" * 65_536),
        ("ClaimBatch", "claims.0.evidence", ""),
        ("ClaimBatch", "claims.0.evidence", None),
        ("ClaimBatch", "claims.0.gold", "g" * 64),
        ("ClaimBatch", "claims.0.position", 2**63 - 1),
        ("ClaimBatch", "run.source", "s" * 512),
        ("ClaimBatch", "run.context.engine_arguments", ["--x"] * 128),
        ("ClaimBatch", "run.prompt.instructions", "i" * 65_536),
        ("VerdictBatch", "verdicts.0.raw_text", "r" * 1_024),
        ("VerdictBatch", "verdicts.0.probabilities", []),
        ("DeadClaim", "detail", "d" * 16_384),
    ],
    ids=str,
)
def test_what_is_just_within_bounds_is_taken(
    kind: str, path: str, value: object, messages: dict[str, Message]
) -> None:
    decode(KINDS[kind], replaced(messages[kind], path, value))


@pytest.mark.parametrize("scores", [[0.5, 0.5], [0.25, 0.25, 0.25, 0.25], [1.0]])
def test_a_verdict_has_a_probability_for_each_label_or_for_none(
    scores: list[float], messages: dict[str, Message]
) -> None:
    with pytest.raises(MessageInvalid, match="probabilities"):
        decode(
            VerdictBatch,
            replaced(messages["VerdictBatch"], "verdicts.0.probabilities", scores),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_field_is_named(kind: str, messages: dict[str, Message]) -> None:
    whole = messages[kind].model_dump(mode="json")
    for name, field in KINDS[kind].model_fields.items():
        if field.is_required():
            body = {key: value for key, value in whole.items() if key != name}
            with pytest.raises(MessageInvalid, match=f"not a {kind}: {name}: "):
                decode(KINDS[kind], json.dumps(body).encode())


def test_a_fault_is_one_short_line_however_long_the_unknown_fields_name_is(
    messages: dict[str, Message],
) -> None:
    body = {**messages["ClaimBatch"].model_dump(mode="json")}
    body["run"]["x" * 100_000] = 1
    with pytest.raises(MessageInvalid) as refused:
        decode(ClaimBatch, json.dumps(body).encode())
    assert len(str(refused.value)) < 1_000


# Arbitrary bytes, and valid messages with one thing changed.


@pytest.mark.parametrize("kind", KINDS)
@given(body=st.binary(max_size=400))
def test_arbitrary_bytes_are_a_message_or_refused(kind: str, body: bytes) -> None:
    with pytest.raises(MessageInvalid):
        decode(KINDS[kind], body)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_message_with_damaged_bytes_is_taken_or_refused(
    kind: str, data: st.DataObject, messages: dict[str, Message]
) -> None:
    body = bytearray(encode(messages[kind]))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(body)))
        end = data.draw(st.integers(start, min(len(body), start + 4)))
        body[start:end] = data.draw(st.binary(max_size=4))
    with contextlib.suppress(MessageInvalid):
        assert isinstance(decode(KINDS[kind], bytes(body)), KINDS[kind])


def keys_in(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a tree of JSON."""
    keys = value if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], dict | list):
            found += keys_in(value[key])
    return found


ODD_VALUES = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        10**30,
        1e308,
        float("nan"),
        "",
        "{",
        "a\0",
        "\ud800",
        [],
        [[]],
        {},
        "x" * 70,
    ]
)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_message_with_a_changed_value_is_taken_or_refused_without_its_claims_text(
    kind: str, data: st.DataObject, messages: dict[str, Message], secret_texts: tuple[str, ...]
) -> None:
    body = copy.deepcopy(messages[kind].model_dump(mode="json"))
    container, key = data.draw(st.sampled_from(keys_in(body)))
    match data.draw(st.sampled_from(["replace", "remove", "add", "misplace"])):
        case "replace":
            container[key] = data.draw(ODD_VALUES)
        case "remove":
            del container[key]
        case "add" if isinstance(container, dict):
            container["surprise"] = data.draw(ODD_VALUES)
        case _:
            # A claim's text in another field of the claim. (What a prompt holds is no claim's.)
            of_the_run = [id(container) for container, _ in keys_in(body.get("run", {}))]
            if id(container) not in of_the_run:
                container[key] = data.draw(st.sampled_from(secret_texts))
    try:
        assert isinstance(decode(KINDS[kind], json.dumps(body).encode()), KINDS[kind])
    except (MessageInvalid, MessageTooNew) as error:
        assert not any(text in str(error) for text in secret_texts)
