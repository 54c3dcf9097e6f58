"""What a file may be, whatever its name: delimited text, JSON in any form, Parquet, compressed."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import example, given
from hypothesis import strategies as st

from services.contracts import Claim, PromptSpec
from services.contracts.bounds import MAX_LINE_BYTES
from services.contracts.errors import InputError
from services.contracts.runs import InputSummary
from services.producer import ClaimsFile, Rejection, Selection, Source

PROMPT = PromptSpec()
FROZE = "The harbour froze in 1963."
ROWS = [
    {"id": "1", "claim": FROZE, "label": "SUPPORTS"},
    {"id": "2", "claim": "It, is; deep|er.", "label": "REFUTES"},
]


def write(directory: Path, content: bytes | str, name: str = "claims") -> Path:
    path = directory / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, **columns: str) -> list[Claim]:
    return judged(path, **columns)[1]


def judged(path: Path, **columns: str) -> tuple[InputSummary, list[Claim], list[Rejection]]:
    rejections: list[Rejection] = []
    with Source.open(str(path), claim_column=columns.get("claim")) as source:
        file = ClaimsFile(source, PROMPT, Selection(columns=columns))
        summary = file.inspect(rejections.append)
        claims = list(file)
    return summary, claims, rejections


def texts(path: Path, **columns: str) -> list[str]:
    return [claim.text for claim in read(path, **columns)]


def delimited(delimiter: str, **how: Any) -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, **how)
    writer.writerow(["id", "claim", "label"])
    writer.writerows([row.values() for row in ROWS])
    return out.getvalue()


# Delimited text.


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_delimited_text_is_read_whatever_its_dialect(
    delimiter: str, quoting: int, end: str, mark: str, tmp_path: Path
) -> None:
    content = mark + delimited(delimiter, quoting=quoting, lineterminator=end)
    claims = read(write(tmp_path, content))
    assert [(c.claim_id, c.text, c.gold) for c in claims] == [tuple(r.values()) for r in ROWS]


@pytest.mark.parametrize("rest", ["", '2,"It is\r\rdeep"\r', '2,"It is\nnever cl'])
def test_a_line_end_in_a_cell_does_not_hide_that_lines_end_in_cr(rest: str, tmp_path: Path) -> None:
    path = write(tmp_path, f'id,claim\r1,"It ""froze""\nin 1963."\r3,B.\r{rest}')
    assert texts(path)[:2] == ['It "froze"\nin 1963.', "B."]


@pytest.mark.parametrize("sep", ["sep", "SEP"])
def test_a_line_that_names_the_separator_is_believed(sep: str, tmp_path: Path) -> None:
    claims = read(write(tmp_path, f"{sep}=;\r\nclaim;label\r\nIt froze, in 1963.;SUPPORTS\r\n"))
    assert [(c.text, c.gold) for c in claims] == [("It froze, in 1963.", "SUPPORTS")]


@pytest.mark.parametrize("header", [" Claim , Gold Label ", "CLAIM,gold-label", "Claim,GOLD_LABEL"])
def test_a_header_may_have_spaces_and_capitals(header: str, tmp_path: Path) -> None:
    (claim,) = read(write(tmp_path, f"{header}\n{FROZE},SUPPORTS\n"))
    assert (claim.text, claim.gold) == (FROZE, "SUPPORTS")


def test_columns_that_are_empty_to_the_end_of_the_sheet_are_none(tmp_path: Path) -> None:
    path = write(tmp_path, f"claim,label,,,\n{FROZE},SUPPORTS,,,\n,,,,\nB.,REFUTES,,,\n")
    summary, claims, _ = judged(path)
    assert [c.text for c in claims] == [FROZE, "B."]
    assert summary.records == 2


def test_spaces_before_a_quote_are_no_part_of_a_field(tmp_path: Path) -> None:
    path = write(tmp_path, 'id, claim, label\n1, "It froze, in 1963.", SUPPORTS\n')
    (claim,) = read(path)
    assert (claim.claim_id, claim.text, claim.gold) == ("1", "It froze, in 1963.", "SUPPORTS")


def test_a_column_without_a_delimiter_is_a_column(tmp_path: Path) -> None:
    path = write(tmp_path, "claim\nIt froze, in 1963.\nIt is; deep.\n")
    assert texts(path) == ["It froze, in 1963.", "It is; deep."]


def test_a_file_without_a_header_is_reported_with_the_way_to_number_its_columns(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, f"{FROZE},SUPPORTS\nIt is deep.,REFUTES\n", "mine.csv")
    with pytest.raises(InputError) as refused:
        read(path)
    assert str(refused.value) == (
        f"{path}, line 1: no column is called 'claim'; the columns are '{FROZE}', 'SUPPORTS'. Name "
        "the one that holds it with --column claim=NAME. If this line is a claim already and the "
        "file has no header, number the columns instead: --column claim=1 --column label=2"
    )
    claims = read(path, claim="1", label="2")
    assert [(c.text, c.gold, c.position) for c in claims] == [
        (FROZE, "SUPPORTS", 0),
        ("It is deep.", "REFUTES", 1),
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_header_is_no_claim_when_columns_are_numbered(encoding: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"Nr, Text ,Label\n1,{FROZE},SUPPORTS\n".encode(encoding))
    with pytest.raises(InputError, match="a header: 'Nr', 'Text ', 'Label'.*--column claim='Text'"):
        read(path, claim="2", label="3")


def test_a_record_with_the_name_of_a_column_in_it_is_a_claim(tmp_path: Path) -> None:
    path = write(tmp_path, f"{FROZE},gold\nIt is deep.,gold\n")
    assert texts(path, claim="1") == [FROZE, "It is deep."]


def test_lines_of_plain_text_are_claims_when_their_column_is_numbered(tmp_path: Path) -> None:
    path = write(tmp_path, "The harbour froze, they say.\nIt is deep.\n", "mine.txt")
    assert texts(path, claim="1") == ["The harbour froze, they say.", "It is deep."]


def test_a_number_in_the_first_record_is_no_header_but_a_record_of_numbers_is(
    tmp_path: Path,
) -> None:
    assert texts(write(tmp_path, f"2,{FROZE},SUPPORTS\n3,It is deep.,\n"), claim="2") == [
        FROZE,
        "It is deep.",
    ]
    assert texts(write(tmp_path, f"0,1,2\na,{FROZE},SUPPORTS\n"), claim="1") == [FROZE]


def test_a_first_record_without_a_header_may_have_an_escaped_quote(tmp_path: Path) -> None:
    path = write(tmp_path, '1,"It \\"froze\\", they say.",SUPPORTS\n2,It is deep.,\n')
    assert texts(path, claim="2") == ['It "froze", they say.', "It is deep."]


SPARK = (
    'claim,label\n"He said \\"the harbour froze\\" twice",SUPPORTS\n'
    '"He said \\"no\\" and\nthen left",SUPPORTS\nPlain.,REFUTES\n'
)


def test_quotes_escaped_by_a_backslash_are_read_and_no_half_record_is_a_claim(
    tmp_path: Path,
) -> None:
    assert texts(write(tmp_path, SPARK)) == [
        'He said "the harbour froze" twice',
        'He said "no" and\nthen left',
        "Plain.",
    ]


def test_a_quote_that_is_escaped_late_in_the_file_decides_all_the_same(tmp_path: Path) -> None:
    head = "claim,label\n" + "".join(f"Claim {n}.,SUPPORTS\n" for n in range(5_000))
    assert len(read(write(tmp_path, head + SPARK.partition("\n")[2]))) == 5_003


def test_a_backslash_at_a_quotes_end_is_only_a_backslash(tmp_path: Path) -> None:
    path = write(tmp_path, 'claim,label\n"It lies in C:\\",SUPPORTS\n"He said ""no""",REFUTES\n')
    assert texts(path) == ["It lies in C:\\", 'He said "no"']


