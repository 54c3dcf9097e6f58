import hashlib
import io
import os
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts.bounds import MAX_LINE_BYTES
from services.contracts.errors import InputError
from services.producer import Source

BOM = b"\xef\xbb\xbf"
TOO_LONG = "the line is longer than 1,048,576 bytes"


def write(directory: Path, content: bytes, name: str = "claims.jsonl") -> str:
    path = directory / name
    path.write_bytes(content)
    return str(path)


def records(path: str) -> list[tuple[int, int, Any]]:
    with Source.open(path) as source:
        lines = list(source.records())
    assert [line.fault for line in lines] == [None] * len(lines)
    return [(record.line, record.position, record.content) for record in lines]


def contents(path: str) -> list[Any]:
    return [content for _, _, content in records(path)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"a":1}\n{"b":2}\n', [(1, 0, b'{"a":1}\n'), (2, 1, b'{"b":2}\n')]),
        (b'{"a":1}\n{"b":2}', [(1, 0, b'{"a":1}\n'), (2, 1, b'{"b":2}')]),
        (b'{"a":1}\r\n{"b":2}\r\n', [(1, 0, b'{"a":1}\r\n'), (2, 1, b'{"b":2}\r\n')]),
        (BOM + b'{"a":1}\n{"b":2}\n', [(1, 0, b'{"a":1}\n'), (2, 1, b'{"b":2}\n')]),
        (b'\n\n{"a":1}\n \t\r\n{"b":2}\n\n', [(3, 0, b'{"a":1}\n'), (5, 1, b'{"b":2}\n')]),
        (BOM + b'\n{"a":1}\n', [(2, 0, b'{"a":1}\n')]),
        (b"nonsense\n", [(1, 0, b"nonsense\n")]),
    ],
    ids=["plain", "no end of line", "CRLF", "BOM", "blank lines", "BOM and blank", "nonsense"],
)
def test_a_record_is_a_line_that_is_not_blank(
    content: bytes, expected: list[tuple[int, int, bytes]], tmp_path: Path
) -> None:
    assert records(write(tmp_path, content)) == expected


def test_a_source_can_be_read_again_and_again(tmp_path: Path) -> None:
    with Source.open(write(tmp_path, b"1\n2\n3\n")) as source:
        first = list(source.records())
        next(source.records())
        assert list(source.records()) == first


@given(st.lists(st.sampled_from([b"", b" ", b"{}", b"x", b"\xc5\x81", b"\xff"]), max_size=12))
def test_numbers_and_positions_count_on(lines: list[bytes]) -> None:
    source = Source([io.BytesIO(b"\n".join(lines))], "x", "jsonl")
    expected = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    found = list(source.records())
    assert [(record.line, record.content.rstrip(b"\n")) for record in found] == expected
    assert [line.position for line in found] == list(range(len(expected)))


@pytest.mark.parametrize("extra", [1, 2, MAX_LINE_BYTES, 2 * MAX_LINE_BYTES + 17])
@pytest.mark.parametrize("prefix", [b"", BOM], ids=["plain", "BOM"])
def test_a_line_over_the_bound_is_skipped_and_the_next_ones_are_read(
    extra: int, prefix: bytes, tmp_path: Path
) -> None:
    long_line = b"x" * (MAX_LINE_BYTES + extra)
    with Source.open(write(tmp_path, prefix + long_line + b'\n{"a":1}\n{"b":2}')) as source:
        first, *rest = source.records()
        assert source.summarize().records == 3
    assert (first.line, first.position, first.fault) == (1, 0, TOO_LONG)
    assert len(first.content) <= 1_000
    assert [(record.line, record.position, record.content, record.fault) for record in rest] == [
        (2, 1, b'{"a":1}\n', None),
        (3, 2, b'{"b":2}', None),
    ]


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_just_within_the_bound_is_read(end: bytes, tmp_path: Path) -> None:
    line = b"x" * MAX_LINE_BYTES + end
    assert contents(write(tmp_path, b"a\n" + line)) == [b"a\n", line]


def test_a_line_over_the_bound_at_the_end_of_the_file_is_reported(tmp_path: Path) -> None:
    with Source.open(write(tmp_path, b"a\n" + b"x" * (MAX_LINE_BYTES + 1))) as source:
        assert [line.fault for line in source.records()] == [None, TOO_LONG]


