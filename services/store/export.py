"""Exports outcomes to files, in the order of the input."""

import csv
import errno
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, Literal

from sqlalchemy import select

from services.contracts import INVALID
from services.contracts.claims import id_in_file
from services.contracts.errors import StoreError
from services.store.progress import KnownRun
from services.store.schema import deliveries, outcomes
from services.store.store import Store

ExportFormat = Literal["jsonl", "csv", "parquet", "fever"]

_CHUNK_ROWS = 10_000

COLUMNS = (
    "position",
    "claim_id",
    "claim",
    "label",
    "probabilities",
    "gold",
    "mass",
    "raw_text",
    "prompt_tokens",
    "dead_reason",
    "dead_detail",
    "worker_id",
    "device",
    "attempt",
    "engine_seconds",
)
_REASONING_COLUMNS = ("reasoning", "reasoning_tokens")
# Of runs whose prompt reasons first; the others' exports have no such columns.

_STEPS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free disk space, or "),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "fix its permissions, or "),
}
# What a spreadsheet reads as the start of a formula, full-width characters included.
_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")


def export_run(
    store: Store,
    known: KnownRun,
    format: ExportFormat,
    path: Path | None,
    *,
    formulas: bool = False,
) -> int:
    """Write the outcomes of a run, and return the number of rows: to `path` atomically, or to
    standard output if it is None.

    One row per claim, in input order. `probabilities` are by label (columns `p:LABEL` in CSV); a
    dead claim has no label but a `dead_reason`. A run whose prompt reasons first has columns for
    that. `fever` is the FEVER scorer's format:
    `predicted_label` and an empty `predicted_evidence`, one row for each record of the input,
    because the scorer joins by position. Ids are numbers if all of the file's are. In CSV, a text
    that a spreadsheet would read as a formula is prefixed with `'`, unless `formulas` is True.
    Raises StoreError if the file cannot be written.
    """
    prompt = known.run.prompt if known.run else None
    reasoning = _REASONING_COLUMNS if prompt and prompt.reasoning else ()
    rows = _rows(store, known.run_key, reasoning)
    names = [name for name in (*COLUMNS, *reasoning) if name != "probabilities"]
    names += [f"p:{label}" for label in (prompt.label_names if prompt else ())]

    def fever(file: IO[bytes], rows: Rows, _: Sequence[str]) -> int:
        return _write_fever(file, rows, known)

    def csv_file(file: IO[bytes], rows: Rows, names: Sequence[str]) -> int:
        return _write_csv(file, rows, names, formulas=formulas)

    write: Callable[[IO[bytes], Rows, Sequence[str]], int] = {
        "jsonl": _write_jsonl,
        "csv": csv_file,
        "parquet": _write_parquet,
        "fever": fever,
    }[format]
    try:
        with nullcontext(sys.stdout.buffer) if path is None else _replacing(path) as file:
            return write(file, rows, names)
    except OSError as error:
        step = _STEPS.get(error.errno or 0, "")
        raise StoreError(
            f"{path or 'standard output'} cannot be written: {error.strerror}; {step}choose "
            "another path"
        ) from error


def _rows(store: Store, run_key: int, reasoning: Sequence[str]) -> Iterator[dict[str, Any]]:
    query = (
        select(
            outcomes,
            deliveries.c.worker_id,
            deliveries.c.device,
            deliveries.c.attempt,
            deliveries.c.engine_seconds,
        )
        .outerjoin(deliveries, outcomes.c.delivery_key == deliveries.c.delivery_key)
        .where(outcomes.c.run_key == run_key)
        .order_by(outcomes.c.position)
        .execution_options(yield_per=_CHUNK_ROWS)
    )
    with store.transaction() as connection:
        for row in connection.execute(query):
            yield {
                "position": row.position,
                "claim_id": row.claim_id,
                "claim": row.claim,
                "label": row.label,
                "probabilities": json.loads(row.probabilities) if row.probabilities else None,
                "gold": row.gold,
                "mass": row.mass,
                "raw_text": row.raw_text,
                "prompt_tokens": row.prompt_tokens,
                "dead_reason": row.reason,
                "dead_detail": row.detail,
                "worker_id": row.worker_id,
                "device": row.device,
                "attempt": row.attempt,
                "engine_seconds": row.engine_seconds,
                **{name: row._mapping[name] for name in reasoning},
            }


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file that replaces `path` when complete; a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


