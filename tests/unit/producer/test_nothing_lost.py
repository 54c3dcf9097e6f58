"""Nothing of a file is merged, dropped or misread without a word."""

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.contracts import Claim, Label, PromptSpec
from services.contracts.errors import InputError
from services.contracts.runs import InputSummary
from services.producer import ClaimsFile, Rejection, Selection, Source
from services.producer.fields import WithoutEvidence, evidence_text

LIT = "The lighthouse was lit for the first time in 1874."
TALL = "It is 31 metres tall."
NUMBERS = PromptSpec(
    labels=(
        Label(name="SUPPORTS", word="True", aliases=("1", "2")),
        Label(name="REFUTES", word="False", aliases=("0",)),
    )
)


def read(
    content: str | bytes | list[dict[str, Any]],
    directory: Path,
    prompt: PromptSpec = PromptSpec(),  # noqa: B008
    **selection: Any,
) -> tuple[ClaimsFile, InputSummary, list[Claim], list[Rejection]]:
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path = directory / "claims"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    rejections: list[Rejection] = []
    columns = selection.get("columns", {})
    with Source.open(str(path), claim_column=columns.get("claim")) as source:
        file = ClaimsFile(source, prompt, Selection(**selection))
        return file, file.inspect(rejections.append), list(file), rejections


# Rows of one claim.

FEVER_ROWS = [
    ("1", "A.", "SUPPORTS", "P", "0"),
    ("1", "A.", "SUPPORTS", "Q", "1"),
    ("2", "B.", "REFUTES", "P", "2"),
    ("3", "C.", "NOT ENOUGH INFO", "", "-1"),
]


def csv_of(header: str, columns: range) -> str:
    lines = [",".join(row[n] for n in columns) for row in FEVER_ROWS]
    return "\n".join([header, *lines]) + "\n"


@pytest.mark.parametrize(
    ("content", "how"),
    [
        (csv_of("ID,claim,label,Evidence_Wiki_Url,evidence_sentence_id", range(5)), {}),
        (csv_of("claim,label,evidence_wiki_url,evidence_sentence_id", range(1, 5)), {}),
        (
            csv_of("number,text,label,evidence_wiki_url,evidence_sentence_id", range(5)).replace(
                "text", "claim"
            ),
            {"columns": {"id": "number"}},
        ),
    ],
    ids=["capitals", "no id", "named column"],
)
def test_only_rows_of_the_same_claim_are_merged(
    content: str, how: dict[str, Any], tmp_path: Path
) -> None:
    wiki = tmp_path / "wiki.jsonl"
    wiki.write_text(
        '{"id": "P", "lines": "0\\tIn P zero.\\n2\\tIn P two."}\n'
        '{"id": "Q", "lines": "1\\tIn Q one."}\n'
    )
    _, _, claims, _ = read(content, tmp_path, corpus=wiki, **how)
    assert [(c.text, c.evidence, c.gold) for c in claims] == [
        ("A.", "P: In P zero. Q: In Q one.", "SUPPORTS"),
        ("B.", "P: In P two.", "REFUTES"),
        ("C.", None, "NOT ENOUGH INFO"),
    ]


def test_rows_with_one_id_and_other_claims_are_not_merged(tmp_path: Path) -> None:
    content = csv_of("id,claim,label,evidence_wiki_url,evidence_sentence_id", range(5))
    _, summary, _, _ = read(content.replace("\n2,", "\n1,"), tmp_path)
    assert (summary.claims, dict(summary.rejected)) == (2, {"contradicts an earlier line": 1})


# Labels that are numbers.


@pytest.mark.parametrize("one", [1, 1.0, "1", "1.0", " 1. "])
@pytest.mark.parametrize("zero", [0, 0.0, "0", "0.0"])
def test_a_number_is_the_same_label_as_its_text(one: Any, zero: Any, tmp_path: Path) -> None:
    rows = [{"claim": "A.", "label": one}, {"claim": "B.", "label": zero}]
    assert [c.gold for c in read(rows, tmp_path, NUMBERS)[2]] == ["SUPPORTS", "REFUTES"]
    mapped = read(rows, tmp_path, label_map={"1": "SUPPORTS", "0.0": "REFUTES"})
    assert [c.gold for c in mapped[2]] == ["SUPPORTS", "REFUTES"]


