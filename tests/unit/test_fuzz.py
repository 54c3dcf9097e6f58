"""Whatever comes in at an edge is a value or the one documented error, which keeps its secrets.

Each decoder gets arbitrary bytes and texts, and valid input with something changed.
"""

import copy
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.broker import BrokerAddress, Delivery
from services.broker.dead_messages import origin, reason
from services.contexts.engine_client import Answer, _answer, _choices
from services.contracts import (
    Claim,
    ClaimBatch,
    ContextDemand,
    ContextReady,
    ContextSpec,
    ControlUpdate,
    DeadClaim,
    DeadReason,
    PromptSpec,
    Run,
    RunAnnouncement,
    Settings,
    StartupPhases,
    Totals,
    Verdict,
    VerdictBatch,
    WorkerHeartbeat,
    encode,
    load_settings,
    topology,
)
from services.contracts.errors import (
    EngineRequestError,
    InputError,
    KeepwarmError,
    MessageInvalid,
    MessageTooNew,
    UsageError,
)
from services.contracts.proofs import ClaimsDigest, Positions, verdict_proof
from services.contracts.settings import check_broker_url
from services.contracts.wire import CONTENT_TYPE, Message
from services.gpu_worker.inference import read_verdict
from services.producer import Rejection, Source, read_prompt
from services.producer.parse import Parser

CLAIM_TEXT = "The zebra-crossing of Łódź is striped."
EVIDENCE_TEXT = "A zebra-crossing has stripes, in Łódź too."
# Decoding is cheap: further than the other properties go.
often = settings(max_examples=max(200, settings.default.max_examples))
SECRETS = (CLAIM_TEXT, EVIDENCE_TEXT)
PASSWORD = "hunter2"


def keeps_secrets(error: KeepwarmError, *secrets: str) -> bool:
    return not any(secret in str(error) for secret in secrets or SECRETS)


# Whatever JSON can hold, and what it should not.

