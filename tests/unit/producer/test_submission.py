import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.broker import Outgoing
from services.contracts import (
    Claim,
    ClaimBatch,
    ContextSpec,
    PromptSpec,
    RunAnnouncement,
    Totals,
    decode,
    topology,
)
from services.contracts.bounds import MAX_BATCH_BYTES, MAX_MESSAGE_BYTES
from services.contracts.claims import split_claims
from services.contracts.errors import InputError
from services.contracts.proofs import ClaimsDigest, Positions
from services.producer import (
    ClaimsFile,
    Progress,
    RejectedFile,
    Rejection,
    Selection,
    Source,
    Submission,
)


class RecordingPublisher:
    """Takes what a broker would take, and remembers when everything had to be confirmed."""

    def __init__(self) -> None:
        self.messages: list[Outgoing] = []
        self.flushed_after: list[int] = []

    def publish(self, message: Outgoing) -> None:
        assert len(message.body) <= MAX_MESSAGE_BYTES
        self.messages.append(message)

    def flush(self) -> None:
        self.flushed_after.append(len(self.messages))

    @property
    def announcements(self) -> list[RunAnnouncement]:
        return [
            decode(RunAnnouncement, message.body)
            for message in self.messages
            if message.exchange == topology.RUNS_EXCHANGE
        ]

    @property
    def batches(self) -> list[ClaimBatch]:
        return [
            decode(ClaimBatch, message.body)
            for message in self.messages
            if message.exchange == topology.CLAIMS_EXCHANGE
        ]

    @property
    def claim_ids(self) -> list[str]:
        return [claim.claim_id for batch in self.batches for claim in batch.claims]


class Submitter:
    """A file, submitted as often as a test likes."""

    def __init__(self, directory: Path, context: ContextSpec, prompt: PromptSpec) -> None:
        self._directory = directory
        self._context = context
        self._prompt = prompt
        self.submission: Submission
        self.publisher: RecordingPublisher
        self.rejected = directory / "rejected.jsonl"

    def write(self, rows: Iterable[dict[str, Any] | str], name: str = "claims.jsonl") -> Path:
        path = self._directory / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    @property
    def rejections(self) -> list[Rejection]:
        lines = self.rejected.read_bytes().splitlines() if self.rejected.exists() else []
        return [Rejection.model_validate_json(line) for line in lines]

    def submit(self, path: Path, *, batch_size: int = 4, **how: Any) -> Totals:
        selection = Selection(
            **{key: how.pop(key) for key in ("limit", "seed", "columns") if key in how}
        )
        self.publisher = RecordingPublisher()
        claim_column = selection.columns.get("claim")
        with (
            Source.open(str(path), claim_column=claim_column) as source,
            RejectedFile(self.rejected) as rejections,
        ):
            self.submission = Submission(ClaimsFile(source, self._prompt, selection), self._context)
            self.submission.inspect(rejections)
            return self.submission.publish(
                self.publisher,  # type: ignore[arg-type]
                batch_size=batch_size,
                **how,
            )


@pytest.fixture
def submitter(tmp_path: Path, context: ContextSpec, prompt: PromptSpec) -> Submitter:
    return Submitter(tmp_path, context, prompt)


def rows(count: int) -> list[dict[str, Any]]:
    return [{"id": f"c{n}", "claim": f"Claim {n}."} for n in range(count)]


def test_batches_hold_the_wanted_number_of_claims_in_the_files_order(
    submitter: Submitter,
) -> None:
    totals = submitter.submit(submitter.write(rows(10)), batch_size=4)
    assert [len(batch.claims) for batch in submitter.publisher.batches] == [4, 4, 2]
    assert submitter.publisher.claim_ids == [f"c{n}" for n in range(10)]
    assert totals == Totals(lines=10, claims=10, repeated=0, rejected=0)


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (4, [4]), (5, [4, 1]), (8, [4, 4])])
def test_the_last_batch_holds_what_is_left(
    count: int, sizes: list[int], submitter: Submitter
) -> None:
    submitter.submit(submitter.write(rows(count)), batch_size=4)
    assert [len(batch.claims) for batch in submitter.publisher.batches] == sizes


def test_a_message_carries_all_that_a_worker_needs(
    submitter: Submitter, context: ContextSpec
) -> None:
    submitter.submit(
        submitter.write([{"id": "a", "claim": "C.", "evidence": "E.", "label": "NEI"}])
    )
    (batch,) = submitter.publisher.batches
    assert batch.run == submitter.submission.run
    assert batch.run.context == context
    assert batch.claims == (
        Claim(claim_id="a", position=0, text="C.", evidence="E.", gold="NOT ENOUGH INFO"),
    )