@pytest.mark.parametrize("negative", [-2, -2.0, "-2", "-2.0"])
def test_a_negative_number_is_another_label_than_the_positive(
    negative: Any, tmp_path: Path
) -> None:
    _, summary, claims, _ = read([{"claim": "A.", "label": negative}], tmp_path, NUMBERS)
    assert claims[0].gold is None
    assert summary.unknown_labels == (("-2", 1),)


@pytest.mark.parametrize("minus_one", [-1, -1.0, "-1", "-1.0"])
def test_minus_one_is_no_label_unless_it_is_said_to_be_one(minus_one: Any, tmp_path: Path) -> None:
    rows = [{"claim": "A.", "label": minus_one}]
    _, summary, _, _ = read(rows, tmp_path)
    assert (summary.unlabelled, summary.kept_back) == (1, 1)
    assert read(rows, tmp_path, label_map={"-1": "REFUTES"})[2][0].gold == "REFUTES"
    prompt = PromptSpec(
        labels=(
            Label(name="SUPPORTS", word="True", aliases=("1",)),
            Label(name="REFUTES", word="False", aliases=("-1",)),
        )
    )
    assert read(rows, tmp_path, prompt)[2][0].gold == "REFUTES"


@pytest.mark.parametrize("none", ["", "-1"])
@pytest.mark.parametrize("labels", ["{},SUPPORTS", "SUPPORTS,{}", "{},{},SUPPORTS,SUPPORTS"])
def test_a_label_counts_in_whichever_record_of_a_claim_it_is(
    none: str, labels: str, tmp_path: Path
) -> None:
    rows = [{"claim": "A.", "label": label} for label in labels.format(*[none] * 2).split(",")]
    for n, row in enumerate(rows):
        row |= {"id": "7", "evidence": ["E.", "F."][n % 2 if len(rows) > 2 else 0]}
    _, summary, claims, rejections = read(rows, tmp_path)
    assert {claim.gold for claim in claims} == {"SUPPORTS"}
    assert summary.gold == (("SUPPORTS", len(claims)),)
    assert (summary.repeated, summary.unlabelled, summary.kept_back) == (len(claims), 0, 0)
    assert rejections == []


def test_a_label_that_contradicts_a_late_one_names_the_record_of_that(tmp_path: Path) -> None:
    rows = [{"id": 1, "claim": "A.", "label": label} for label in (None, "SUPPORTS", "REFUTES")]
    _, _, _, (rejection,) = read(rows, tmp_path)
    assert (rejection.line, rejection.reason.partition(" of")[0]) == (3, "record 2")


def test_of_more_late_labels_than_are_kept_the_records_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.producer.claims_file._MAX_LATE_LABELS", 1)
    rows = [{"id": n, "claim": "A."} for n in (1, 2)]
    rows += [{**row, "label": "SUPPORTS"} for row in rows]
    _, summary, claims, (rejection,) = read(rows, tmp_path)
    assert [c.gold for c in claims] == ["SUPPORTS", None]
    assert (summary.repeated, rejection.line) == (1, 4)
    assert rejection.reason == "record 2 of the file has the same claim and evidence with no label"


# Evidence.


@pytest.mark.parametrize(
    "value",
    [
        ["92206", "104971", "Oliver_Reed", "0"],
        [["Oliver_Reed", "7"]],
        "[[[92206, 104971, 'Oliver_Reed', 7], [92206, None, 'Fox', 0]]]",
        '[[1, 2, "Oliver_Reed", 7]]',
        [3, "Oliver_Reed"],
        {"page": "Oliver Reed", "line": 3},
        [{"key": "Oliver Reed", "value": 3}],
    ],
)
def test_references_to_pages_are_no_evidence(value: Any) -> None:
    assert evidence_text(value) == (None, WithoutEvidence.REFERENCES, False)


