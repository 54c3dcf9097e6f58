"""The sentences that claims refer to, looked up in the corpus that belongs to a data set."""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from services.contracts.errors import InputError
from services.contracts.values import content_id
from services.producer.dataset_formats import Reference
from services.producer.files import decompressed, open_file

_SHOW_EVERY = 100_000
_PAGE_KEYS = frozenset(("lines", "abstract"))
_PAGE = re.compile(rb'\s*\{\s*"id"\s*:\s*("(?:[^"\\]|\\.)*")')
# As the Penn Treebank writes them, which FEVER's dump follows.
_BRACKETS = {
    "-LRB-": "(",
    "-RRB-": ")",
    "-LSB-": "[",
    "-RSB-": "]",
    "-LCB-": "{",
    "-RCB-": "}",
    "-COLON-": ":",
}
_BRACKET = re.compile("|".join(_BRACKETS))


class Page(NamedTuple):
    """A page's title, and those of its sentences that are wanted, by number."""

    title: str
    sentences: Mapping[int, str]


class Corpus:
    """The sentences of some pages. `digest` is an identity of what was found."""

    def __init__(self, pages: Mapping[str, Page]) -> None:
        self._pages = pages
        self.digest = content_id(
            "crp",
            {key: {str(n): s for n, s in page.sentences.items()} for key, page in pages.items()},
        )

    def text(self, references: Sequence[Reference]) -> tuple[str | None, bool]:
        """The sentences referred to, each page's after its title, and whether some of them are not
        there; None when none is.
        """
        wanted: dict[str, list[str]] = {}
        missing = False
        for key, number in references:
            page = self._pages.get(_key(key))
            sentences = {} if page is None else page.sentences
            found = sentences.values() if number is None else [sentences.get(number, "")]
            missing = missing or not any(found)
            wanted.setdefault("" if page is None else page.title, []).extend(filter(None, found))
        text = " ".join(f"{title}: {' '.join(found)}" for title, found in wanted.items() if found)
        return text or None, missing


def read_corpus(
    path: Path,
    references: Iterable[Reference],
    what: str,
    on_pages: Callable[[int], None] = lambda _: None,
) -> Corpus:
    """The pages that these references name, from FEVER's Wikipedia dump (a directory) or SciFact's
    corpus.jsonl.

    Only these pages are kept in memory. `what` names the expected corpus; `on_pages` is called with
    the number of pages read.
    Raises InputError when it is neither, or cannot be read.
    """
    wanted: dict[str, set[int | None]] = {}
    for page, number in references:
        wanted.setdefault(_key(page), set()).add(number)
    pages: dict[str, Page] = {}
    count, any_page = 0, False
    for file in _files(path, what):
        try:
            with decompressed(*open_file(str(file))) as lines:
                for line in lines:
                    count += 1
                    if count % _SHOW_EVERY == 0:
                        on_pages(count)
                    key = _page_of(line)
                    if key is not None and not any_page:
                        any_page = not _PAGE_KEYS.isdisjoint(json.loads(line))
                    if key is not None and key in wanted:
                        pages[key] = _read_page(json.loads(line), wanted[key])
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise InputError(
                f"{file} is not a corpus of one JSON object per line: {error}"
            ) from error
    if not any_page:
        raise InputError(f"{path} is no corpus: not one line of it is a page; name {what}")
    on_pages(count)
    return Corpus(pages)


def _files(path: Path, what: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path} does not exist; name {what}")
    files = sorted(path.glob("wiki-pages/*.jsonl*")) or sorted(path.glob("*.jsonl*"))
    if not files:
        raise InputError(
            f"{path} has no *.jsonl and no wiki-pages/*.jsonl; unpack the corpus there, or name "
            f"{what}"
        )
    return files


def _page_of(line: bytes) -> str | None:
    """The page's id, without parsing the page: of millions few are wanted."""
    if found := _PAGE.match(line):
        return _key(json.loads(found[1]))
    if b'"doc_id"' in line[:64]:
        return str(json.loads(line).get("doc_id"))
    return None


def _read_page(page: Mapping[str, object], wanted: set[int | None]) -> Page:
    everything = None in wanted
    return Page(
        _brackets(str(page.get("title") or page.get("id")).replace("_", " ")).rstrip("."),
        {n: text for n, text in _numbered(page) if text and (everything or n in wanted)},
    )


def _numbered(page: Mapping[str, object]) -> Iterator[tuple[int, str]]:
    """SciFact's `abstract`, or FEVER's `lines`: number, text and links, with tabs between them."""
    abstract = page.get("abstract")
    if isinstance(abstract, list):
        yield from enumerate(str(sentence).strip() for sentence in abstract)
        return
    for line in str(page.get("lines") or "").split("\n"):
        number, _, rest = line.partition("\t")
        if number.isdecimal():
            yield int(number), _brackets(rest.partition("\t")[0].strip())


def _key(page: str) -> str:
    # The claims and the dump do not write accents in the same way.
    return unicodedata.normalize("NFC", page)


def _brackets(text: str) -> str:
    return _BRACKET.sub(lambda found: _BRACKETS[found[0]], text)