ODD_NUMBERS = (-1, 0, 2**31, 2**63, 10**30, 10**400, 1e308, -0.0, float("nan"), float("inf"))
ODD_VALUES = st.sampled_from(
    [
        *(None, True, "", " ", "{", "a\0", "\ud800", "x" * 70, "x" * 70_000),
        *([], [[]], {}, {"a": {}}, *ODD_NUMBERS),
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | ODD_VALUES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a tree of JSON."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], dict | list):
            found += places(value[key])
    return found


@st.composite
def changed(draw: st.DrawFn, valid: Any) -> Any:
    """Valid JSON with up to three things replaced, removed, added, or put elsewhere."""
    # Copies: what is drawn may be drawn again.
    tree = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        everywhere = places(tree)
        if not everywhere:
            break
        container, key = draw(st.sampled_from(everywhere))
        match draw(st.sampled_from(["replace", "remove", "add", "move", "secret"])):
            case "replace":
                container[key] = copy.deepcopy(draw(JSON))
            case "remove":
                del container[key]
            case "add" if isinstance(container, dict):
                container[draw(st.text(max_size=8))] = copy.deepcopy(draw(JSON))
            case "secret":
                # As a value. The name of an unknown field is told, on purpose.
                container[key] = draw(st.sampled_from(SECRETS))
            case _:
                other, its_key = draw(st.sampled_from(everywhere))
                container[key] = copy.deepcopy(other.get(its_key) if isinstance(other, dict) else 1)
    return tree


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """Valid bytes with up to three short stretches replaced."""
    body = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(body)))
        body[start : start + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(body)


# Messages.

PROMPT = PromptSpec()
RUN = Run(
    source="claims.jsonl",
    source_digest="src-1",
    context=ContextSpec(model="org/model", engine_arguments=("--seed=1",)),
    prompt=PROMPT,
    limit=10,
    seed=3,
)
CLAIM = Claim(claim_id="c-1", position=0, text=CLAIM_TEXT, evidence=EVIDENCE_TEXT, gold="SUPPORTS")
KEY = bytes(range(16))
POSITIONS = Positions(b"\x01")
ANSWER = Answer("False", (-1.0, -0.5, -3.0))
MESSAGES: tuple[Message, ...] = (
    ClaimBatch(
        schema_version=2,
        run=RUN,
        submission_id="sub-1",
        batch_id="b",
        claims=(CLAIM,),
        proofs=(CLAIM.proof(KEY),),
    ),
    VerdictBatch(
        run_id=RUN.run_id,
        batch_id="b",
        labels=PROMPT.label_names,
        verdicts=(read_verdict(CLAIM, ANSWER, PROMPT, 99),),
        worker_id="node-1",
        device="Tesla T4",
        attempt=1,
        engine_seconds=1.5,
        submission_id="sub-1",
        proofs=(verdict_proof(CLAIM.proof(KEY), CLAIM.evidence),),
    ),
    DeadClaim(
        run_id=RUN.run_id,
        claim=CLAIM,
        reason=DeadReason.ENGINE_FAILED,
        detail="it failed",
        worker_id="node-1",
        attempt=2,
        failures=3,
        submission_id="sub-1",
        proof=CLAIM.proof(KEY),
    ),
    RunAnnouncement(
        run=RUN,
        submission_id="sub-1",
        totals=Totals(lines=6, claims=3, repeated=2, rejected=1),
        proof_key=KEY.hex(),
        digest=str(ClaimsDigest.of([("c-1", 0)])),
        positions=POSITIONS.as_text(),
    ),
    ControlUpdate(
        cancelled=("sub-1",),
        contexts=(
            ContextDemand(
                context=RUN.context, claims_ready=640, claims_in_flight=192, workers_warm=1
            ),
        ),
    ),
    ContextReady(
        startup_id="start-1",
        worker_id="node-1",
        context_id=RUN.context.context_id,
        device="Tesla T4",
        warm=False,
        seconds=61.5,
        phases=StartupPhases(load=9.5, total=60.0),
    ),
    WorkerHeartbeat(
        worker_id="node-1",
        context_id=RUN.context.context_id,
        device="Tesla T4",
        state="serving",
        claims_per_second=12.5,
    ),
)
KINDS = [type(message) for message in MESSAGES]
every_kind = pytest.mark.parametrize("message", MESSAGES, ids=[kind.wire_type for kind in KINDS])

HEADERS = st.dictionaries(
    st.sampled_from(
        [
            *("x-delivery-count", "x-death"),
            *(topology.FAILURES_HEADER, topology.REASON_HEADER, topology.ORIGIN_HEADER),
            *(topology.DECLINED_HEADER, topology.WAITED_HEADER),
        ]
    )
    | st.text(max_size=10),
    JSON | st.binary(max_size=10),
    max_size=4,
)


def delivery(body: bytes, kind: str, headers: dict[str, Any], content_type: str) -> Delivery:
    return Delivery(
        "claims.x", body, headers, "m", False, 1, 1, content_type=content_type, kind=kind
    )


def test_every_kind_of_message_is_driven() -> None:
    assert set(KINDS) == set(Message.__subclasses__())


def decoded(kind: type[Message], made: Delivery) -> None:
    try:
        assert type(made.message(kind)) is kind
    except (MessageInvalid, MessageTooNew) as error:
        assert keeps_secrets(error)
        assert len(str(error)) < 2_000
        aside = made.as_dead_message(str(error), lambda: None)
        assert len(aside.headers[topology.REASON_HEADER]) <= 1_000


@every_kind
@often
@given(data=st.data())
def test_arbitrary_bytes_of_an_arbitrary_kind_are_a_message_or_invalid(
    message: Message, data: st.DataObject
) -> None:
    kind = st.sampled_from([kind.wire_type for kind in KINDS]) | st.text(max_size=300)
    content_type = st.just(CONTENT_TYPE) | st.text(max_size=300)
    body = st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode())
    decoded(
        type(message),
        delivery(data.draw(body), data.draw(kind), data.draw(HEADERS), data.draw(content_type)),
    )


@every_kind
@often
@given(data=st.data())
def test_a_message_with_something_changed_is_a_message_or_invalid_and_tells_no_claim(
    message: Message, data: st.DataObject
) -> None:
    tree = message.model_dump(mode="json")
    body = changed(tree).map(lambda value: json.dumps(value).encode()) | damaged(encode(message))
    decoded(type(message), delivery(data.draw(body), message.wire_type, {}, CONTENT_TYPE))


@often
@given(headers=HEADERS)
@example(headers={"x-delivery-count": "many"})
@example(headers={"x-delivery-count": -5})
@example(headers={"x-delivery-count": 10**30})
@example(headers={"x-death": "x"})
@example(headers={"x-death": [[]]})
@example(headers={"x-death": {"queue": "q"}})
def test_whatever_the_headers_are_a_delivery_can_be_looked_at(headers: dict[str, Any]) -> None:
    made = delivery(b"", "", headers, "")
    assert 1 <= made.attempt < 2**31
    assert isinstance(origin(made), str)
    assert isinstance(reason(made), str)
    try:
        assert 0 <= made.failures < 2**31
        assert 0 <= made.waited_seconds < 2**31
        assert all(isinstance(entry, str) for entry in made.declined)
    except MessageInvalid as error:
        assert "its header keepwarm-" in str(error)


# What an engine says.