@pytest.mark.parametrize(
    "value",
    [
        *("[]", "{}", "nan", "NaN", "None", "null", " ", ["nan", "None"]),
        *("NA", "<NA>", "N/A", "\\N", "-"),
    ],
)
def test_text_without_content_is_no_evidence(value: Any) -> None:
    text, without, _ = evidence_text(value)
    assert text is None
    assert without in (WithoutEvidence.NONE, WithoutEvidence.NO_TEXT)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([["Soul_Food_-LRB-film-RRB-", "0", "Soul Food is a film."]], "Soul Food is a film."),
        ([["T", 1, LIT], ["T2", 2, "Tiny bit"]], f"{LIT} Tiny bit"),
        ([{"text": LIT}, {"paragraphs": ["Second."]}], f"{LIT} Second."),
        ({"s1": "Sent one.", "s2": "Sent two."}, "Sent one. Sent two."),
        ({"a": {"b": {"other": "text here."}}}, "text here."),
        ([{"title": "A title", "url": "http://a", "paragraphs": ["p1", "p2"]}], "p1 p2"),
        ('[{"text": "Real evidence."}]', "Real evidence."),
        ("['One.', 'It\\'s two.']", "One. It's two."),
        ("[1] The harbour froze.", "[1] The harbour froze."),
        ("{not json", "{not json"),
        (["1999"], "1999"),
        ([LIT, 0.93], LIT),
        ([["Tiny bit", 0.93], ["Second bit", 0.5]], "Tiny bit Second bit"),
        ({"found": "Tiny bit", "score": 0.5}, "Tiny bit"),
        (["Tiny bit", "Second bit", 5], "Tiny bit Second bit"),
        ([5, "Tiny bit", "Second bit"], "Tiny bit Second bit"),
        ([LIT, "Tiny bit", 3], f"{LIT} Tiny bit"),
        (["T", 3, LIT, 1], LIT),
        ("['One.', nan, None, 'Two.']", "One. Two."),
        ("[array(['One.', 'Two.'], dtype=object)]", "One. Two."),
        ("['One.' 'It\\'s [a] ' nan\n 'nan array(.']", "One. It's [a] nan array(."),
        ("[{'text': 'One.', 'score': np.float64(0.5)}\n {'text': 'Two.'}]", "One. Two."),
        ("array(['One.', 'Two.'],\n      dtype=object)", "One. Two."),
        ("['One.', open('x')]", "['One.', open('x')]"),
    ],
)
def test_all_text_of_evidence_is_used(value: Any, text: str) -> None:
    assert evidence_text(value) == (text, None, False)


def test_text_that_is_not_used_is_counted(tmp_path: Path) -> None:
    caption = "Another caption."
    rows = [
        {"claim": "A.", "evidence": {"title": "T", "text": "Used.", "caption": caption}},
        {"claim": "B.", "evidence": {"text": f"It holds it: {caption}", "caption": caption}},
        {"claim": "C.", "evidence": "Plain."},
        {"claim": "D.", "evidence": {"text_of_it": "A short text", "number": 3, "more": LIT}},
        {"claim": "E.", "evidence": [["Tiny bit", 1.0], [LIT, 0.9]]},
        {"claim": "F.", "evidence": ["A page", 0, "A short text", 1, TALL]},
        {"claim": "G.", "evidence": ["A page", 0, TALL]},
        {"claim": "H.", "evidence": f"['{TALL}'\n 'Second...' ...\n 'Last.']"},
    ]
    _, summary, claims, _ = read(rows, tmp_path)
    assert [c.evidence for c in claims][3:] == [*(LIT, LIT, TALL, TALL, f"{TALL} Second... Last.")]
    assert (claims[0].evidence, summary.evidence_partly_used) == ("Used.", 5)


