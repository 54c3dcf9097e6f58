import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts import Claim, Label, PromptSpec
from services.contracts.errors import InputError
from services.producer import (
    ClaimsFile,
    Rejection,
    Selection,
    Source,
    read_prompt,
)
from services.producer.parse import Parser
from services.producer.seen import Duplicate, Seen
from services.producer.source import Record

PROMPT = PromptSpec()


def parsed(
    content: bytes,
    columns: dict[str, str] | None = None,
    *,
    format: str = "jsonl",
    prompt: PromptSpec = PROMPT,
) -> list[Claim | Rejection]:
    source = Source(
        [io.BytesIO(content)],
        "claims.jsonl",
        format,  # type: ignore[arg-type]
        claim_column=(columns or {}).get("claim"),
    )
    parser = Parser("claims.jsonl", prompt, columns=columns)
    with source:
        return [parse(parser, line) for line in source.records()]


def parse(parser: Parser, record: Record) -> Claim | Rejection:
    found = parser.parse(record)
    if isinstance(found, Rejection):
        return found
    (reading,) = found
    return reading.claim


def one(row: object, columns: dict[str, str] | None = None, **how: Any) -> Claim | Rejection:
    (result,) = parsed(json.dumps(row).encode(), columns, **how)
    return result


# The file of bad lines.

QUOTES = "write it as text: in JSON in quotes, in a table as a column of text"
LEAVE_OUT = "give it some text, or leave the line out"
BLANK = "remove NUL characters, and give it more than white space"
BAD_LINES: dict[int, tuple[str | None, str, str]] = {
    2: (None, "Invalid JSON: EOF", "write one JSON object per line, in UTF-8"),
    3: (None, "Input should be an object", "write an object, like {"),
    5: ("claim", "Field required", "every line needs a `claim`"),
    6: ("claim", "it is blank", LEAVE_OUT),
    7: ("claim", "it is blank", BLANK),
    8: ("claim", "Input should be a valid string", QUOTES),
    9: ("evidence", "Input should be a valid string", QUOTES),
    12: (None, "the line is not UTF-8", "save the file as UTF-8"),
    13: ("claim", "it contains a NUL character", "remove NUL characters"),
    14: ("claim", "String should have at most 8192 characters", "shorten it, or split the claim"),
    17: ("id", "Input should be a valid string", QUOTES),
}
GOOD_LINES = {
    1: "bad-01",
    10: "bad-10",
    4: "bad-02",
    11: "bad-11",
    15: "bad-02",
    16: "bad-01",
    18: "bad-16",
}


@pytest.mark.parametrize(
    ("row", "next_step"),
    [
        ({"version": 1, "data": [{"claim": "Ice is cold."}]}, "inside 'data'.*jq -c '.data\\[\\]'"),
        ({"0": {"claim": "Ice is cold."}}, "inside '0'.*jq -c '.\\[\\]' FILE"),
        ({"claim": {"0": "Ice is cold."}}, "orient='records'"),
    ],
)
def test_an_object_around_the_records_is_rejected_with_the_way_to_unpack_it(
    row: object, next_step: str
) -> None:
    rejection = one(row)
    assert isinstance(rejection, Rejection)
    assert re.search(next_step, rejection.next_step)


@pytest.fixture(scope="module")
def bad_lines(repository: Path) -> dict[int, Claim | Rejection]:
    prompt = read_prompt(repository / "samples" / "prompt.yaml")
    with Source.open(str(repository / "samples" / "bad_lines.jsonl")) as source:
        parser = Parser(source.name, prompt)
        return {record.line: parse(parser, record) for record in source.records()}


def test_every_line_of_the_bad_file_is_accounted_for(
    bad_lines: dict[int, Claim | Rejection],
) -> None:
    assert bad_lines.keys() == BAD_LINES.keys() | GOOD_LINES.keys()


@pytest.mark.parametrize("number", BAD_LINES)
def test_a_bad_line_is_rejected_with_field_reason_and_next_step(
    number: int, bad_lines: dict[int, Claim | Rejection], repository: Path
) -> None:
    field, reason, next_step = BAD_LINES[number]
    rejection = bad_lines[number]
    assert isinstance(rejection, Rejection)
    assert rejection.field == field
    assert rejection.reason.startswith(reason)
    assert rejection.next_step.startswith(next_step)
    assert rejection.line == number
    assert rejection.source == str(repository / "samples" / "bad_lines.jsonl")
    line = (repository / "samples" / "bad_lines.jsonl").read_bytes().split(b"\n")[number - 1]
    assert rejection.content == line.decode(errors="replace")[:500]