def test_a_null_of_a_database_is_no_text(tmp_path: Path) -> None:
    path = write(tmp_path, 'claim,evidence,label\n"He said \\"no\\".",\\N,SUPPORTS\n')
    (claim,) = read(path)
    assert (claim.text, claim.evidence, claim.gold) == ('He said "no".', None, "SUPPORTS")


def test_a_databases_export_with_tabs_is_read(tmp_path: Path) -> None:
    content = (
        "claim\tevidence\tlabel\n"
        'He said \\"no\\"\\tand left\t\\N\tSUPPORTS\n'
        "Two\\\nlines\tA \\\\ backslash\tREFUTES\n"
    )
    claims = read(write(tmp_path, content))
    assert [(c.text, c.evidence) for c in claims] == [
        ('He said "no"\tand left', None),
        ("Two\nlines", "A \\ backslash"),
    ]


def test_a_stray_quote_swallows_no_records(tmp_path: Path) -> None:
    lines = [f"{n}\tClaim {n}.\tSUPPORTS" for n in range(9)]
    lines[2] = '2\t"Claim 2.\tSUPPORTS'
    lines[6] = '6\tClaim "6".\tREFUTES'
    summary, claims, rejections = judged(write(tmp_path, "id\tclaim\tlabel\n" + "\n".join(lines)))
    assert [claim.claim_id for claim in claims] == [str(n) for n in range(9)]
    assert claims[2].text == '"Claim 2.'
    assert (summary.records, rejections) == (9, [])


