"""The formats in which data sets are published, each by a small sample of our own writing."""

import json
from pathlib import Path
from typing import Any

import pytest

from services.contracts import Claim, Label, PromptSpec
from services.contracts.errors import InputError
from services.producer import ClaimsFile, Selection, Source

PROMPT = PromptSpec()
LIT = "The lighthouse was lit for the first time in 1874."
TALL = "It is 31 metres tall."
NO_TEXT = "page references without text"
NONE = "the record has none"

# File, format, claims, then evidence and gold label of each claim.
SAMPLES: list[tuple[str, str, list[tuple[str | None, str | None]]]] = [
    ("fever.jsonl", "fever", [(None, "S"), (None, "R"), (None, "N")]),
    ("fever_rows.jsonl", "fever-rows", [(None, "S"), (None, "N")]),
    ("fever_symmetric.jsonl", "fever-symmetric", [(LIT, "S"), (TALL, "R")]),
    ("vitaminc.jsonl", "vitaminc", [(LIT, "S"), (LIT, "N")]),
    (
        "climate_fever.jsonl",
        "climate-fever",
        [(f"{LIT} {TALL}", "S"), (f"{TALL} Some say it is 90 metres tall.", None)],
    ),
    ("scifact.jsonl", "scifact", [(None, "S"), (None, "R"), (None, "N")]),
    ("scifact_rows.jsonl", "scifact-rows", [(None, "S"), (None, "R"), (None, "N")]),
    (
        "averitec.json",
        "averitec",
        [
            ("When was it lit? In 1874. Was it lit earlier? No. The log begins in 1874.", "S"),
            ("How tall is it? 31 metres. How tall is it? 90 metres, some say.", None),
            (None, "N"),
        ],
    ),
    ("hover.json", "hover", [(None, "S"), (None, None)]),
    ("feverous.jsonl", "feverous", [(None, "S"), (None, "R")]),
    ("llm_aggrefact.csv", "llm-aggrefact", [(f"{LIT} {TALL}", "S"), (f"{LIT}\n{TALL}", None)]),
    (
        "pubhealth.tsv",
        "pubhealth",
        [(f"{LIT}\n{TALL}", "S"), (TALL, None), ("No log names a parrot.", "N")],
    ),
    ("liar.tsv", "liar", [(None, "R"), (None, None), (None, "S")]),
    ("liar_plus.tsv", "liar-plus", [(TALL, "R"), (LIT, None), (LIT, "S")]),
    ("liar_plus.jsonl", "liar-plus", [(f"{TALL}\n", "R"), (LIT, None)]),
]
GOLD = {"S": "SUPPORTS", "R": "REFUTES", "N": "NOT ENOUGH INFO", None: None}


@pytest.fixture
def published(repository: Path) -> Path:
    return repository / "tests" / "published"


def read(path: Path, selection: Selection = Selection(), **how: Any) -> tuple[Any, list[Claim]]:  # noqa: B008
    with Source.open(str(path), **how) as source:
        file = ClaimsFile(source, PROMPT, selection)
        summary = file.inspect()
        claims = list(file)
        return (file.format.name, summary), claims


def claims_of(path: Path, **how: Any) -> list[Claim]:
    return read(path, Selection(**how))[1]


@pytest.mark.parametrize(
    ("name", "format", "expected"), SAMPLES, ids=[name for name, _, _ in SAMPLES]
)
def test_a_published_format_is_recognised_and_read(
    name: str, format: str, expected: list[tuple[str | None, str | None]], published: Path
) -> None:
    (found, summary), claims = read(published / name)
    assert found == format
    assert [(c.evidence, c.gold) for c in claims] == [(e, GOLD[g]) for e, g in expected]
    assert summary.claims == len(expected)
    assert sum(n for _, n in summary.without_evidence) == sum(e is None for e, _ in expected)


FEVER = [[[1, 2, "P", 0]]]
FEVEROUS = [{"content": ["P_sentence_0", "P_cell_0_1_1"], "context": {"P_sentence_0": ["P_title"]}}]