URL = "https://example.org/harbour"


@pytest.mark.parametrize(
    ("fields", "text", "partly"),
    [
        ({"evidence": URL, "passage": LIT}, LIT, 0),
        ({"evidence": "Oliver_Reed", "doc": LIT}, LIT, 0),
        ({"evidence": LIT, "doc": "Oliver_Reed"}, LIT, 0),
        ({"evidence": 5, "doc": LIT}, LIT, 0),
        ({"evidence": LIT, "document": f"{TALL} {LIT}"}, LIT, 1),
        ({"evidence": [LIT, TALL], "evidence_text": TALL}, f"{LIT} {TALL}", 0),
        ({"evidence": "Oliver_Reed", "doc": "Fox"}, "Oliver_Reed", 0),
        ({"evidence": f"{LIT} {URL}"}, f"{LIT} {URL}", 0),
    ],
)
def test_of_fields_with_evidence_the_first_text_is_used_and_others_are_counted(
    fields: dict[str, Any], text: str, partly: int, tmp_path: Path
) -> None:
    _, summary, (claim,), _ = read([{"claim": "A.", **fields}], tmp_path)
    assert (claim.evidence, summary.evidence_partly_used) == (text, partly)


@pytest.mark.parametrize("value", [URL, f"{URL} {URL}", "http://" * 50_000, [URL], {"text": URL}])
def test_an_address_is_no_evidence(value: Any) -> None:
    assert evidence_text(value) == (None, WithoutEvidence.REFERENCES, False)


@pytest.mark.parametrize("corpus", [None, "none", "page", "half"])
def test_the_text_of_a_record_with_references_is_used_where_no_corpus_has_it(
    corpus: str | None, tmp_path: Path
) -> None:
    pages = {"none": "Q", "page": "P", "half": "P"}
    wiki = tmp_path / "wiki.jsonl"
    wiki.write_text(json.dumps({"id": pages.get(corpus or "", "Q"), "lines": "0\tIn P."}) + "\n")
    references = [[[1, 2, "P", 0]] + [[1, 2, "P", 9]] * (corpus == "half")]
    rows = [
        {"id": 1, "claim": "A.", "evidence": references, "evidence_text": LIT},
        {"id": 2, "claim": "B.", "evidence": references},
    ]
    file, summary, claims, _ = read(rows, tmp_path, corpus=wiki if corpus else None)
    assert file.format.name == "fever"
    found = corpus in ("page", "half")
    assert [c.evidence for c in claims] == (["P: In P."] * 2 if found else [LIT, None])
    # Of the first the text was not used, and of both a half was not found.
    assert summary.evidence_partly_used == {"page": 1, "half": 2}.get(corpus or "", 0)


def test_the_texts_of_all_rows_of_a_claim_are_used(tmp_path: Path) -> None:
    content = "id,claim,evidence,evidence_wiki_url,evidence_sentence_id\n"
    _, _, (claim,), _ = read(f"{content}1,A.,{LIT},P,0\n1,A.,{TALL},Q,1\n", tmp_path)
    assert claim.evidence == f"{LIT} {TALL}"


def test_fever_as_pandas_writes_it_is_fever(tmp_path: Path) -> None:
    content = (
        "id,label,claim,evidence\n1,SUPPORTS,A.,\"[[[1, 2, 'P', 0], [1, None, None, None]]]\"\n"
    )
    file, summary, _, _ = read(content, tmp_path)
    assert file.format.name == "fever"
    assert dict(summary.without_evidence) == {"page references without text": 1}


def test_a_fever_record_with_text_keeps_it(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": n, "claim": f"A{n}.", "evidence": [[[1, 2, "P", 0]]]} for n in range(25)
    ]
    rows.append({"id": 25, "claim": "B.", "evidence": LIT})
    file, _, claims, _ = read(rows, tmp_path)
    assert (file.format.name, claims[-1].evidence) == ("fever", LIT)


