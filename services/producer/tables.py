"""Parquet files, Arrow files, and directories as Hugging Face's libraries and Spark write them."""

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from services.contracts.errors import InputError

_BATCH_ROWS = 1_000
_SUFFIXES = (".parquet", ".arrow")
# Where `datasets` and the hub put the files of splits; they use no deeper directories.
_PATTERNS = ("*", "*/*", "*/*/*")
# `train-00000-of-00002.parquet` and `data-00000-of-00001.arrow` are parts of one table.
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})")
# So are all files of a directory that are called so by the hub, by Spark, Dask and pyarrow.
_PART = re.compile(r"\d+|part[-.](?:[rm]-)?\d+.*")
_TEXT_PART = re.compile(r"part-(?:[rm]-)?\d+[^.]*(\.c\d+)?(\.(json|jsonl|csv|tsv|txt))?(\.\w+)?")


def dataset_files(directory: Path, split: str | None) -> list[Path]:
    """The files of one split of a dataset's directory, in order: Parquet or Arrow files, or the
    parts that Spark wrote as text.

    Raises InputError when there is none, when there are several splits and none is named, or when
    a part of the split is missing.
    """
    files = sorted(
        (
            path
            for pattern in _PATTERNS
            for path in directory.glob(pattern)
            if path.is_file()
            and not path.name.startswith("cache-")  # `datasets` keeps results of map() there
            and not any(part.startswith((".", "_")) for part in path.relative_to(directory).parts)
        ),
        key=_in_order,
    )
    found = [path for path in files if path.suffix in _SUFFIXES]
    found = found or [path for path in files if _TEXT_PART.fullmatch(path.name)]
    if not found:
        raise InputError(
            f"{directory} is a directory without Parquet or Arrow files; name a file of claims in "
            "it, or a directory that `datasets` or Spark saved"
        )
    splits: dict[str, list[Path]] = {}
    for path in found:
        splits.setdefault(_split_of(path, directory), []).append(path)
    if split is None and len(splits) == 1:
        (split,) = splits
    if split not in splits:
        listed = ", ".join(sorted(splits))
        what = "has several splits" if split is None else f"has no split {split!r}"
        raise InputError(f"{directory} {what}; name one of them with --split: {listed}")
    _require_all_parts(splits[split], directory)
    return splits[split]


def _in_order(path: Path) -> list[str | int]:
    """`part.2` is before `part.10`."""
    return [int(n) if n.isdecimal() else n for n in re.split(r"(\d+)", str(path))]


def _split_of(path: Path, directory: Path) -> str:
    """`data/train-00000-of-00001.parquet` and `train/0000.parquet` -> train;
    `test/data-00000-of-00001.arrow` -> test.
    """
    shard = _SHARD.match(path.stem)
    name = shard[1] if shard else "" if _PART.fullmatch(path.stem) else path.stem
    folders = path.relative_to(directory).parent.parts
    parts = [part for part in (*folders, name) if part not in ("", "data")]
    return "/".join(parts) or name or directory.name


def _require_all_parts(files: Sequence[Path], directory: Path) -> None:
    """Raises InputError where the names say that there are more parts than files."""
    parts: dict[tuple[Path, str, int], set[int]] = {}
    numbered: dict[Path, set[int]] = {}
    for path in files:
        if shard := _SHARD.fullmatch(path.stem):
            table = (path.parent, shard[1], int(shard[3]))
            parts.setdefault(table, set()).add(int(shard[2]))
        elif path.stem.isdecimal():
            numbered.setdefault(path.parent, set()).add(int(path.stem))
    parts |= {(folder, "", max(found) + 1): found for folder, found in numbered.items()}
    for (folder, name, total), found in parts.items():
        if missing := sorted(set(range(total)) - found):
            what = f"{folder.name}/{name}".rstrip("/")
            raise InputError(
                f"{directory}: of the {total:,} parts of {what} {len(missing):,} are missing, the "
                f"first is number {missing[0]:05d}; download the directory again"
            )


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