@pytest.mark.parametrize(
    ("evidences", "format"),
    [
        ([[], None, FEVER, "", [[]]], "fever"),
        ([FEVEROUS, []], "feverous"),
        ([[], []], "plain"),
        ([FEVER, LIT], "plain"),
        ([FEVER, [LIT]], "plain"),
        ([FEVER, FEVEROUS], "plain"),
        ([FEVEROUS, [{"content": LIT, "context": "C."}]], "plain"),
    ],
)
def test_records_without_evidence_do_not_hide_a_format_and_others_do(
    evidences: list[Any], format: str, tmp_path: Path
) -> None:
    rows = [{"id": n, "claim": f"A{n}.", "evidence": e} for n, e in enumerate(evidences)]
    path = tmp_path / "claims"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found, summary), _ = read(path)
    assert (found, summary.claims) == (format, len(rows))
    if format != "plain":
        assert dict(summary.without_evidence)[NO_TEXT] == 1


@pytest.mark.parametrize("named", ["fever", "feverous"])
def test_evidence_of_another_format_than_the_named_is_refused(named: str, tmp_path: Path) -> None:
    other = {"fever": FEVEROUS, "feverous": FEVER}[named]
    path = tmp_path / "claims"
    path.write_text(json.dumps({"id": 1, "claim": "A.", "evidence": other}))
    with pytest.raises(InputError, match="it is not FEVER.*: the evidence .* has another form"):
        read(path, Selection(format=named))


def test_every_format_has_a_sample(published: Path) -> None:
    from services.producer.dataset_formats import FORMATS

    assert {format for _, format, _ in SAMPLES} == {known.name for known in FORMATS}


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("climate_fever.jsonl", ["DISPUTED"]),
        ("averitec.json", ["Conflicting Evidence/Cherrypicking"]),
        ("hover.json", ["NOT_SUPPORTED"]),
        ("pubhealth.tsv", ["mixture"]),
        ("liar.tsv", ["half-true"]),
        ("llm_aggrefact.csv", ["0"]),
    ],
)
def test_a_label_that_the_prompt_does_not_know_is_counted_and_its_claim_taken(
    name: str, labels: list[str], published: Path
) -> None:
    (_, summary), _ = read(published / name)
    assert [label for label, _ in summary.unknown_labels] == labels


def test_a_label_may_be_mapped_and_that_is_the_same_run(published: Path) -> None:
    path = published / "climate_fever.jsonl"
    mapped = claims_of(path, label_map={"disputed": "NOT ENOUGH INFO"})
    assert [claim.gold for claim in mapped] == ["SUPPORTS", "NOT ENOUGH INFO"]
    with Source.open(str(path)) as one, Source.open(str(path)) as other:
        with_map = ClaimsFile(one, PROMPT, Selection(label_map={"DISPUTED": "NEI"}))
        assert with_map.source_digest == ClaimsFile(other, PROMPT).source_digest


def test_a_prompt_that_knows_a_format_s_own_labels_needs_no_map(published: Path) -> None:
    prompt = PromptSpec(
        labels=(
            Label(name="YES", word="Yes", aliases=("SUPPORTED",)),
            Label(name="NO", word="No", aliases=("NOT SUPPORTED",)),
        )
    )
    with Source.open(str(published / "hover.json")) as source:
        file = ClaimsFile(source, prompt)
        assert file.inspect().gold == (("YES", 1), ("NO", 1))


def test_each_piece_of_evidence_may_be_a_claim_with_its_own_label(published: Path) -> None:
    claims = claims_of(published / "climate_fever.jsonl", each_evidence=True)
    assert [(c.claim_id, c.evidence, c.gold) for c in claims] == [
        ("0#1", LIT, "SUPPORTS"),
        ("0#2", TALL, "NOT ENOUGH INFO"),
        ("5#1", TALL, "REFUTES"),
        ("5#2", "Some say it is 90 metres tall.", "SUPPORTS"),
    ]


@pytest.mark.parametrize("corpus", [".", "wiki-pages", "wiki-pages/wiki-001.jsonl"])
def test_fevers_sentences_are_looked_up_in_its_wikipedia(corpus: str, published: Path) -> None:
    (_, summary), claims = read(published / "fever.jsonl", Selection(corpus=published / corpus))
    page = "Northern Cape (lighthouse)"
    assert [claim.evidence for claim in claims] == [
        f"{page}: {LIT} Its lamp ( a first-order lens ) still turns .",
        f"{page}: {TALL}",
        None,
    ]
    assert summary.without_evidence == ((NONE, 1),)


def test_rows_of_one_claim_are_one_claim_with_all_their_evidence(published: Path) -> None:
    claims = claims_of(published / "fever_rows.jsonl", corpus=published)
    assert [(c.claim_id, c.position) for c in claims] == [("75397", 0), ("75399", 1)]
    assert claims[0].evidence is not None
    assert claims[0].evidence.endswith(f"{LIT} Its lamp ( a first-order lens ) still turns .")