def test_claims_go_to_the_queue_of_their_context(
    submitter: Submitter, context: ContextSpec
) -> None:
    submitter.submit(submitter.write(rows(5)))
    routes = {
        (message.exchange, message.routing_key)
        for message in submitter.publisher.messages
        if message.exchange != topology.RUNS_EXCHANGE
    }
    assert routes == {(topology.CLAIMS_EXCHANGE, topology.claims_queue(context.context_id))}


def test_the_run_is_announced_first_and_with_its_totals_last(submitter: Submitter) -> None:
    totals = submitter.submit(submitter.write(rows(5)))
    exchanges = [message.exchange for message in submitter.publisher.messages]
    assert exchanges == [
        topology.RUNS_EXCHANGE,
        topology.CLAIMS_EXCHANGE,
        topology.CLAIMS_EXCHANGE,
        topology.RUNS_EXCHANGE,
    ]
    begun, sent = submitter.publisher.announcements
    assert (begun.run, begun.totals) == (submitter.submission.run, None)
    assert (sent.run, sent.totals) == (submitter.submission.run, totals)


def test_totals_are_announced_only_after_the_broker_has_every_claim(submitter: Submitter) -> None:
    submitter.submit(submitter.write(rows(5)))
    # After the first announcement, after the last batch, after the last announcement.
    assert submitter.publisher.flushed_after == [1, 3, 4]


def test_totals_add_up_whatever_is_in_the_file(submitter: Submitter) -> None:
    path = submitter.write(
        [
            {"id": "a", "claim": "One."},
            "",
            "nonsense",
            {"id": "a", "claim": "One."},
            {"id": "a", "claim": "Other."},
            {"claim": "No id."},
            {"claim": "No id."},
            {"id": "b", "claim": ""},
            {"id": "c", "claim": "Two.", "label": "MAYBE"},
            {"id": "d", "claim": "Two.", "label": "NEI"},
        ]
    )
    totals = submitter.submit(path)
    assert totals == Totals(lines=9, claims=4, repeated=2, rejected=3)
    assert {(r.line, r.field) for r in submitter.rejections} == {
        (3, None),
        (5, "id"),
        (8, "claim"),
    }
    assert [c.position for b in submitter.publisher.batches for c in b.claims] == [0, 4, 7, 8]


def test_a_repetition_far_down_the_file_is_found(submitter: Submitter) -> None:
    totals = submitter.submit(submitter.write([*rows(3_000), *rows(3_000)]), batch_size=1_000)
    assert totals == Totals(lines=6_000, claims=3_000, repeated=3_000, rejected=0)
    assert len(set(submitter.publisher.claim_ids)) == 3_000


def test_publishing_again_publishes_the_same_messages_as_another_submission(
    submitter: Submitter,
) -> None:
    path = submitter.write([*rows(9), "nonsense"])
    sendings = []
    for _ in range(2):
        submitter.submit(path)
        publisher, submission_id = submitter.publisher, submitter.submission.submission_id
        sent = [*publisher.announcements, *publisher.batches]
        assert {message.submission_id for message in sent} == {submission_id}
        ids = [message.message_id for message in publisher.messages]
        assert len(set(ids)) == len(ids)
        # Each submission has proofs of its own.
        same = [
            message.model_copy(
                update={
                    "submission_id": "same",
                    **({"proofs": ()} if isinstance(message, ClaimBatch) else {"proof_key": None}),
                }
            )
            for message in sent
        ]
        sendings.append((submission_id, ids, same))
    (first, *one), (second, *other) = sendings
    assert first != second
    assert one == other


def test_the_key_of_the_proofs_is_announced_and_in_no_batch(submitter: Submitter) -> None:
    submitter.submit(submitter.write(rows(9)))
    (key,) = {announcement.proof_key for announcement in submitter.publisher.announcements}
    assert key is not None
    for batch in submitter.publisher.batches:
        assert batch.proofs == tuple(claim.proof(bytes.fromhex(key)) for claim in batch.claims)
    claims = [
        m.body for m in submitter.publisher.messages if m.exchange == topology.CLAIMS_EXCHANGE
    ]
    assert not any(key.encode() in body for body in claims)


def test_digest_and_positions_are_of_all_claims_whether_they_are_sent_or_not(
    submitter: Submitter,
) -> None:
    lines = [*rows(3), "nonsense", *rows(2), *rows(7)[5:]]
    path = submitter.write(lines)
    for finished in (lambda _: (), lambda claims: [claim.claim_id for claim in claims]):
        submitter.submit(path, finished=finished)
        begun, sent = submitter.publisher.announcements
        assert (begun.digest, begun.positions) == (None, None)
        positions = [0, 1, 2, 6, 7]
        ids = [f"c{n}" for n in (0, 1, 2, 5, 6)]
        assert sent.digest == str(ClaimsDigest.of(zip(ids, positions, strict=True)))
        assert sent.positions is not None
        assert Positions.of_text(sent.positions).ranges(9) == [(0, 2), (6, 7)]
    assert submitter.publisher.batches == []


