"""The real tokenizers, which fail with a text that says how. An interpreter that finds this file
first runs a worker with a fault in it.
"""

import ctypes
import importlib.machinery
import importlib.util
import os
import sys
import time
from pathlib import Path

_elsewhere = [place for place in sys.path if Path(place).resolve() != Path(__file__).parent]
_spec = importlib.machinery.PathFinder.find_spec("tokenizers", _elsewhere)
assert _spec is not None and _spec.loader is not None
_real = importlib.util.module_from_spec(_spec)
sys.modules["tokenizers"] = _real
_spec.loader.exec_module(_real)
_encode = _real.Tokenizer.encode_batch_fast


class PanicException(BaseException):
    """As PyO3 raises it."""


def _fail(text: str) -> None:
    if "PLEASE RAISE" in text:
        raise RuntimeError("the tokenizer was told to raise")
    if "PLEASE PANIC" in text:
        raise PanicException("the tokenizer was told to panic")
    if "PLEASE CRASH" in text:
        ctypes.string_at(0)
    if "PLEASE ABORT" in text:
        os.abort()
    if "PLEASE HANG" in text:
        time.sleep(3_600)


def encode_batch_fast(tokenizer, texts, **how):
    for text in texts:
        _fail(text)
    return _encode(tokenizer, texts, **how)


_real.Tokenizer.encode_batch_fast = encode_batch_fast