def test_a_number_as_evidence_is_rejected_in_every_format(tmp_path: Path) -> None:
    rows = [{"id": n, "claim": f"A{n}.", "evidence": [[[1, 2, "P", n]]]} for n in range(9)]
    rows.append({"id": 9, "claim": "B.", "evidence": 5})
    for format in ("fever", "plain"):
        (rejection,) = read(rows, tmp_path, format=format)[3]
        assert (rejection.line, rejection.kind) == (10, "evidence: string type")


def test_a_named_format_uses_evidence_that_is_text(tmp_path: Path) -> None:
    rows = [{"id": 1, "claim": "A.", "evidence": LIT, "label": "SUPPORTS"}]
    assert read(rows, tmp_path, format="fever")[2][0].evidence == LIT


@pytest.mark.parametrize(("format", "key"), [("averitec", "questions"), ("pubhealth", "main_text")])
def test_a_named_format_that_the_file_is_not_of_is_refused(
    format: str, key: str, tmp_path: Path
) -> None:
    rows = [{"id": 1, "claim": "A.", "evidence": LIT}]
    with pytest.raises(InputError, match=f"no .*'{key}'.*keys are id, claim, evidence"):
        read(rows, tmp_path, format=format)


# Pieces of evidence.


def test_an_object_of_lists_has_pieces(tmp_path: Path) -> None:
    evidences = {"evidence_label": ["SUPPORTS", "REFUTES"], "evidence": ["Ev one.", "Ev two."]}
    rows = [{"claim_id": "0", "claim": "A", "claim_label": 0, "evidences": evidences}]
    _, _, claims, _ = read(rows, tmp_path, each_evidence=True)
    assert [(c.claim_id, c.evidence, c.gold) for c in claims] == [
        ("0#1", "Ev one.", "SUPPORTS"),
        ("0#2", "Ev two.", "REFUTES"),
    ]


def test_pieces_are_those_of_the_named_column(tmp_path: Path) -> None:
    rows = [{"id": 1, "claim": "A", "evidence": "other", "found": ["Ev one.", "Ev two."]}]
    _, _, claims, _ = read(rows, tmp_path, each_evidence=True, columns={"evidence": "found"})
    assert [(c.claim_id, c.evidence) for c in claims] == [("1#1", "Ev one."), ("1#2", "Ev two.")]


def test_each_evidence_for_a_format_without_pieces_is_refused(repository: Path) -> None:
    path = repository / "tests" / "published" / "averitec.json"
    with (
        Source.open(str(path)) as source,
        pytest.raises(InputError, match="--each-evidence does not apply to AVeriTeC"),
    ):
        ClaimsFile(source, PromptSpec(), Selection(each_evidence=True))


# Quotes that are not closed.


@pytest.mark.parametrize(
    ("content", "claims", "line"),
    [
        ('1,a,S\n2,"open,S\n3,c,R\n4,d,R\n5,closed",R\n6,f,S\n', 'a,c,d,closed",f', 3),
        ('1,a,S\n2,"open,S\n3,closed",R\n6,f,S\n', 'a,closed",f', 3),
        ('1,"open,S\n2,b,R\n3,c,R\n4,d ""x"" y,S\n', 'b,c,d ""x"" y', 2),
        ('1,"open,S\n2,b,R\n3,"c, d",R\n4,d,S\n', "b,c, d,d", 2),
        ('1,"open,S\n' + "2,b,R\n" * 3 + '3,"a\nb, c\nd",R\n', "b,a\nb, c\nd", 2),
    ],
    ids=["pair", "pair in a row", "to the end", "to the next quote", "a field of lines follows"],
)
def test_a_stray_quote_costs_its_own_line_alone(
    content: str, claims: str, line: int, tmp_path: Path
) -> None:
    _, _, found, rejections = read("id,claim,label\n" + content, tmp_path)
    assert ",".join(claim.text for claim in found) == claims
    (rejection,) = rejections
    assert (rejection.line, rejection.content) == (line, content.split("\n")[line - 2])
    assert "a quote opens a field here that this line does not close" in rejection.reason