def test_a_stray_quote_that_another_one_closes_joins_no_records(tmp_path: Path) -> None:
    path = write(tmp_path, 'id\tclaim\tlabel\n1\t"One.\tSUPPORTS\n2\tTwo."\tREFUTES\n')
    assert texts(path) == ['"One.', 'Two."']


def test_a_field_with_line_ends_and_tabs_is_read_where_it_is_quoted(tmp_path: Path) -> None:
    path = write(tmp_path, 'claim\tevidence\n"A.\tB.\nC."\t"E.\n\nF."\nD.\tG.\n')
    assert [(c.text, c.evidence) for c in read(path)] == [
        ("A.\tB.\nC.", "E.\n\nF."),
        ("D.", "G."),
    ]


@given(
    st.lists(
        st.tuples(
            st.text(st.sampled_from('ab ,;|\t"\\\n'), min_size=1, max_size=12).filter(str.strip),
            st.sampled_from(["SUPPORTS", "REFUTES"]),
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([",", ";", "|"]),
)
@example([('";\n\\', "SUPPORTS")], ";")
def test_what_the_csv_module_wrote_is_read_or_rejected_and_never_half_a_record(
    rows: list[tuple[str, str]], delimiter: str
) -> None:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(["claim", "label"])
    writer.writerows(rows)
    with Source([io.BytesIO(out.getvalue().encode())], "claims.csv", "csv") as source:
        records = [record for record in source.records() if record.fault is None]
    assert [tuple(record.content.values()) for record in records] == rows  # type: ignore[union-attr]


# JSON.


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_an_array_is_read_with_the_lines_of_its_elements(
    indent: int | None, mark: str, tmp_path: Path
) -> None:
    path = write(tmp_path, mark + json.dumps([*ROWS, {"claim": ""}], indent=indent))
    _, claims, (rejection,) = judged(path)
    assert [c.text for c in claims] == [row["claim"] for row in ROWS]
    lines = path.read_text().splitlines()
    opened = [number for number, line in enumerate(lines, 1) if "{" in line]
    assert rejection.line == opened[-1]


def test_objects_one_after_the_other_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, "\n".join(json.dumps(row, indent=2) for row in ROWS))
    assert texts(path) == [row["claim"] for row in ROWS]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('[\n{"claim": "A."},\n{"claim": "B."\n', r"claims, line 4: the JSON is broken here: "),
        ('[\n{"claim": "A."}\n{"claim": "B."}]', r"line 3: .* `,` or `\]` expected, not '\{'"),
        ('[{"claim": "A."}', "line 1: .* the array is not closed"),
        ('[{"claim": "A."}\n]\n[', "line 3: .* something follows the end of the array"),
        ('[{"claim": A}]', "line 1: .*Expecting value"),
        ("[" * 100_000, "line 1: .*(nested too deeply|not closed|broken)"),
        (
            '[{"claim": "' + "x" * 2 * MAX_LINE_BYTES + '"}]',
            "or the value is longer than 1,048,576",
        ),
    ],
)
def test_an_array_that_breaks_is_refused_with_its_line(
    content: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says):
        read(write(tmp_path, content))


@given(
    st.lists(st.fixed_dictionaries({"claim": st.text(max_size=200)}), min_size=1, max_size=20),
    st.sampled_from([None, 1]),
    st.integers(1, 50),
)
def test_an_array_is_split_into_what_was_put_together(
    rows: list[dict[str, str]], indent: int | None, chunk_bytes: int
) -> None:
    from unittest import mock

    content = json.dumps(rows, indent=indent, ensure_ascii=False).encode(errors="replace")
    with (
        mock.patch("services.producer.json_values._CHUNK_BYTES", chunk_bytes),
        Source([io.BytesIO(content)], "claims", "json") as source,
    ):
        found = [json.loads(line.content) for line in source.records()]  # type: ignore[arg-type]
    assert found == json.loads(content)