@pytest.mark.parametrize("number", GOOD_LINES)
def test_a_good_line_among_bad_ones_is_a_claim(
    number: int, bad_lines: dict[int, Claim | Rejection]
) -> None:
    claim = bad_lines[number]
    assert isinstance(claim, Claim)
    assert (claim.claim_id, claim.position) == (GOOD_LINES[number], number - 1)


# The files that people have.


def test_a_line_of_fever_is_a_claim_without_evidence_text() -> None:
    claim = one(
        {
            "id": 75397,
            "verifiable": "VERIFIABLE",
            "label": "SUPPORTS",
            "claim": "Nikolaj Coster-Waldau worked with the Fox Broadcasting Company.",
            "evidence": [[[92206, 104971, "Nikolaj_Coster-Waldau", 7]]],
        }
    )
    assert claim == Claim(
        claim_id="75397",
        position=0,
        text="Nikolaj Coster-Waldau worked with the Fox Broadcasting Company.",
        gold="SUPPORTS",
    )


def test_a_line_of_fever_symmetric_is_a_claim_with_evidence() -> None:
    claim = one(
        {
            "id": "54253",
            "claim": "Daggering is a genre.",
            "evidence": "It is of recent origin.",
            "sentence1": "It is of recent origin.",
            "sentence2": "Daggering is a genre.",
            "gold_label": "REFUTES",
            "label": "REFUTES",
            "evid": [["It is of recent origin.", 1.0]],
        }
    )
    assert claim == Claim(
        claim_id="54253",
        position=0,
        text="Daggering is a genre.",
        evidence="It is of recent origin.",
        gold="REFUTES",
    )


def test_older_names_of_fever_symmetric_are_known() -> None:
    claim = one({"id": 1, "claim": "C.", "evidence_sentence": "E.", "gold_label": "SUPPORTS"})
    assert claim == Claim(claim_id="1", position=0, text="C.", evidence="E.", gold="SUPPORTS")


def test_a_line_of_vitamin_c_is_a_claim() -> None:
    claim = one(
        {
            "unique_id": "5ec2a7c8_1",
            "case_id": "5ec2a7c8",
            "wiki_revision_id": 12345,
            "claim": "C.",
            "evidence": "E.",
            "label": "NOT ENOUGH INFO",
            "page": "P",
            "revision_type": "real",
        }
    )
    assert claim == Claim(
        claim_id="5ec2a7c8_1", position=0, text="C.", evidence="E.", gold="NOT ENOUGH INFO"
    )


def test_the_lines_at_hand_of_the_real_sets_all_parse(repository: Path) -> None:
    data = repository.parent / "shared" / "data" / "fever_symmetric_dev.jsonl"
    if not data.is_file():
        pytest.skip("the real claims are not on this machine")
    with Source.open(str(data)) as source:
        parser = Parser(source.name, PROMPT)
        claims = [parse(parser, line) for line in source.records()]
    assert len(claims) == 708
    assert all(isinstance(claim, Claim) and claim.evidence and claim.gold for claim in claims)


@pytest.mark.parametrize(
    ("evidence", "text"),
    [
        ("E.", "E."),
        ("", None),
        (None, None),
        ([], None),
        (["One.", "Two."], "One. Two."),
        ([[[1, 2, "Page", 3]]], None),
    ],
)
def test_evidence_may_be_a_text_or_a_list_of_texts(evidence: object, text: str | None) -> None:
    claim = one({"claim": "C.", "evidence": evidence})
    assert isinstance(claim, Claim)
    assert claim.evidence == text


# Identities.


@pytest.mark.parametrize(
    ("given", "claim_id"), [("x", "x"), (7, "7"), (0, "0"), (-3, "-3"), (10**20, str(10**20))]
)
@pytest.mark.parametrize("name", ["id", "unique_id", "claim_id"])
def test_an_id_is_kept_as_text(name: str, given: object, claim_id: str) -> None:
    claim = one({name: given, "claim": "C."})
    assert isinstance(claim, Claim)
    assert claim.claim_id == claim_id


@pytest.mark.parametrize("given", [True, 1.5, [1], {"a": 1}, "  ", "i" * 257, "a\0b"])
def test_what_cannot_be_an_id_is_rejected(given: object) -> None:
    rejection = one({"id": given, "claim": "C."})
    assert isinstance(rejection, Rejection)
    assert rejection.field == "id"


@pytest.mark.parametrize("row", [{}, {"id": None}, {"id": ""}])
def test_a_claim_without_an_id_has_one_by_its_content(row: dict[str, Any]) -> None:
    claim = one({**row, "claim": "C."})
    assert isinstance(claim, Claim)
    assert claim.claim_id == "c-058f6e99718b5666"