KEYS = ("token_id:1", "token_id:2", "token_id:3")
EVENT = {
    "id": "cmpl-1",
    "choices": [
        {
            "index": 0,
            "text": "True",
            "finish_reason": "length",
            "logprobs": {"top_logprobs": [dict.fromkeys(KEYS, -1.5)]},
        }
    ],
}


@often
@given(data=st.text(max_size=200) | JSON.map(json.dumps) | changed(EVENT).map(json.dumps))
def test_any_reply_of_an_engine_is_a_verdict_or_no_answer_or_a_failed_request(data: str) -> None:
    try:
        choices = _choices(data.encode())
    except EngineRequestError as error:
        assert len(str(error)) < 2_000
        return
    for choice in choices:
        answer = _answer(choice, KEYS)
        if answer is not None:
            assert isinstance(read_verdict(CLAIM, answer, PROMPT, 1), Verdict)


@often
@given(
    scores=st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 3),
    text=st.text(max_size=2_000),
)
@example(scores=(1e308, -1e308, 1e308), text="")
def test_any_three_numbers_and_any_text_are_a_verdict(scores: tuple[float, ...], text: str) -> None:
    assert isinstance(read_verdict(CLAIM, Answer(text, scores), PROMPT, 1), Verdict)


# Files of claims.

ROW = {
    "id": 7,
    "claim": CLAIM_TEXT,
    "evidence": [EVIDENCE_TEXT, "More."],
    "label": "SUPPORTS",
    "verifiable": None,
}
NAMES = st.sampled_from(["id", "unique_id", "claim", "evidence", "label", "gold_label", "text", ""])
ROWS = st.dictionaries(NAMES | st.text(max_size=5), JSON, max_size=5)
COLUMNS = st.none() | st.dictionaries(
    st.sampled_from(["id", "claim", "evidence", "label"]), NAMES, max_size=3
)


def parsed(content: bytes, format: Any, columns: dict[str, str] | None) -> None:
    try:
        source = Source(
            [io.BytesIO(content)], "claims", format, claim_column=(columns or {}).get("claim")
        )
    except InputError as error:
        # A header that has no claim is told as it is written.
        assert format == "csv" or keeps_secrets(error)
        return
    with source:
        parse_all(source, columns)


def parse_all(source: Source, columns: dict[str, str] | None) -> None:
    parser = Parser("claims", PROMPT, columns=columns)
    for line in source.records():
        found = parser.parse(line)
        if isinstance(found, Rejection):
            assert not any(secret in found.reason + found.next_step for secret in SECRETS)
            assert len(found.content) <= 500
            assert found.model_dump_json()
        else:
            claims = tuple(reading.claim for reading in found)
            assert encode(ClaimBatch(run=RUN, submission_id="s", batch_id="b", claims=claims))


def json_lines(rows: list[Any]) -> bytes:
    return b"\n".join(json.dumps(row).encode() for row in rows)


@often
@given(
    content=st.binary(max_size=200)
    | st.lists(ROWS | changed({**ROW, "label": "MAYBE"}) | JSON, max_size=4).map(json_lines)
    | damaged(json.dumps(ROW).encode()),
    columns=COLUMNS,
)
@example(content=b'{"claim": "C.", "id": ' + b"9" * 5_000 + b"}", columns=None)
@example(content=b'{"claim": "C.", "id": ' + b"9" * 5_000 + b"}", columns={"claim": "claim"})
@example(content=b"[" * 100_000, columns=None)
def test_whatever_a_line_of_json_is_it_is_a_claim_or_rejected(
    content: bytes, columns: dict[str, str] | None
) -> None:
    parsed(content, "jsonl", columns)


CELLS = st.sampled_from(["C.", CLAIM_TEXT, "", '"', '"a\nb"', "\0", "SUPPORTS", "caf\udce9", ","])


@often
@given(
    content=st.binary(max_size=200)
    | st.lists(
        st.lists(NAMES | CELLS | st.text(max_size=6), max_size=5).map(",".join), max_size=5
    ).map(lambda rows: "\r\n".join(rows).encode("utf-8", errors="surrogatepass"))
    | damaged(f'id,claim,label\n1,"{CLAIM_TEXT}",SUPPORTS\n2,C.,NEI\n'.encode()),
    columns=COLUMNS,
)
def test_whatever_a_line_of_csv_is_it_is_a_claim_or_rejected(
    content: bytes, columns: dict[str, str] | None
) -> None:
    parsed(content, "csv", columns)


# Prompt files.

