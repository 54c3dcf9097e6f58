"""The rows of Parquet and Arrow files."""

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

from services.contracts.errors import InputError

_BATCH_ROWS = 1_000


def table_rows(file: IO[bytes], name: str, kind: str) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet or Arrow file as Python values, a bounded number in memory.

    Where the file's metadata name the classes of a column, names replace the numbers. Binary values
    are text in UTF-8, as Parquet files without annotations of their columns have it.
    Raises InputError when the file is damaged.
    """
    pa = _pyarrow(name)
    try:
        for schema, batches in _tables(pa, file, kind):
            features = _features(schema.metadata)
            binary = {field.name for field in schema if "binary" in str(field.type)}
            for batch in batches:
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                        for key in binary:
                            row[key] = _decoded(row[key])
                        yield {key: _named(value, features.get(key)) for key, value in row.items()}
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{name} is a damaged {kind} file ({error}); fetch it again") from error


def _tables(pa: Any, file: IO[bytes], kind: str) -> Iterator[tuple[Any, Iterable[Any]]]:
    """The schema and the record batches of each table: one, or as many as there are Arrow streams
    in the file (`cat` of two streams is a file with two, each with a schema of its own).
    """
    file.seek(0)
    if kind == "parquet":
        import pyarrow.parquet as pq

        table = pq.ParquetFile(file)
        yield table.schema_arrow, table.iter_batches(_BATCH_ROWS)
    elif file.read(6) == b"ARROW1":
        file.seek(0)
        reader = pa.ipc.open_file(file)
        yield reader.schema, (reader.get_batch(n) for n in range(reader.num_record_batches))
    else:
        file.seek(0)
        while True:
            reader = pa.ipc.open_stream(file)
            yield reader.schema, reader
            if not file.read(1):
                return
            file.seek(-1, io.SEEK_CUR)


def _decoded(value: Any) -> Any:
    """The value with bytes as text, at any depth. Bytes that are not UTF-8 become lone surrogates,
    which the claims parser rejects.
    """
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="surrogateescape")
    if isinstance(value, dict):
        return {key: _decoded(part) for key, part in value.items()}
    return [_decoded(part) for part in value] if isinstance(value, list) else value


def _pyarrow(name: str):  # type: ignore[no-untyped-def]  # noqa: ANN202  (a module)
    # A third of a second of imports, needed for these files alone.
    try:
        import pyarrow as pa
        import pyarrow.ipc
    except ImportError as error:
        raise InputError(
            f"{name} needs pyarrow, which is not installed here; install keepwarm[producer]"
        ) from error
    return pa


def _features(metadata: Mapping[bytes, bytes] | None) -> Mapping[str, Any]:
    """What Hugging Face's `datasets` noted of the columns."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _named(value: Any, feature: Any) -> Any:
    """The value with class numbers replaced by the classes' names, at any depth."""
    if isinstance(feature, list):
        feature = feature[0] if feature else None
        return [_named(part, feature) for part in value] if isinstance(value, list) else value
    if not isinstance(feature, dict) or value is None:
        return value
    if feature.get("_type") == "ClassLabel":
        names: Sequence[str] = feature.get("names") or ()
        known = isinstance(value, int) and 0 <= value < len(names)
        return names[value] if known else value
    if feature.get("_type") in ("Sequence", "List", "LargeList"):
        inner = feature.get("feature")
        if isinstance(value, dict):  # a sequence of objects is kept as an object of lists
            inner = inner if isinstance(inner, dict) else {}
            return {k: [_named(v, inner.get(k)) for v in vs or ()] for k, vs in value.items()}
        return [_named(part, inner) for part in value] if isinstance(value, list) else value
    if "_type" not in feature and isinstance(value, dict):
        return {key: _named(part, feature.get(key)) for key, part in value.items()}
    return value