@pytest.mark.parametrize("name", ["scifact.jsonl", "scifact_rows.jsonl"])
def test_scifacts_rationales_are_looked_up_in_its_corpus(name: str, published: Path) -> None:
    claims = claims_of(published / name, corpus=published / "scifact_corpus.jsonl")
    first = claims[0].evidence
    assert first == f"On the northern lighthouse: {LIT} Its lamp still turns."
    if name == "scifact.jsonl":
        assert claims[1].evidence == (
            f"On the northern lighthouse: {TALL} Keepers and their animals: Keepers measured the "
            "tower at 31 metres."
        )
    # What was cited does not decide the claim: all of it is shown.
    assert claims[-1].evidence == (
        "Keepers and their animals: Keepers measured the tower at 31 metres. Some kept goats."
    )


def test_a_corpus_decides_which_claims_there_are_and_so_which_run_it_is(published: Path) -> None:
    digests = []
    for corpus in (None, published):
        with Source.open(str(published / "fever.jsonl")) as source:
            file = ClaimsFile(source, PROMPT, Selection(corpus=corpus))
            digests.append(file.source_digest)
    assert digests[0] != digests[1]


def test_pages_that_the_corpus_does_not_have_are_reported(published: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"id": "Another", "lines": "0\\tText."}\n')
    (_, summary), _ = read(published / "fever.jsonl", Selection(corpus=tmp_path))
    assert dict(summary.without_evidence) == {"its pages are not in the corpus": 2, NONE: 1}


@pytest.mark.parametrize(
    ("corpus", "says"),
    [("nothing", "does not exist"), ("emptied", r"has no \*\.jsonl and no wiki-pages")],
)
def test_what_is_no_corpus_is_refused(
    corpus: str, says: str, published: Path, tmp_path: Path
) -> None:
    (tmp_path / "emptied").mkdir()
    with pytest.raises(InputError, match=says):
        claims_of(published / "fever.jsonl", corpus=tmp_path / corpus)


def test_a_corpus_for_a_format_without_references_is_refused(published: Path) -> None:
    with pytest.raises(InputError, match="VitaminC, which uses no corpus; leave out --corpus"):
        claims_of(published / "vitaminc.jsonl", corpus=published)


def test_a_format_may_be_forced(published: Path) -> None:
    (found, _), claims = read(published / "climate_fever.jsonl", Selection(format="plain"))
    assert found == "plain"
    assert [claim.claim_id for claim in claims] == ["0", "5"]


def test_a_record_that_is_not_of_its_format_is_rejected_and_harms_no_other(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    good = '{"id": 1, "claim": "C.", "evidence": {"7": [{"sentences": [0]}]}, "cited_doc_ids": [7]}'
    bad = good.replace('[{"sentences": [0]}]', "5")
    path.write_text("\n".join([good] * 21 + [bad]) + "\n")
    (found, summary), claims = read(path)
    assert found == "scifact"
    assert len(claims) == 1
    assert summary.rejected == (("not of its format", 1),)


def test_the_second_version_of_fever_symmetric_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "dev.jsonl"
    path.write_text(
        '{"id": "1", "claim": "C.", "evidence": "E.", "sentence1": "E.", "sentence2": "C.", '
        '"gold_label": "REFUTES", "label": "REFUTES", "evid": [["E.", 1.0]]}\n'
    )
    (found, _), claims = read(path)
    assert (found, claims[0].evidence) == ("fever-symmetric", "E.")


def test_a_record_of_liar_plus_may_have_no_justification(published: Path, tmp_path: Path) -> None:
    first, second, _ = (published / "liar_plus.tsv").read_text().splitlines()
    path = tmp_path / "test2.tsv"
    path.write_text(f"{first}\n{second.rpartition(chr(9))[0]}\n")
    (_, summary), claims = read(path)
    assert [c.evidence for c in claims] == [TALL, None]
    assert summary.rejected == ()


def test_a_test_split_has_no_labels(tmp_path: Path) -> None:
    path = tmp_path / "claims_test.jsonl"
    path.write_text('{"id": 1, "claim": "C.", "cited_doc_ids": [7]}\n')
    (found, summary), claims = read(path)
    assert (found, claims[0].gold, summary.unlabelled) == ("scifact", None, 1)