@pytest.mark.parametrize(
    ("value", "claim_id"),
    [("1.0", "1"), ("7", "7"), ('"7.0"', "7"), ('"v7.0"', "v7.0"), ("NaN", "c-e162ebe581ed56ca")],
)
def test_a_number_is_an_id_and_nan_is_none(value: str, claim_id: str, tmp_path: Path) -> None:
    path = write(
        tmp_path, f'{{"id": {value}, "claim": "{FROZE}", "evidence": NaN, "label": NaN}}\n'
    )
    (claim,) = read(path)
    assert (claim.claim_id, claim.evidence, claim.gold) == (claim_id, None, None)


def test_labels_may_be_numbers_and_booleans(tmp_path: Path) -> None:
    labels = ["0", "1", "1.0", "true", '"0"', "-1", '["SUPPORTS"]']
    rows = [f'{{"id": {n}, "claim": "C.", "label": {label}}}' for n, label in enumerate(labels)]
    prompt = PromptSpec.model_validate(
        {
            "labels": [
                {"name": "NO", "word": "no", "aliases": ["0"]},
                {"name": "YES", "word": "yes", "aliases": ["1", "true"]},
            ]
        }
    )
    with Source.open(str(write(tmp_path, "\n".join(rows)))) as source:
        file = ClaimsFile(source, prompt)
        summary = file.inspect()
        claims = list(file)
    assert [c.gold for c in claims] == ["NO", "YES", "YES", "YES", "NO", None, None]
    assert (summary.unlabelled, summary.kept_back) == (1, 1)
    assert summary.unknown_labels == (('["SUPPORTS"]', 1),)


# Encodings and compression.


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(
    "content", [delimited(","), "\n".join(map(json.dumps, ROWS)), json.dumps(ROWS, indent=1)]
)
def test_utf_16_and_its_like_are_read(encoding: str, content: str, tmp_path: Path) -> None:
    path = write(tmp_path, content.replace("froze", "fröze").encode(encoding))
    assert texts(path) == ["The harbour fröze in 1963.", ROWS[1]["claim"]]


def test_another_encoding_is_read_when_it_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "claim,label\nThe café froze.,SUPPORTS\n".encode("windows-1252"))
    _, claims, (rejection,) = judged(path)
    assert claims == []
    assert "--encoding" in rejection.next_step
    with Source.open(str(path), encoding="windows-1252") as source:
        assert [claim.text for claim in ClaimsFile(source, PROMPT)] == ["The café froze."]


def test_text_that_breaks_the_named_encoding_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path, b"claim\n\xff\n")
    with pytest.raises(InputError, match="is not ASCII throughout .* name its encoding with"):
        Source.open(str(path), encoding="ascii")


def test_a_nul_in_a_line_does_not_make_a_file_utf_16(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"claim": "a\\u0000b"}\n{"claim": "\x00"}\n{"claim": "Good."}\n')
    _, claims, rejections = judged(path)
    assert [c.text for c in claims] == ["Good."]
    assert [r.kind for r in rejections] == ["claim: NUL character", "not JSON"]


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstd.compress,
}