def test_every_message_says_what_kind_it_is(submitter: Submitter) -> None:
    submitter.submit(submitter.write(rows(5)))
    kinds = [message.kind for message in submitter.publisher.messages]
    assert kinds == ["RunAnnouncement", "ClaimBatch", "ClaimBatch", "RunAnnouncement"]


def test_the_same_content_under_another_name_is_the_same_run(submitter: Submitter) -> None:
    submitter.submit(submitter.write(rows(3), "a.jsonl"))
    run_id = submitter.submission.run.run_id
    submitter.submit(submitter.write(rows(3), "b.jsonl"))
    assert submitter.submission.run.run_id == run_id
    submitter.submit(submitter.write(rows(4), "a.jsonl"))
    assert submitter.submission.run.run_id != run_id


def test_the_way_of_reading_is_part_of_the_run(submitter: Submitter) -> None:
    path = submitter.write([{"claim": "C.", "text": "T."}, {"claim": "D.", "text": "U."}])
    run_ids = set()
    for how in ({}, {"columns": {"claim": "text"}}, {"limit": 1}, {"limit": 1, "seed": 1}):
        submitter.submit(path, **how)
        run_ids.add(submitter.submission.run.run_id)
    assert len(run_ids) == 4


def test_finished_claims_are_counted_but_not_sent(submitter: Submitter) -> None:
    asked: list[str] = []

    def finished(claims: Sequence[Claim]) -> set[str]:
        asked.extend(claim.claim_id for claim in claims)
        return {"c0", "c3", "c9", "unknown"}

    totals = submitter.submit(submitter.write(rows(10)), batch_size=3, finished=finished)
    assert totals == Totals(lines=10, claims=10, repeated=0, rejected=0)
    assert submitter.publisher.claim_ids == ["c1", "c2", "c4", "c5", "c6", "c7", "c8"]
    assert asked == [f"c{n}" for n in range(10)]


def evidence_rows(count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"c{n}", "claim": f"Claim {n}.", "evidence": f"Evidence {n % 3}."}
        for n in range(count)
    ]


def test_claims_that_share_evidence_travel_in_the_same_batch_with_their_places_in_the_file(
    submitter: Submitter,
) -> None:
    submitter.submit(submitter.write(evidence_rows(9)), batch_size=3)
    assert [
        [(claim.position, claim.evidence) for claim in batch.claims]
        for batch in submitter.publisher.batches
    ] == [[(n + 3 * k, f"Evidence {n}.") for k in range(3)] for n in range(3)]
    assert len({batch.batch_id for batch in submitter.publisher.batches}) == 3


def test_claims_keep_the_files_order_where_that_is_wanted_and_the_run_is_the_same(
    submitter: Submitter,
) -> None:
    path = submitter.write(evidence_rows(9))
    submitter.submit(path, order_by_evidence=False)
    assert submitter.publisher.claim_ids == [f"c{n}" for n in range(9)]
    run_id = submitter.submission.run.run_id
    submitter.submit(path)
    assert submitter.publisher.claim_ids != [f"c{n}" for n in range(9)]
    assert submitter.submission.run.run_id == run_id


def test_a_run_that_is_sent_again_sends_what_is_not_finished_with_its_evidence(
    submitter: Submitter,
) -> None:
    submitter.submit(
        submitter.write(evidence_rows(9)), batch_size=2, finished=lambda _: {"c0", "c4", "c5"}
    )
    assert submitter.publisher.claim_ids == ["c1", "c7", "c2", "c8", "c3", "c6"]


def test_when_all_is_finished_only_the_announcements_are_sent(submitter: Submitter) -> None:
    totals = submitter.submit(
        submitter.write(rows(5)), finished=lambda claims: [claim.claim_id for claim in claims]
    )
    assert submitter.publisher.batches == []
    assert [a.totals for a in submitter.publisher.announcements] == [None, totals]


def test_progress_is_reported_and_ends_with_the_totals(submitter: Submitter) -> None:
    reported: list[Progress] = []
    submitter.submit(submitter.write([*rows(3_000), "nonsense"]), on_progress=reported.append)
    assert len(reported) > 1
    assert reported == sorted(reported, key=lambda progress: progress.records)
    assert reported[-1] == Progress(records=3_001, published=3_000, rejected=1)