# CSV.


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            b"id,claim\n1,One.\n2,Two.\n",
            [(2, 0, {"id": "1", "claim": "One."}), (3, 1, {"id": "2", "claim": "Two."})],
        ),
        (b"id,claim\n1,One.", [(2, 0, {"id": "1", "claim": "One."})]),
        (b"id,claim\r\n1,One.\r\n", [(2, 0, {"id": "1", "claim": "One."})]),
        (BOM + b"id,claim\n1,One.\n", [(2, 0, {"id": "1", "claim": "One."})]),
        (BOM + b'"id","claim"\n1,One.\n', [(2, 0, {"id": "1", "claim": "One."})]),
        (b"id,claim\n\n1,One.\n\n", [(3, 0, {"id": "1", "claim": "One."})]),
        (b'id,claim\n1,"a, ""b"""\n', [(2, 0, {"id": "1", "claim": 'a, "b"'})]),
        (
            b'id,claim\n1,"two\nlines"\n2,b\n',
            [(3, 0, {"id": "1", "claim": "two\nlines"}), (4, 1, {"id": "2", "claim": "b"})],
        ),
        (b'id,claim\r\n1,"two\r\nlines"\r\n', [(3, 0, {"id": "1", "claim": "two\r\nlines"})]),
        (
            "id,claim\n1,Łódź\n".encode(),
            [(2, 0, {"id": "1", "claim": "Łódź"})],
        ),
    ],
    ids=[
        "plain",
        "no end of line",
        "CRLF",
        "BOM",
        "BOM before a quote",
        "blank lines",
        "quotes",
        "newline in quotes",
        "CRLF in quotes",
        "UTF-8",
    ],
)
def test_a_csv_record_has_the_headers_fields(
    content: bytes, expected: list[tuple[int, int, dict[str, str]]], tmp_path: Path
) -> None:
    assert records(write(tmp_path, content, "claims.csv")) == expected


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (b"1", "it has 1 fields; the header has 2"),
        (b"1,a,b", "it has 3 fields; the header has 2"),
        (b"1,a\rb", "new-line character seen in unquoted field"),
    ],
)
def test_a_broken_csv_record_is_reported_and_the_next_one_is_read(
    row: bytes, fault: str, tmp_path: Path
) -> None:
    path = write(tmp_path, b"id,claim\n" + row + b"\n2,good\n", "claims.csv")
    with Source.open(path) as source:
        broken, good = source.records()
    assert broken.fault is not None
    assert broken.fault.startswith(fault)
    assert (broken.line, good.line, good.position) == (2, 3, 1)
    assert (good.content, good.fault) == ({"id": "2", "claim": "good"}, None)


LONG = b"x" * (MAX_LINE_BYTES + 50)


@pytest.mark.parametrize(
    "row",
    [b"1," + LONG, b'1,"' + LONG + b'"', b"1,a\rb" + LONG],
    ids=["unquoted", "quoted", "with a carriage return"],
)
def test_a_csv_record_over_the_bound_is_skipped_without_losing_the_next_ones(
    row: bytes, tmp_path: Path
) -> None:
    path = write(tmp_path, b"id,claim\n" + row + b"\n2,good\n3,good\n", "claims.csv")
    with Source.open(path) as source:
        lines = list(source.records())
    assert lines[0].fault is not None
    good = [line.content for line in lines if line.fault is None]
    assert good == [{"id": "2", "claim": "good"}, {"id": "3", "claim": "good"}]


@pytest.mark.parametrize(
    "row",
    [
        b'1,"begun\n' + LONG + b'"',
        b'1,"begun\n' + LONG + b'\nended"',
        b'1,"' + LONG + b'\nended"',
        b'1,"begun\n' + LONG + b'\nended" badly',
    ],
    ids=["ends it", "is in its middle", "begins it", "is in a broken one"],
)
def test_an_over_long_line_inside_quotes_does_not_lose_the_next_records(
    row: bytes, tmp_path: Path
) -> None:
    path = write(tmp_path, b"id,claim\n" + row + b"\n2,good\n3,good\n", "claims.csv")
    with Source.open(path) as source:
        lines = list(source.records())
    assert lines[0].fault is not None
    good = [line.content for line in lines if line.fault is None]
    assert good == [{"id": "2", "claim": "good"}, {"id": "3", "claim": "good"}]


def test_a_csv_field_over_the_bound_across_many_lines_is_reported(tmp_path: Path) -> None:
    field = b"x" * 999 + b"\n"
    path = write(tmp_path, b'id,claim\n1,"' + field * 1_100 + b'"\n', "claims.csv")
    with Source.open(path) as source:
        assert all(line.fault is not None for line in source.records())


def test_a_quote_that_is_never_closed_is_a_fault_and_not_one_long_claim(tmp_path: Path) -> None:
    path = write(tmp_path, b'id,claim\n1,"an open quote\n2,good\n3,good\n', "claims.csv")
    with Source.open(path) as source:
        lines = list(source.records())
    assert lines[0].fault is not None


def test_the_columns_are_the_headers(tmp_path: Path) -> None:
    path = write(tmp_path, BOM + b'"id","the claim",label\r\n1,2,3\r\n', "claims.csv")
    with Source.open(path, claim_column="the claim") as source:
        assert source.columns == ("id", "the claim", "label")
        assert len(list(source.records())) == 1