def test_an_id_by_content_depends_on_claim_and_evidence_and_on_nothing_else() -> None:
    rows = [
        {"claim": "C."},
        {"claim": "C.", "label": "SUPPORTS"},
        {"claim": "C.", "evidence": ""},
        {"claim": "C.", "evidence": "E."},
        {"claim": "D."},
        {"claim": "C.E."},
    ]
    ids = [one(row).claim_id for row in rows]  # type: ignore[union-attr]
    assert ids[0] == ids[1] == ids[2]
    assert len(set(ids)) == 4


# Labels.


@pytest.mark.parametrize(
    ("label", "gold"),
    [
        ("SUPPORTS", "SUPPORTS"),
        ("supported", "SUPPORTS"),
        ("Refuted", "REFUTES"),
        ("not_enough-info", "NOT ENOUGH INFO"),
        ("NEI", "NOT ENOUGH INFO"),
        ("", None),
        (None, None),
    ],
)
def test_a_label_is_known_by_its_spellings(label: str | None, gold: str | None) -> None:
    claim = one({"claim": "C.", "label": label})
    assert isinstance(claim, Claim)
    assert claim.gold == gold


def test_the_prompt_decides_which_labels_there_are() -> None:
    prompt = PromptSpec(
        name="mine", labels=(Label(name="YES", word="yes"), Label(name="NO", word="no"))
    )
    known, unknown = (
        one({"claim": "C.", "label": label}, prompt=prompt) for label in ("yes", "NEI")
    )
    assert isinstance(known, Claim)
    assert isinstance(unknown, Claim)
    assert (known.gold, unknown.gold) == ("YES", None)


# Columns.


def test_columns_may_have_other_names() -> None:
    row = {"nr": 5, "statement": "C.", "context": "E.", "truth": "REFUTES", "claim": "not this"}
    columns = {"id": "nr", "claim": "statement", "evidence": "context", "label": "truth"}
    assert one(row, columns) == Claim(
        claim_id="5", position=0, text="C.", evidence="E.", gold="REFUTES"
    )


def test_a_line_without_the_named_column_is_rejected() -> None:
    rejection = one({"claim": "not this"}, {"claim": "statement"})
    assert isinstance(rejection, Rejection)
    assert (rejection.field, rejection.reason) == ("claim", "Field required")


@pytest.mark.parametrize("content", [b"5\n", b"[]\n", b"{\n", b'"x"\n', b'{"a": "\xff"}\n'])
def test_a_bad_line_is_as_bad_with_named_columns(content: bytes) -> None:
    (with_columns,) = parsed(content, {"claim": "statement"})
    (without,) = parsed(content)
    assert isinstance(with_columns, Rejection)
    assert with_columns == without


def test_keys_that_look_like_methods_are_only_keys() -> None:
    row = {"model_dump": 1, "model_config": 2, "__class__": 3, "statement": "C."}
    assert isinstance(one(row, {"claim": "statement"}), Claim)


def test_csv_columns_are_found_by_the_header() -> None:
    content = "id,claim,evidence,label\n1,Łódź?,E.,NEI\n,D.,,\n".encode()
    assert parsed(content, format="csv") == [
        Claim(claim_id="1", position=0, text="Łódź?", evidence="E.", gold="NOT ENOUGH INFO"),
        Claim(claim_id="c-0066ab2671907170", position=1, text="D."),
    ]


def test_csv_columns_may_have_other_names() -> None:
    content = b"nr,statement\n5,C.\n"
    assert parsed(content, {"id": "nr", "claim": "statement"}, format="csv") == [
        Claim(claim_id="5", position=0, text="C.")
    ]


def opened(content: bytes, columns: dict[str, str] | None = None) -> ClaimsFile:
    columns = columns or {}
    source = Source([io.BytesIO(content)], "claims.csv", "csv", claim_column=columns.get("claim"))
    return ClaimsFile(source, PROMPT, Selection(columns=columns))


def test_csv_without_a_column_for_claims_is_refused_with_what_there_is() -> None:
    with pytest.raises(InputError) as refused:
        opened(b"id,text\n1,C.\n")
    assert str(refused.value) == (
        "claims.csv, line 1: no column is called 'claim'; the columns are 'id', 'text'. "
        "Name the one that holds it with --column claim=NAME. If this line is a claim already and "
        "the file has no header, number the columns instead: --column claim=1 --column label=2"
    )