@pytest.mark.parametrize("kind", COMPRESSIONS)
@pytest.mark.parametrize("content", [delimited(";"), json.dumps(ROWS)])
def test_a_compressed_file_is_the_same_run_as_the_file_itself(
    kind: str, content: str, tmp_path: Path
) -> None:
    digests = set()
    for packed in (content.encode(), COMPRESSIONS[kind](content.encode())):
        path = write(tmp_path, packed)
        assert texts(path) == [row["claim"] for row in ROWS]
        with Source.open(str(path)) as source:
            digests.add(ClaimsFile(source, PROMPT).source_digest)
    assert len(digests) == 1


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_a_truncated_compressed_file_is_reported(kind: str, tmp_path: Path) -> None:
    content = "\n".join(
        f'{{"id": {n}, "claim": "Claim {n * 7919 % 10007}."}}' for n in range(9_000)
    )
    packed = COMPRESSIONS[kind](content.encode())
    with pytest.raises(InputError, match=f"its {kind} data (end too early|are damaged)"):
        read(write(tmp_path, packed[: len(packed) // 2]))


@pytest.mark.parametrize("kind", COMPRESSIONS)
@pytest.mark.parametrize("rest", [b"\0" * 8, b"{more}", b"\0" * 8 + b"claim\n" * 500_000])
def test_bytes_after_compressed_data_are_told_unless_they_are_padding(
    kind: str, rest: bytes, tmp_path: Path
) -> None:
    path = write(tmp_path, COMPRESSIONS[kind](delimited(",").encode()) + rest)
    what = rest.lstrip(b"\0")
    if what:
        says = (
            rf"its {kind} data end at byte \d+ and are followed by {len(what):,} bytes that are no"
        )
        with pytest.raises(InputError, match=says):
            read(path)
    else:
        assert len(read(path)) == 2


@pytest.mark.parametrize("kind", COMPRESSIONS)
@pytest.mark.parametrize("padding", [0, 4, 3 << 20])
def test_all_streams_of_a_compressed_file_are_read(kind: str, padding: int, tmp_path: Path) -> None:
    streams = [COMPRESSIONS[kind](f'{{"claim": "Claim {n}."}}\n'.encode()) for n in range(3)]
    path = write(tmp_path, (b"\0" * padding).join(streams))
    assert texts(path) == ["Claim 0.", "Claim 1.", "Claim 2."]


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_a_compressed_table_is_read(kind: str, tmp_path: Path) -> None:
    table = io.BytesIO()
    pq.write_table(pa.table({"claim": [FROZE]}), table)
    assert texts(write(tmp_path, COMPRESSIONS[kind](table.getvalue()))) == [FROZE]


def test_an_archive_is_reported_as_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a ZIP archive; unpack it"):
        read(write(tmp_path, b"PK\3\4" + bytes(100)))


# Parquet, Arrow, and directories of them.

FEATURES = {
    "label": {"names": ["SUPPORTS", "REFUTES"], "_type": "ClassLabel"},
    "claim": {"dtype": "string", "_type": "Value"},
}
TABLE = pa.table(
    {"id": [1, 2, 3], "claim": [FROZE, "B.", None], "label": [0, 1, 0]}
).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": FEATURES}})})


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "arrow file"])
def test_a_table_is_read_with_the_names_of_its_classes(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "claims"
    if kind == "parquet":
        pq.write_table(TABLE, path)
    else:
        new = pa.ipc.new_stream if kind == "arrow stream" else pa.ipc.new_file
        with new(str(path), TABLE.schema) as writer:
            writer.write_table(TABLE)
    summary, claims, (rejection,) = judged(path)
    assert [(c.claim_id, c.text, c.gold) for c in claims] == [
        ("1", FROZE, "SUPPORTS"),
        ("2", "B.", "REFUTES"),
    ]
    assert (rejection.line, rejection.kind, summary.records) == (3, "claim: blank", 3)


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), "binary")]
)
def test_binary_columns_are_text_and_one_that_is_not_utf_8_is_rejected(
    kind: pa.DataType, tmp_path: Path
) -> None:
    values = {
        "id": [b"a", b"b", b"c"],
        "claim": [FROZE.encode(), b"caf\xe9", b"C."],
        "label": [b"SUPPORTS", b"REFUTES", b"\xff"],
    }
    table = pa.table({name: pa.array(column).cast(kind) for name, column in values.items()})
    table = table.append_column("evidence", pa.array([[{"text": b"E."}], None, None]))
    pq.write_table(table, tmp_path / "claims")
    _, claims, rejections = judged(tmp_path / "claims")
    assert [(c.claim_id, c.text, c.evidence, c.gold) for c in claims] == [
        ("a", FROZE, "E.", "SUPPORTS")
    ]
    assert [(r.line, r.kind) for r in rejections] == [
        (2, "claim: string unicode"),
        (3, "label: string unicode"),
    ]


def test_a_label_that_is_not_utf_8_rejects_its_claim(tmp_path: Path) -> None:
    path = write(tmp_path, b"claim,label\nA.,SUPPORTS\nB.,caf\xe9\n")
    _, claims, (rejection,) = judged(path)
    assert [claim.text for claim in claims] == ["A."]
    assert (rejection.line, rejection.kind) == (3, "label: string unicode")


def test_classes_deep_in_a_table_are_named_too() -> None:
    from services.producer.tables import _named

    feature = {
        "_type": "Sequence",
        "feature": {"evidence_label": {"_type": "ClassLabel", "names": ["A", "B"]}},
    }
    assert _named({"evidence_label": [1, None, 9]}, feature) == {"evidence_label": ["B", None, 9]}
    assert _named([{"evidence_label": 0}], [feature["feature"]]) == [{"evidence_label": "A"}]


def test_ids_that_are_decimals_are_read_as_numbers(tmp_path: Path) -> None:
    ids = pa.array([Decimal("12"), Decimal("13.00")], pa.decimal128(10, 2))
    pq.write_table(pa.table({"id": ids, "claim": ["A.", "B."]}), tmp_path / "claims")
    summary, claims, rejections = judged(tmp_path / "claims")
    assert [claim.claim_id for claim in claims] == ["12", "13"]
    assert (summary.numeric_ids, rejections) == (True, [])