@pytest.mark.parametrize(
    ("content", "container"),
    [
        (b"claim\n1\n", "csv"),
        (b'{"claim": "C."}\n', "jsonl"),
        (b'\n{"claim": "C."}', "jsonl"),
        (b'nonsense\n{"claim": "C."}\n', "jsonl"),
        (b'[{"claim": "C."}]', "json"),
        (b'[\n {"claim": "C."}\n]\n', "json"),
        (b'{\n  "claim": "C."\n}\n', "json"),
        (b'["a"]\n["b"]\n', "jsonl"),
    ],
)
@pytest.mark.parametrize("name", ["a", "a.csv", "a.json"])
def test_a_files_format_is_detected_from_its_first_bytes_and_not_its_name(
    content: bytes, container: str, name: str, tmp_path: Path
) -> None:
    with Source.open(write(tmp_path, content, name)) as source:
        assert source.container == container


def test_the_name_decides_where_the_first_bytes_say_nothing(tmp_path: Path) -> None:
    with Source.open(write(tmp_path, b"nonsense\n", "a.jsonl")) as source:
        assert source.container == "jsonl"


def test_a_name_that_is_not_utf_8_is_opened_and_shown_as_well_as_can_be(tmp_path: Path) -> None:
    with Source.open(write(tmp_path, b"1\n", "caf\udce9.jsonl")) as source:
        assert source.summarize().records == 1
        assert source.name.encode().endswith(b"caf?.jsonl")


# What can be wrong with a file.


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl does not exist; check the path"):
        Source.open(str(tmp_path / "none.jsonl"))


def test_a_directory_is_no_file_of_claims(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a directory without Parquet or Arrow files; name a"):
        Source.open(str(tmp_path))


def test_a_path_through_a_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, b"x\n")
    with pytest.raises(InputError, match="cannot be read: Not a directory"):
        Source.open(f"{path}/claims.jsonl")


def test_a_file_that_this_user_may_not_read_is_named(
    open_dir: Path, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    path = write(open_dir, b"{}\n")
    Path(path).chmod(0)
    with unprivileged(), pytest.raises(InputError, match="may not be read by this user"):
        Source.open(path)


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n", BOM], ids=["nothing", "blank", "BOM"])
def test_a_file_without_records_is_empty(content: bytes, tmp_path: Path) -> None:
    with (
        Source.open(write(tmp_path, content)) as source,
        pytest.raises(InputError, match=r"claims\.jsonl is empty; it must have one claim per line"),
    ):
        source.summarize()


@pytest.mark.parametrize("content", [b"", b"id,claim\n", b"id,claim\n\n\n"])
def test_a_csv_file_without_records_is_empty(content: bytes, tmp_path: Path) -> None:
    with (
        Source.open(write(tmp_path, content, "claims.csv")) as source,
        pytest.raises(InputError, match="is empty"),
    ):
        source.summarize()


# Standard input and pipes: they can be read only once, so they are kept.


def test_standard_input_is_summarized_and_then_read(monkeypatch: pytest.MonkeyPatch) -> None:
    content = b'{"a":1}\n{"b":2}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    with Source.open("-") as source:
        assert source.name == "standard input"
        assert source.container == "jsonl"
        assert source.summarize().records == 2
        assert [line.content for line in source.records()] == content.splitlines(keepends=True)


def test_standard_input_may_be_csv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"claim\nOne.\n")))
    with Source.open("-", "csv") as source:
        assert [line.content for line in source.records()] == [{"claim": "One."}]


def test_empty_standard_input_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with Source.open("-") as source, pytest.raises(InputError, match="standard input is empty"):
        source.summarize()


def test_a_named_pipe_is_kept_and_closed(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(b"1\n2\n"))
    writer.start()
    with Source.open(str(pipe), "jsonl") as source:
        assert source.summarize().records == 2
        assert [line.content for line in source.records()] == [b"1\n", b"2\n"]
    writer.join()


def test_standard_input_that_does_not_fit_on_the_disk_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class FullDisk(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1\n")))
    monkeypatch.setattr("tempfile.TemporaryFile", FullDisk)
    with pytest.raises(InputError, match="No space left on device; free some space, or set TMPDIR"):
        Source.open("-")


# The file_summary.


def test_a_summary_counts_the_records_and_digests_every_byte(tmp_path: Path) -> None:
    content = b'\n{"a":1}\n\n{"b":2}'
    with Source.open(write(tmp_path, content)) as source:
        file_summary = source.summarize()
    assert file_summary.records == 2
    assert file_summary.digest == hashlib.blake2b(content, digest_size=16).hexdigest()


def test_the_digest_does_not_depend_on_the_files_name(tmp_path: Path) -> None:
    paths = [write(tmp_path, b"1\n", name) for name in ("a.jsonl", "b.jsonl")]
    with Source.open(paths[0]) as one, Source.open(paths[1]) as other:
        assert one.summarize() == other.summarize()


def test_a_summary_reports_its_progress(tmp_path: Path) -> None:
    progress: list[int] = []
    with Source.open(write(tmp_path, b"1\n" * 250_000)) as source:
        source.summarize(progress.append)
    assert progress == [100_000, 200_000, 250_000]