def test_a_named_column_that_the_csv_does_not_have_is_refused() -> None:
    with pytest.raises(InputError, match="line 1: there is no column 'text' for evidence; .*'id'"):
        opened(b"id,claim\n1,C.\n", {"evidence": "text"})


def test_a_field_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError, match="--column verdict=…: there is no such field; .* label"):
        opened(b"claim\nC.\n", {"verdict": "x"})


def test_two_columns_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="line 1: two columns have the name 'claim'; rename one"):
        opened(b"id,claim,claim\n1,a,b\n")


def test_an_empty_csv_has_no_columns() -> None:
    with pytest.raises(InputError, match="the columns are none"):
        opened(b"")


def test_unused_csv_columns_are_reported() -> None:
    found = opened(b"id,claim,author,gold_label,source\n1,C.,a,,s\n", {"evidence": "source"})
    found.inspect()
    assert found.ignored_keys == ("author",)


@pytest.mark.parametrize(
    ("row", "field", "reason", "next_step"),
    [
        (b"1,", "claim", "it is blank", LEAVE_OUT),
        (b'1," "', "claim", "it is blank", BLANK),
        (b"1,a\0b", "claim", "it contains a NUL character", BLANK),
        (b"1,caf\xe9", "claim", "Input should be a valid string", "save the file as UTF-8"),
        (b"1", None, "it has 1 fields; the header has 2", "correct the line, or leave it out"),
        (b"\xff,x", "id", "Input should be a valid string", "save the file as UTF-8"),
    ],
)
def test_a_bad_csv_row_is_rejected(
    row: bytes, field: str | None, reason: str, next_step: str
) -> None:
    rejection, good = parsed(b"id,claim\n" + row + b"\n2,good\n", format="csv")
    assert isinstance(rejection, Rejection)
    assert isinstance(good, Claim)
    assert (rejection.line, rejection.field) == (2, field)
    assert rejection.next_step.startswith(next_step)
    assert rejection.reason.startswith(reason)


# Rejections.


def test_a_rejection_shows_the_beginning_of_its_line() -> None:
    (rejection,) = parsed(b'{"claim": 5, "x": "' + b"y" * 2_000 + b'"}\r\n')
    assert isinstance(rejection, Rejection)
    assert rejection.content.startswith('{"claim": 5')
    assert len(rejection.content) == 500


def test_a_rejection_does_not_show_the_end_of_the_line() -> None:
    (rejection,) = parsed(b"nonsense\r\n")
    assert isinstance(rejection, Rejection)
    assert rejection.content == "nonsense"


def test_a_contradicted_claim_is_rejected_by_its_id() -> None:
    source = Source([io.BytesIO(b'{"id": "a", "claim": "C."}\n')], "claims.jsonl", "jsonl")
    (line,) = source.records()
    rejecting = Parser("claims.jsonl", PROMPT)
    claim = parse(rejecting, line)
    assert isinstance(claim, Claim)
    rejection = rejecting.contradiction(line, Seen(Duplicate.OTHER_TEXT, claim, 4))
    assert (rejection.line, rejection.field) == (1, "id")
    assert rejection.reason == "record 5 of the file has the id 'a' for another claim"
    assert rejection.next_step == "give it another id, or none"


def test_a_claim_with_two_labels_is_rejected_by_its_label() -> None:
    content = b'{"claim": "C.", "label": "SUPPORTS"}\n{"claim": "C.", "label": "REFUTES"}\n'
    rejections: list[Rejection] = []
    with Source([io.BytesIO(content)], "claims.jsonl", "jsonl") as source:
        ClaimsFile(source, PROMPT).inspect(rejections.append)
    (rejection,) = rejections
    assert (rejection.line, rejection.field) == (2, "label")
    assert (
        rejection.reason
        == "record 1 of the file has the same claim and evidence with another label"
    )
    assert rejection.next_step == "keep the record with the right label"


@given(st.binary(max_size=200))
def test_any_bytes_are_claims_or_rejections(content: bytes) -> None:
    for result in parsed(content):
        assert isinstance(result, Claim | Rejection)
    for result in parsed(b"claim,label\n" + content, format="csv"):
        assert isinstance(result, Claim | Rejection)
        result.model_dump_json()


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(
    st.dictionaries(
        st.sampled_from(["id", "claim", "evidence", "label", "unique_id", "x"]), ANY_JSON
    ),
    st.sampled_from([None, {"claim": "x"}]),
)
def test_any_object_is_a_claim_or_a_rejection(
    row: dict[str, object], columns: dict[str, str] | None
) -> None:
    result = one(row, columns)
    if isinstance(result, Rejection):
        assert result.reason
        assert result.next_step
        json.loads(result.model_dump_json())