def test_a_stray_quote_in_a_file_larger_than_a_field_costs_its_own_line(tmp_path: Path) -> None:
    lines = [f"{n},claim {n} of the file,SUPPORTS" for n in range(60_000)]
    lines[5_000] = '5000,"claim 5000,SUPPORTS'
    _, summary, claims, rejections = read("id,claim,label\n" + "\n".join(lines), tmp_path)
    assert summary.claims == 59_999
    assert [claim.claim_id for claim in claims[4_999:5_001]] == ["4999", "5001"]
    assert [rejection.line for rejection in rejections] == [5_002]


@pytest.mark.parametrize(
    "text",
    [
        "One, two.\nThree, four, five.\nSix.",
        "In 2010\nit had 10,000 people",
        "- first, with a comma\n- second, with one\n- third, too",
        "a\n\nb",
        'He said ""no, never"" and,\nleft, at last',
    ],
)
@pytest.mark.parametrize("row", ['1,"{}",SUPPORTS', '1,claim,"{}"', '"{}",REFUTES'])
def test_a_field_of_several_lines_is_one_field(row: str, text: str, tmp_path: Path) -> None:
    header = {2: "claim,label", 3: "id,claim,evidence"}[len(row.split(","))]
    _, summary, claims, _ = read(f"{header}\n{row.format(text)}\n", tmp_path)
    assert (summary.claims, summary.rejected) == (1, ())
    assert text.replace('""', '"') in (claims[0].text, claims[0].evidence)


# JSON.


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ('{"claim": "A.", "claim": "B."}', "claim"),
        ('{"claim" : "A.", "label": "SUPPORTS", "label" : "REFUTES"}', "label"),
        ('{"claim": "A.", "evidence": [{"text": "E.", "text": "F."}]}', "text"),
        ('{"claim": "A.", "claim": "A."}', None),
        (
            '{"claim": "He said \\"claim\\": no", "evidence": [{"text": "E."}, {"text": "F."}]}',
            None,
        ),
    ],
)
def test_a_key_with_two_values_rejects_its_record(
    record: str, key: str | None, tmp_path: Path
) -> None:
    _, _, claims, rejections = read(f'{record}\n{{"claim": "Z."}}\n', tmp_path)
    assert claims[-1].text == "Z."
    if key is None:
        assert (len(claims), rejections) == (2, [])
    else:
        assert (rejections[0].line, rejections[0].kind) == (1, "repeated key")
        assert rejections[0].reason == f"the key '{key}' is there twice, with two values"


# Files that were put together.


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("header", ["id,claim,label", "claim, label ,", '"label",claim'])
def test_the_header_of_a_second_file_is_no_claim(header: str, mark: str, tmp_path: Path) -> None:
    row = ",".join({"id": "{}", "claim": "Claim {}."}.get(n, "") for n in header.split(","))
    content = "".join(f"{mark}{header}\n{row}\n".replace("{}", str(n)) for n in range(2))
    _, summary, claims, (rejection,) = read(content, tmp_path)
    assert [claim.text for claim in claims] == ["Claim 0.", "Claim 1."]
    assert summary.rejected == (("repeated header", 1),)
    assert (rejection.line, "two files were put together" in rejection.reason) == (3, True)


def test_the_byte_order_mark_of_a_second_file_is_no_text(tmp_path: Path) -> None:
    content = "".join(f'\ufeff{{"claim": "Claim {n}."}}\n' for n in range(2)) + "\ufeff"
    assert [claim.text for claim in read(content, tmp_path)[2]] == ["Claim 0.", "Claim 1."]


