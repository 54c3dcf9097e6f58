"""Small inputs that failed before, as they were collected; other tests hold their kinds."""

from pathlib import Path
from typing import Any

import pytest

from services.contracts import Claim, PromptSpec
from services.contracts.errors import InputError
from services.producer import ClaimsFile, Selection, Source

EXPECTED: dict[str, dict[str, Any]] = {
    "nested_text.jsonl": {"claims": 9, "without_evidence": ()},
    "int_labels.jsonl": {
        "claims": 6,
        "kept_back": 1,
        "unknown_labels": (("0", 2), ("1", 1), ("true", 1), ('["SUPPORTS"]', 1)),
    },
    "many_evidence.jsonl": {"claims": 3, "own_ids": 2, "rejected": ()},
    "spark.csv": {"claims": 3, "rejected": ()},
    "tabs.tsv": {"claims": 1, "rejected": ()},
    "semicolon.csv": {"claims": 1, "rejected": ()},
    "trailing_columns.csv": {"claims": 1, "rejected": ()},
    "array.json": {"claims": 2, "rejected": ()},
    "fever_tail.jsonl": {
        "format": "FEVER",
        "records": 3,
        "claims": 2,
        "rejected": (("claim: blank", 1),),
        "numeric_ids": True,
        "left_out": ((2, "75399"),),
    },
}


@pytest.fixture
def field(repository: Path) -> Path:
    directory = repository.parent / "shared" / "field"
    if not directory.is_dir():
        pytest.skip("the collected inputs are not on this machine")
    return directory


@pytest.mark.parametrize("name", EXPECTED)
def test_a_collected_input_is_read_as_it_should(name: str, field: Path) -> None:
    with Source.open(str(field / name)) as source:
        summary = ClaimsFile(source, PromptSpec()).inspect()
    assert {key: getattr(summary, key) for key in EXPECTED[name]} == EXPECTED[name]


def test_half_a_record_is_never_a_claim(field: Path) -> None:
    with Source.open(str(field / "spark.csv")) as source:
        file = ClaimsFile(source, PromptSpec())
        claims: list[Claim] = list(file)
    assert claims[1].text == 'He said "no" and\nthen left the harbour'


def test_a_column_that_is_misspelt_is_refused(field: Path) -> None:
    with Source.open(str(field / "typo_column.jsonl")) as source:
        file = ClaimsFile(source, PromptSpec(), Selection(columns={"evidence": "pasage"}))
        with pytest.raises(InputError, match="no line has the key 'pasage' .* 'passage'"):
            file.inspect()
