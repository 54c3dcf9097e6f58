"""Counts what is found in a file of claims while it is read."""

from collections import Counter
from collections.abc import Iterable

from services.contracts.bounds import MAX_COUNTED_KINDS, MAX_ID_CHARS, MAX_LEFT_OUT
from services.contracts.runs import InputSummary
from services.producer.parse import NO_LABEL, ParsedClaim

_OTHERS = "(others)"
# Kinds beyond this are counted as others: a column of free text is not a column of labels.
_MAX_KINDS = 10_000


class Tally:
    """Counts by kind, in bounded memory."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, kind: str, count: int = 1) -> None:
        if kind not in self._counts and len(self._counts) >= _MAX_KINDS:
            kind = _OTHERS
        self._counts[kind] += count

    def top(self) -> tuple[tuple[str, int], ...]:
        """The most frequent kinds, and the sum of the others."""
        most = self._counts.most_common(MAX_COUNTED_KINDS - 1)
        shown = dict(most)
        rest = self._counts.total() - sum(shown.values())
        if rest:
            shown[_OTHERS] = shown.get(_OTHERS, 0) + rest
        return tuple(shown.items())


class InputCounts:
    """The counts of one pass over a file."""

    def __init__(self, format: str, container: str, records: int) -> None:
        self._format = format
        self._container = container
        self._records = records
        self._gold, self._unknown, self._without = Tally(), Tally(), Tally()
        self._rejected = Tally()
        self._unlabelled = self._kept_back = self._own_ids = self._partly = 0
        self._numeric_ids = True
        self.claims = self.repeated = self.rejected = 0
        self.not_selected = self.same_content = self.other_label = 0
        self._left_out: dict[int, str] = {}

    def add_claims(self, claims: Iterable[ParsedClaim]) -> None:
        for parsed in claims:
            self.claims += 1
            claim = parsed.claim
            if claim.gold is not None:
                self._gold.add(claim.gold)
            elif parsed.label in ("", NO_LABEL):
                self._unlabelled += 1
                self._kept_back += parsed.label == NO_LABEL
            else:
                self._unknown.add(parsed.label)
            self._partly += parsed.partly and claim.evidence is not None
            if claim.evidence is None and parsed.without_evidence is not None:
                self._without.add(parsed.without_evidence.value)
            # An own id is a number of the file's and a mark.
            whole = claim.claim_id.partition("#")[0]
            self._numeric_ids = self._numeric_ids and whole.isdecimal() and whole == str(int(whole))

    def add_own_id(self) -> None:
        self._own_ids += 1

    def add_rejection(self, kind: str, position: int, record_id: object) -> None:
        self.rejected += 1
        self._rejected.add(kind)
        self._leave_out(position, record_id)

    def add_repeated(self, position: int, record_id: object) -> None:
        self.repeated += 1
        self._leave_out(position, record_id)

    def _leave_out(self, position: int, record_id: object) -> None:
        """Note a record that did not become a claim."""
        if not isinstance(record_id, str) or len(self._left_out) == MAX_LEFT_OUT:
            return
        if record_id.strip() and "\0" not in record_id and len(record_id) <= MAX_ID_CHARS:
            self._left_out[position] = record_id

    def summary(self) -> InputSummary:
        return InputSummary(
            format=self._format,
            container=self._container,
            records=self._records,
            claims=self.claims,
            repeated=self.repeated,
            rejected=self._rejected.top(),
            without_evidence=self._without.top(),
            evidence_partly_used=self._partly,
            same_content=self.same_content,
            other_label=self.other_label,
            gold=self._gold.top(),
            unlabelled=self._unlabelled,
            kept_back=self._kept_back,
            unknown_labels=self._unknown.top(),
            own_ids=self._own_ids,
            numeric_ids=self._numeric_ids and self.claims > 0,
            left_out=tuple(self._left_out.items()),
        )