def test_no_record_after_a_header_in_another_order_is_misread(tmp_path: Path) -> None:
    content = "claim,label\nA.,SUPPORTS\nlabel,claim\nREFUTES,B.\nclaim,x\n"
    _, _, claims, rejections = read(content, tmp_path)
    assert [claim.text for claim in claims] == ["A."]
    assert [rejection.line for rejection in rejections] == [3, 4, 5]
    assert {r.reason.partition(" repeats")[0] for r in rejections} == {"line 3"}
    assert "read them one by one" in rejections[-1].reason


def test_a_claim_that_is_called_like_a_column_is_a_claim(tmp_path: Path) -> None:
    assert len(read("claim,label\nlabel,label\nclaim,claim\n", tmp_path)[2]) == 2


# Files that are no text.


def tar_of(content: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        member = tarfile.TarInfo("claims.jsonl")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def zip_of(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, "x")
    return out.getvalue()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_tar_archive_is_not_read_as_claims(
    pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is a tar archive; unpack it"):
        read(pack(tar_of(b'{"claim": "A."}\n' * 4)), tmp_path)


def test_an_office_document_is_distinguished_from_other_archives(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="office document; save it as CSV"):
        read(zip_of("[Content_Types].xml"), tmp_path)
    with pytest.raises(InputError, match="ZIP archive; unpack it"):
        read(zip_of("claims.jsonl"), tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"SQLite format 3\0\x10\0\x01\x01\0@  \0\0",
        b"\x80\x04\x95\x10\0\0\0\0\0\0\0]\x94.",
        gzip.compress(gzip.compress(b'{"claim": "A."}\n')),
    ],
    ids=["sqlite", "pickle", "gzip in gzip"],
)
def test_a_binary_file_is_called_so(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="binary"):
        read(content, tmp_path)


# Corpora.


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "c1", "claim": "A.", "evidence": "B."}',
        '{"id": 1, "claim": "A."}',
        '{"_id": "1", "title": "T", "text": "BEIR."}',
        "PAR1",
    ],
)
def test_a_file_without_pages_is_no_corpus(line: str, tmp_path: Path) -> None:
    (tmp_path / "corpus").write_text(f"{line}\n" * 3)
    rows = [{"id": 1, "claim": "A.", "evidence": [[[1, 2, "P", 0]]]}]
    with pytest.raises(InputError, match=r"corpus is no corpus: .*FEVER's Wikipedia dump"):
        read(rows, tmp_path, corpus=tmp_path / "corpus")


def test_a_compressed_corpus_is_read(tmp_path: Path) -> None:
    wiki = tmp_path / "wiki.jsonl.gz"
    wiki.write_bytes(gzip.compress(b'{"id": "P", "lines": "0\\tIn P."}\n'))
    rows = [{"id": 1, "claim": "A.", "evidence": [[[1, 2, "P", 0]]]}]
    assert read(rows, tmp_path, corpus=wiki)[2][0].evidence == "P: In P."


def test_a_missing_corpus_of_scifact_is_called_by_its_name(tmp_path: Path) -> None:
    rows = [{"id": 1, "claim": "A.", "cited_doc_ids": [1], "evidence": {}}]
    with pytest.raises(InputError, match=r"does not exist; name SciFact's corpus\.jsonl"):
        read(rows, tmp_path, corpus=tmp_path / "none")


# Columns.


@pytest.mark.parametrize("header", ["id,Claim,claim,label", "id,claim,Claim,label"])
def test_of_columns_that_differ_in_case_the_one_with_text_counts(
    header: str, tmp_path: Path
) -> None:
    _, _, claims, _ = read(f"{header}\n1,A.,,SUPPORTS\n2,,B.,REFUTES\n", tmp_path)
    assert [c.text for c in claims] == ["A.", "B."]


@pytest.mark.parametrize("key", ["headline", "outline", "update", "resource", "pipeline"])
def test_a_text_whose_key_only_ends_like_a_names_is_evidence(key: str) -> None:
    text = evidence_text([{key: LIT, "doc_id": "Lighthouses", "pageid": "Harbour"}])
    assert LIT in str(text) and "Lighthouses" not in str(text) and "Harbour" not in str(text)