Rows = Iterator[dict[str, Any]]


def _write_jsonl(file: IO[bytes], rows: Rows, _: Sequence[str]) -> int:
    count = 0
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        count += 1
    return count


def _write_fever(file: IO[bytes], rows: Rows, known: KnownRun) -> int:
    # The scorer joins by position and counts any label but the gold one as wrong. A record without
    # a verdict (a dead claim, a rejected line) has the row INVALID; a repeated one has the verdict
    # of the first, which is before it.
    numeric = known.input is not None and known.input.numeric_ids
    own_ids = known.input is not None and known.input.own_ids > 0
    left_out = dict(known.input.left_out) if known.input is not None else {}
    labels: dict[str | None, str | None] = dict.fromkeys(left_out.values())

    def line(claim_id: str | None, label: str | None) -> bytes:
        if own_ids and claim_id is not None:
            claim_id = id_in_file(claim_id)
        number = numeric and claim_id is not None and claim_id.isdecimal()
        prediction: dict[str, Any] = {
            "id": int(claim_id) if claim_id is not None and number else claim_id,
            "predicted_label": label or INVALID,
            "predicted_evidence": [],
        }
        return json.dumps(prediction, ensure_ascii=False).encode() + b"\n"

    def left_out_line(position: int) -> bytes:
        claim_id = left_out.get(position)
        return line(claim_id, labels.get(claim_id))

    count = 0
    for row in rows:
        if row["position"] < count:
            raise StoreError(
                f"{known.run_id} has several claims for one record of its input (--each-evidence), "
                "but FEVER's scorer needs one row per record; use --format jsonl"
            )
        for gap in range(count, row["position"]):
            file.write(left_out_line(gap))
        file.write(line(row["claim_id"], row["label"]))
        if row["claim_id"] in labels:
            labels[row["claim_id"]] = row["label"]
        count = row["position"] + 1
    for gap in range(count, _records(known)):
        file.write(left_out_line(gap))
    return max(count, _records(known))


def _records(known: KnownRun) -> int:
    """The number of records to export; 0 if the producer did not announce it."""
    if known.input is None or known.run is None:
        return 0
    first_only = known.run.limit is not None and known.run.seed is None
    return min(known.input.records, known.run.limit or 0) if first_only else known.input.records


def _flat(row: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The columns of these names, one for each label's probability among them."""
    scores = {f"p:{label}": score for label, score in (row["probabilities"] or {}).items()}
    return {name: row[name] if name in row else scores.get(name) for name in names}


def _no_formula(value: Any) -> Any:
    """Escape formulas as OWASP advises (CSV Injection); numbers are unchanged."""
    if not isinstance(value, str) or not _FORMULA.match(value) or _NUMBER.fullmatch(value):
        return value
    return f"'{value}"


def _write_csv(file: IO[bytes], rows: Rows, names: Sequence[str], *, formulas: bool) -> int:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    count = 0
    for row in rows:
        flat = _flat(row, names)
        if not formulas:
            flat = {name: _no_formula(value) for name, value in flat.items()}
        writer.writerow(flat)
        count += 1
    text.flush()
    text.detach()
    return count


def _write_parquet(file: IO[bytes], rows: Rows, names: Sequence[str]) -> int:
    # Importing takes a third of a second, and only this function needs it.
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {
        "position": pa.int64(),
        "mass": pa.float64(),
        "prompt_tokens": pa.int32(),
        "reasoning_tokens": pa.int32(),
        "attempt": pa.int32(),
        "engine_seconds": pa.float64(),
    }
    schema = pa.schema(
        [
            (name, types.get(name, pa.float64() if name.startswith("p:") else pa.string()))
            for name in names
        ]
    )
    count = 0
    with pq.ParquetWriter(file, schema) as writer:
        chunk: list[dict[str, Any]] = []
        for row in rows:
            chunk.append(_flat(row, names))
            count += 1
            if len(chunk) == _CHUNK_ROWS:
                writer.write_table(pa.Table.from_pylist(chunk, schema))
                chunk = []
        writer.write_table(pa.Table.from_pylist(chunk, schema))
    return count