def test_a_damaged_table_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a damaged parquet file"):
        read(write(tmp_path, b"PAR1" + bytes(100)))


def test_a_directory_of_one_split_is_read_in_the_order_of_its_parts(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in range(2):
        pq.write_table(
            pa.table({"claim": [f"Part {number}."]}),
            tmp_path / "data" / f"train-0000{number}-of-00002.parquet",
        )
    assert texts(tmp_path) == ["Part 0.", "Part 1."]


def test_a_directory_with_a_missing_part_is_refused_and_names_it(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in (0, 2):
        pq.write_table(
            pa.table({"claim": [f"Part {number}."]}),
            tmp_path / "data" / f"train-0000{number}-of-00004.parquet",
        )
    with pytest.raises(InputError, match="of the 4 parts of data/train 2 are missing, .* 00001"):
        texts(tmp_path)


@pytest.mark.parametrize(
    ("others", "why"),
    [
        (["data-00000-of-00001.parquet"], r"parts of two tables, data-\*-of-00001 and .*of-00002"),
        (["part-00000-0d1e.json"], r"several kinds \(data-00000-of-00002.parquet, part-00000-0d1e"),
        (["more.jsonl"], r"several kinds \(data-00000-of-00002.parquet, more.jsonl\)"),
        (["_temporary/0/part-00000-0d1e.parquet"], "is not complete: it has Spark's .*_temporary"),
        (["label=SUPPORTS/part-00000-0d1e.parquet"], "is partitioned: the values of 'label' are"),
    ],
)
def test_a_directory_whose_files_cannot_all_be_one_table_is_refused(
    tmp_path: Path, others: list[str], why: str
) -> None:
    parts = ["data-00000-of-00002.parquet", "data-00001-of-00002.parquet"]
    if "=" in others[0]:
        parts = []
    for name in parts + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"claim": ["Ice is cold."]}), tmp_path / name)
    with pytest.raises(InputError, match=why):
        texts(tmp_path)


def test_arrow_streams_that_were_put_together_are_all_read(tmp_path: Path) -> None:
    with (tmp_path / "claims.arrow").open("wb") as file:
        for _ in range(3):
            with pa.ipc.new_stream(file, TABLE.schema) as writer:
                writer.write_table(TABLE)
    with Source.open(str(tmp_path / "claims.arrow")) as source:
        assert source.summarize().records == 9


def test_each_arrow_stream_of_a_file_has_its_own_names_of_classes(tmp_path: Path) -> None:
    features = {"label": {"names": ["REFUTES", "SUPPORTS"], "_type": "ClassLabel"}}
    other = TABLE.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    ).slice(0, 1)
    path = tmp_path / "claims"
    with path.open("wb") as file:
        for table in (TABLE.slice(0, 1), other.set_column(0, "id", pa.array([9]))):
            with pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
    _, claims, _ = judged(path)
    assert [(claim.claim_id, claim.gold) for claim in claims] == [
        ("1", "SUPPORTS"),
        ("9", "REFUTES"),
    ]


def test_of_a_directory_of_several_splits_one_must_be_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        with pa.ipc.new_stream(
            str(tmp_path / split / "data-00000-of-00001.arrow"), TABLE.schema
        ) as writer:
            writer.write_table(TABLE)
    with pytest.raises(InputError, match="has several splits; name one of them with --split"):
        read(tmp_path)
    with Source.open(str(tmp_path), split="test") as source:
        assert source.summarize().records == 3
    with pytest.raises(InputError, match="has no split 'dev'; name one of them"):
        Source.open(str(tmp_path), split="dev")


@pytest.mark.parametrize("place", [".", "data", "data/en"])
@pytest.mark.parametrize("mark", ["", "-0123456789abcdef"])
def test_shards_are_one_split_and_caches_are_none(place: str, mark: str, tmp_path: Path) -> None:
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for number in range(2):
        pq.write_table(
            pa.table({"claim": [f"Part {number}."]}),
            tmp_path / place / f"train-0000{number}-of-00002{mark}.parquet",
        )
    (tmp_path / place / "cache-0123456789abcdef.arrow").write_bytes(b"x")
    assert texts(tmp_path) == ["Part 0.", "Part 1."]


SPARK_PART = "part-0000{}-5b1c3f3e-7f65-4c0e-8e6a-2d6f3ad4b2a1-c000.{}"