def test_a_limit_takes_the_first_lines_and_counts_no_others(submitter: Submitter) -> None:
    totals = submitter.submit(submitter.write(["nonsense", *rows(9)]), limit=4)
    assert totals == Totals(lines=4, claims=3, repeated=0, rejected=1)
    assert submitter.submission.file.records_to_read == 4


def test_a_seeded_limit_takes_a_sample_in_the_files_order(submitter: Submitter) -> None:
    totals = submitter.submit(submitter.write(rows(100)), limit=20, seed=1)
    numbers = [int(claim_id[1:]) for claim_id in submitter.publisher.claim_ids]
    assert totals.claims == 20
    assert numbers == sorted(numbers)
    assert numbers != list(range(20))


def test_a_limit_beyond_the_file_takes_it_all(submitter: Submitter) -> None:
    assert submitter.submit(submitter.write(rows(3)), limit=99).lines == 3
    assert submitter.submission.file.records_to_read == 3


def test_a_file_without_a_single_claim_is_an_input_error(submitter: Submitter) -> None:
    path = submitter.write(["nonsense", "more of it"])
    with pytest.raises(InputError, match="none of its 2 lines is a claim.*rejected"):
        submitter.submit(path)
    assert len(submitter.rejections) == 2


def test_a_run_of_which_every_line_was_rejected_is_never_announced(submitter: Submitter) -> None:
    with pytest.raises(InputError):
        submitter.submit(submitter.write(["nonsense"]))
    assert submitter.publisher.messages == []


def test_columns_that_do_not_fit_the_file_are_reported_before_anything_is_sent(
    submitter: Submitter,
) -> None:
    path = submitter.write(["id,text", "1,C."], "claims.csv")
    with pytest.raises(InputError, match="no column is called 'claim'"):
        submitter.submit(path)


def test_unused_columns_are_reported(submitter: Submitter) -> None:
    submitter.submit(submitter.write(["id,claim,author", "1,C.,Me"], "claims.csv"))
    assert submitter.submission.file.ignored_keys == ("author",)


def test_a_file_with_a_very_long_path_can_be_submitted(
    submitter: Submitter, tmp_path: Path
) -> None:
    deep = tmp_path / ("a" * 200) / ("b" * 200) / ("c" * 200)
    deep.mkdir(parents=True)
    path = submitter.write(rows(1)).rename(deep / "claims.jsonl")
    assert submitter.submit(path).claims == 1
    assert str(path).endswith(submitter.publisher.batches[0].run.source)


def test_a_file_whose_name_is_not_utf_8_can_be_submitted(
    submitter: Submitter, tmp_path: Path
) -> None:
    path = submitter.write(rows(1)).rename(tmp_path / "caf\udce9.jsonl")
    assert submitter.submit(path).claims == 1


@pytest.mark.parametrize(
    "character",
    ["a", '"', "\\", "\n", "\x01", "\x7f", "é", "漢", "😀"],
    ids=["ascii", "quote", "backslash", "newline", "control", "delete", "2", "3", "4 bytes"],
)
def test_a_batch_stays_under_its_bound_in_bytes_whatever_its_texts_are_made_of(
    character: str, submitter: Submitter
) -> None:
    path = submitter.write(
        {"id": f"{n}", "claim": f"x{character * 8_000}", "evidence": character * 60_000}
        for n in range(14)
    )
    submitter.submit(path, batch_size=1_024)
    claims = 0
    for batch in submitter.publisher.batches:
        size = sum(len(claim.model_dump_json().encode()) + 1 for claim in batch.claims)
        assert size <= MAX_BATCH_BYTES
        claims += len(batch.claims)
    assert claims == 14


TEXT = st.text(
    st.sampled_from('a"\\\n\x01é漢😀'),  # 1, 2, 2, 2, 6, 2, 3 and 4 bytes in JSON
    min_size=1,
    max_size=3,
).filter(str.strip)


@given(
    st.lists(st.tuples(TEXT, st.none() | TEXT, st.integers(1, 2_000)), min_size=1, max_size=12),
    st.integers(1, 20),
)
def test_no_claim_is_lost_doubled_or_moved_by_batching(
    texts: list[tuple[str, str | None, int]], batch_size: int
) -> None:
    claims = [
        Claim(
            claim_id=str(n),
            position=n,
            text=text,
            evidence=None if evidence is None else evidence * times,
        )
        for n, (text, evidence, times) in enumerate(texts)
    ]
    batches = list(split_claims(claims, batch_size))
    assert [claim for batch in batches for claim in batch] == claims
    assert all(1 <= len(batch) <= batch_size for batch in batches)