TAGS = ("int", "float", "bool", "null", "timestamp", "binary", "set", "omap", "pairs", "str")
SCALARS = st.sampled_from(
    [
        *("", "x", "-", "0x", "0b_", "1:1:1", "2001-01-01", "2001-99-99", "~", "*a", "&a b"),
        *("[", "{a: 1}", "'", "<<", "é", "\0", "!!python/object:os.system x"),
        ":".join(["1"] * 400) + ".5",
    ]
)
TAGGED = st.builds(lambda tag, text: f"!!{tag} {text}", st.sampled_from(TAGS), SCALARS)
PROMPT_LINES = st.builds(
    lambda key, value: f"{key}: {value}",
    st.sampled_from([*PromptSpec.model_fields, "<<", "? [a]", "1", "&b", "- c"]),
    SCALARS | TAGGED | st.text(max_size=20),
)
VALID_PROMPT = {
    **PROMPT.model_dump(mode="json"),
    "examples": [{"claim": CLAIM_TEXT, "evidence": EVIDENCE_TEXT, "label": "SUPPORTS"}],
}


def dumped(tree: Any) -> bytes:
    return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", errors="surrogatepass")


@pytest.fixture(scope="module")
def prompt_file() -> Any:
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory) / "prompt.yaml"


@often
@given(
    content=st.binary(max_size=200)
    | st.lists(PROMPT_LINES, max_size=4).map(lambda lines: "\n".join(lines).encode())
    | changed(VALID_PROMPT).map(dumped)
    | damaged(dumped(VALID_PROMPT))
)
@example(content=b"name: !!timestamp x")
@example(content=b"name: !!bool x")
@example(content=b"name: !!int ''")
@example(content=b"name: " + b":".join([b"1"] * 400) + b".5")
@example(content=b"a: &a [*a, *a]\nexamples: *a")
def test_whatever_a_prompt_file_holds_is_a_prompt_or_an_input_error(
    content: bytes, prompt_file: Path
) -> None:
    prompt_file.write_bytes(content)
    try:
        assert isinstance(read_prompt(prompt_file), PromptSpec)
    except InputError as error:
        assert str(prompt_file) in str(error)


# Settings and addresses.

# What an environment can hold: no NUL; bytes that are not UTF-8 come as lone surrogates.
ENVIRONMENT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0") | st.just("\udcff"),
    max_size=40,
)
VALUES = ENVIRONMENT | st.sampled_from(
    [
        *("", " ", "0", "-1", "1e3", "inf", "nan", "1_000", "9" * 5_000, "true", "{}", "[1]"),
        *("~", "~x", "~no-such-user/x", "/", ".", "/" + "x" * 5_000, "amqp://h", "json", "DEBUG"),
    ]
)


@often
@given(
    values=st.dictionaries(st.sampled_from(sorted(Settings.model_fields)), VALUES, max_size=4),
    password=st.booleans(),
)
def test_whatever_the_environment_holds_is_settings_or_a_usage_error(
    values: dict[str, str], password: bool
) -> None:
    variables = {f"KEEPWARM_{name.upper()}": value for name, value in values.items()}
    if password:
        variables["KEEPWARM_BROKER_PASSWORD"] = PASSWORD
    with patch.dict(os.environ, variables):
        try:
            found = load_settings()
        except UsageError as error:
            assert str(error).startswith(("KEEPWARM_", "settings: "))
            assert keeps_secrets(error, PASSWORD)
            return
    assert PASSWORD not in repr(found)
    assert found.store


PARTS = st.sampled_from(
    [
        *("amqp", "amqps", "http", "://", ":", "@", "/", "//", "%2f", "%", "%ff", "[", "]"),
        *("[::1]", "h", "5672", "99999", "-1", "u", "?", "#", " ", "é", "\udcff", "xn--", "."),
        "a" * 300,
    ]
)
URLS = (
    ENVIRONMENT
    | st.lists(PARTS, max_size=10).map("".join)
    | st.lists(PARTS, max_size=6).map(lambda parts: "amqp://" + "".join(parts))
    | st.lists(PARTS, max_size=6).map(lambda parts: "amqps://u:hunter2@h" + "".join(parts))
)


def addressed(url: str) -> BrokerAddress:
    return BrokerAddress.from_settings(load_settings(broker_url=url))


@often
@given(url=URLS)
def test_whatever_a_brokers_url_is_it_is_an_address_or_a_usage_error(url: str) -> None:
    uses: tuple[Callable[[str], object], ...] = (check_broker_url, addressed)
    for use in uses:
        try:
            found = use(url)
        except UsageError as error:
            assert keeps_secrets(error, PASSWORD)
        else:
            if isinstance(found, BrokerAddress):
                assert 0 <= found.port < 2**16
                assert found.host and found.user and found.virtual_host
                assert PASSWORD not in f"{found} {found!r}"