def test_parts_that_spark_wrote_are_one_table(tmp_path: Path) -> None:
    for number in range(2):
        table = pa.table({"claim": [f"Part {number}."]})
        pq.write_table(table, tmp_path / SPARK_PART.format(number, "snappy.parquet"))
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "_temporary").mkdir()
    (tmp_path / "_temporary" / "0.parquet").write_bytes(b"x")
    assert texts(tmp_path) == ["Part 0.", "Part 1."]


@pytest.mark.parametrize(
    "name",
    [
        "000{}.parquet",  # the hub
        "part.{}.parquet",  # Dask
        "claims-00000000000{}.parquet",  # BigQuery
        "data_{}.parquet",  # DuckDB
        "data_0_{}_0.snappy.parquet",  # Snowflake
        "2024010{}.parquet",
    ],
)
def test_numbered_files_are_one_table(name: str, tmp_path: Path) -> None:
    for number in range(2):
        pq.write_table(pa.table({"claim": [f"Part {number}."]}), tmp_path / name.format(number))
    assert texts(tmp_path) == ["Part 0.", "Part 1."]


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["0001.parquet"], "2 parts of .* 1 are missing, the first is number 00000"),
        (["c-000000000000.parquet", "c-000000000002.parquet"], "3 parts of .*/c 1 are missing"),
    ],
)
def test_a_gap_between_numbered_files_is_a_missing_part(
    names: list[str], missing: str, tmp_path: Path
) -> None:
    for name in names:
        pq.write_table(TABLE, tmp_path / name)
    with pytest.raises(InputError, match=missing):
        texts(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_parts_that_spark_wrote_as_text_are_read_with_a_header_each(
    packed: bool, tmp_path: Path
) -> None:
    contents = {
        "csv": ["claim,label\nA.,SUPPORTS\n", "", "claim,label\nB.,REFUTES\n,REFUTES\n"],
        "json": ['{"claim": "A."}\n', "", '{"claim": "B."}\n{"claim": ""}\n'],
    }
    for kind, parts in contents.items():
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "_SUCCESS").touch()
        for number, content in enumerate(parts):
            name = SPARK_PART.format(number, kind) + ".gz" * packed
            data = gzip.compress(content.encode()) if packed else content.encode()
            (tmp_path / kind / name).write_bytes(data)
            (tmp_path / kind / f".{name}.crc").write_bytes(b"x")
        _, claims, (rejection,) = judged(tmp_path / kind)
        assert [claim.text for claim in claims] == ["A.", "B."]
        assert (rejection.line, claims[1].position) == (5 if kind == "csv" else 3, 1)


def test_parts_with_other_columns_or_of_other_kinds_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "claim,label\nA.,SUPPORTS\n", SPARK_PART.format(0, "csv"))
    other = write(tmp_path, "label,claim\nSUPPORTS,B.\n", SPARK_PART.format(1, "csv"))
    with pytest.raises(InputError, match=f"{other} has other columns .'label', 'claim'. than "):
        texts(tmp_path)
    write(tmp_path, '{"claim": "B."}\n', other.name)
    with pytest.raises(InputError, match=r"has files of several kinds \(csv, jsonl\); name one"):
        texts(tmp_path)


def test_numbered_files_of_the_hub_are_parts_and_their_directories_splits(tmp_path: Path) -> None:
    for split, numbers in {"train": (0, 1), "test": (0,), "dev": (0, 2)}.items():
        (tmp_path / "default" / split).mkdir(parents=True)
        for number in numbers:
            table = pa.table({"claim": [f"{split} {number}."]})
            pq.write_table(table, tmp_path / "default" / split / f"000{number}.parquet")
    assert texts(tmp_path / "default" / "train") == ["train 0.", "train 1."]
    with pytest.raises(InputError, match="--split: default/dev, default/test, default/train"):
        texts(tmp_path)
    with pytest.raises(InputError, match="of the 3 parts of dev 1 are missing, .* 00001"):
        texts(tmp_path / "default" / "dev")
    with Source.open(str(tmp_path / "default"), split="train") as source:
        assert source.summarize().records == 2


def test_parts_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (0, 2, 10):
        pq.write_table(pa.table({"claim": [f"{number}."]}), tmp_path / f"part.{number}.parquet")
    assert texts(tmp_path) == ["0.", "2.", "10."]


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a file: --split chooses among"):
        Source.open(str(write(tmp_path, b'{"claim": "A."}')), split="train")


