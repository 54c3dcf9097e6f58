"""The fingerprint of a directory of weights, by content.

Files are read whole, because a fine-tuned model may differ only in a few layers in the middle of a
file. The digest of a large file is cached under its device, inode, size and times of change.
"""

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from services.contracts.errors import UsageError
from services.node.runtime_dir import open_private_dir

_WHOLE_FILE_BYTES = 4 * 1024 * 1024
_SAMPLE_BYTES = 1024 * 1024
_READ_BYTES = 8 * 1024 * 1024
_READERS = 4
_PROGRESS_SECONDS = 0.5
# A file that changed less than this ago may change again within the resolution of its timestamps.
_SETTLED_SECONDS = 3.0
_DIGEST = re.compile(r"[0-9a-f]{64}")

ProgressCallback = Callable[[int, int], None]
"""Called several times a second with the bytes read and the bytes in all. An exception that it
raises ends the reading.
"""


def fingerprint(directory: Path, cache_dir: Path | None, on_progress: ProgressCallback) -> str:
    """A digest of the names, sizes and contents of a directory's files, except hidden ones. Raises
    OSError.

    Digests of files over 4 MiB are cached in `cache_dir`, if that is not None.
    """
    files = _files(directory)
    large = [path for path in files if files[path] > _WHOLE_FILE_BYTES]
    digests = _digests(large, cache_dir, on_progress)
    return _combined(directory, files, lambda path: [bytes.fromhex(digests[path])])


def sampled_fingerprint(directory: Path) -> str:
    """The fingerprint of older versions, which read only the first and the last MiB of files over
    4 MiB. Their runs still name it. Raises OSError.
    """

    def ends(path: Path) -> Iterator[bytes]:
        with path.open("rb") as file:
            yield file.read(_SAMPLE_BYTES)
            file.seek(-_SAMPLE_BYTES, os.SEEK_END)
            yield file.read()

    return _combined(directory, _files(directory), ends)


def _files(directory: Path) -> dict[Path, int]:
    """The sizes of all files except hidden ones, in order of their paths."""
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path: path.stat().st_size
        for path in found
        if not any(part.startswith(".") for part in path.relative_to(directory).parts)
    }


def _combined(
    directory: Path,
    files: dict[Path, int],
    of_large: Callable[[Path], Iterator[bytes] | list[bytes]],
) -> str:
    combined = hashlib.blake2b(digest_size=8)
    for path, size in files.items():
        combined.update(f"{path.relative_to(directory)}\0{size}\0".encode())
        for part in [path.read_bytes()] if size <= _WHOLE_FILE_BYTES else of_large(path):
            combined.update(part)
    return f"files-{combined.hexdigest()}"


def _digests(
    files: list[Path], cache_dir: Path | None, on_progress: ProgressCallback
) -> dict[Path, str]:
    """The BLAKE2b digest of each file."""
    digest_dir = _digest_directory(cache_dir) if files else None
    cached = {path: _cached_digest(digest_dir, path) for path in files}
    known = {path: each for path, each in cached.items() if each is not None}
    unknown = [path for path in files if path not in known]
    if not unknown:
        return known
    total = sum(path.stat().st_size for path in unknown)
    read = dict.fromkeys(unknown, 0)
    stop = threading.Event()

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            content = hashlib.blake2b(digest_size=32)
            while chunk := file.read(_READ_BYTES):
                if stop.is_set():
                    break
                content.update(chunk)
                read[path] += len(chunk)
            if not stop.is_set() and _key(os.fstat(file.fileno())) == _key(before):
                _cache_digest(digest_dir, before, content.hexdigest())
        return content.hexdigest()

    with ThreadPoolExecutor(_READERS, thread_name_prefix="weights") as pool:
        futures = {path: pool.submit(digest, path) for path in unknown}
        try:
            while wait(futures.values(), timeout=_PROGRESS_SECONDS).not_done:
                on_progress(sum(read.values()), total)
        finally:
            stop.set()
    return known | {path: future.result() for path, future in futures.items()}


def _digest_directory(cache_dir: Path | None) -> Path | None:
    """The directory of cached digests; None if it cannot be written, or other users could."""
    if cache_dir is None:
        return None
    with contextlib.suppress(UsageError):
        open_private_dir(cache_dir, "KEEPWARM_CACHE_DIR")
        return open_private_dir(cache_dir / "digests", "KEEPWARM_CACHE_DIR")
    return None


def _key(status: os.stat_result) -> str:
    # mtime can be set by a program, as copying tools do; ctime cannot.
    times = f"{status.st_mtime_ns}-{status.st_ctime_ns}"
    return f"{status.st_dev}-{status.st_ino}-{status.st_size}-{times}"


def _cached_digest(digest_dir: Path | None, path: Path) -> str | None:
    if digest_dir is None:
        return None
    try:
        digest = (digest_dir / _key(path.stat())).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    return digest if _DIGEST.fullmatch(digest) else None


def _cache_digest(digest_dir: Path | None, status: os.stat_result, digest: str) -> None:
    """Cache a digest and remove the file's older ones. On a full disk nothing is cached."""
    changed = max(status.st_mtime, status.st_ctime)
    if digest_dir is None or time.time() - changed < _SETTLED_SECONDS:
        return
    new = digest_dir / f".{os.getpid()}-{threading.get_ident()}"
    with contextlib.suppress(OSError):
        for earlier in digest_dir.glob(f"{status.st_dev}-{status.st_ino}-*"):
            earlier.unlink(missing_ok=True)
        new.write_text(digest, encoding="ascii")
        new.replace(digest_dir / _key(status))