def test_closed_standard_input_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(InputError, match="standard input is closed; name a file"):
        Source.open("-")


# Evidence, and columns that are named.


@pytest.mark.parametrize(
    "evidence",
    [
        [["Harbour", 3, "In 1963 the harbour was frozen for nine weeks.", 1]],
        [{"text": "In 1963 the harbour was frozen for nine weeks."}],
        [["In 1963 the harbour was frozen for nine weeks."]],
        ["In 1963 the harbour was frozen for nine weeks.", None],
        {"text": "In 1963 the harbour was frozen for nine weeks."},
        {"text": ["In 1963 the harbour was frozen for nine weeks."]},
        [{"evidence": "In 1963 the harbour was frozen for nine weeks.", "entropy": 0.5}],
        [{"sentences": [{"sentence": "In 1963 the harbour was frozen for nine weeks."}]}],
    ],
)
def test_text_at_any_depth_is_evidence(evidence: object, tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({"claim": "C.", "evidence": evidence}))
    (claim,) = read(path)
    assert claim.evidence == "In 1963 the harbour was frozen for nine weeks."


@pytest.mark.parametrize(
    ("evidence", "why"),
    [
        (None, "the record has none"),
        ("", "the record has none"),
        ([], "the record has none"),
        ([["Harbour", 3]], "page references without text"),
        ([["The lord of the Ice (2001 film)", 0], ["Harbour", 2]], "page references without text"),
        ({"url": "https://example.org"}, "no text was found in it"),
        ([None, ""], "no text was found in it"),
    ],
)
def test_a_claim_without_evidence_is_counted_with_its_reason(
    evidence: object, why: str, tmp_path: Path
) -> None:
    summary, claims, _ = judged(write(tmp_path, json.dumps({"claim": "C.", "evidence": evidence})))
    assert claims[0].evidence is None
    assert summary.without_evidence == ((why, 1),)


def test_the_first_field_that_has_evidence_is_taken(tmp_path: Path) -> None:
    rows = [
        {"claim": "A.", "evidence": None, "evidence_text": "E."},
        {"claim": "B.", "evidence": "", "evidence_text": "E."},
        {"claim": "C.", "doc": "E."},
    ]
    claims = read(write(tmp_path, "\n".join(map(json.dumps, rows))))
    assert [c.evidence for c in claims] == ["E."] * 3


def test_a_key_that_no_line_has_is_an_error_that_names_those_that_are_there(tmp_path: Path) -> None:
    rows = [{"id": 1, "claim": "A.", "passage": "E."}] * 3
    path = write(tmp_path, "\n".join(map(json.dumps, rows)), "claims.jsonl")
    with pytest.raises(InputError) as refused:
        read(path, evidence="pasage")
    assert str(refused.value) == (
        f"{path}: no line has the key 'pasage' for evidence; the keys are 'id', 'claim', "
        "'passage'. Correct --column evidence=pasage"
    )


def test_the_column_of_the_labels_is_no_part_of_a_run(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({"claim": "A.", "truth": "SUPPORTS"}))
    digests = set()
    for columns in ({}, {"label": "truth"}):
        with Source.open(str(path)) as source:
            digests.add(ClaimsFile(source, PROMPT, Selection(columns=columns)).source_digest)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("then", "now", "flag"),
    [
        ({}, {"columns": {"evidence": "more"}}, "--column"),
        ({"format": "plain"}, {}, "--format"),
        ({}, {"format": "plain"}, "--format"),
        ({"format": "plain"}, {"corpus": "wiki"}, None),
        ({}, {"corpus": "wiki"}, "--corpus"),
        ({"format": "plain"}, {"format": "plain", "each_evidence": True}, "--each-evidence"),
        ({"columns": {"evidence": "more"}}, {}, None),
    ],
)
def test_the_flag_that_makes_another_run_of_a_file_is_known(
    then: dict[str, Any], now: dict[str, Any], flag: str | None, tmp_path: Path
) -> None:
    row = {"id": 1, "claim": "A.", "evidence": [[[1, 2, "P", 0]]], "more": "F."}
    path = write(tmp_path, json.dumps(row))
    write(tmp_path, '{"id": "P", "lines": "0\\tIn P."}\n', "wiki")
    files = []
    for how in (then, now):
        corpus = {"corpus": tmp_path / how["corpus"]} if "corpus" in how else {}
        with Source.open(str(path)) as source:
            files.append(ClaimsFile(source, PROMPT, Selection(**{**how, **corpus})))
    assert files[1].differing_flag(files[0].source_digest) == flag
