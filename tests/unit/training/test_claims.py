"""What the demo's adapter is trained on, and that it holds nothing of what it is measured on."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.models.files import check_adapter_weights
from tests.conftest import DEMO_MODEL, sample_lines
from training.claims import (
    DEVELOPMENT,
    WRITTEN,
    read_written,
    training_passages,
    validation_passages,
)

SEED = 18
WORD = re.compile(r"[^\W_]+")
CAPITALIZED = re.compile(r"[^\W\d_][\w-]*")


def listed(text: str) -> set[str]:
    return set(text.split())


LITTLE_WORDS = listed(
    "a an and are as at be been by did do does for from had has have her his in is it its less "
    "more most no not of on or than that the their them they to was were which who with"
)
# Names that both may have: of continents, countries, seas and peoples, of months, and first names.
SHARED_NAMES = listed(
    "Africa African Alaska America American Americas Antarctica Arabic Arctic Argentina Asia "
    "Atlantic Australia Australian Austria Baltic Bolivia Brazil Britain British California Canada "
    "Canadian Caribbean China Chinese Croatia Czech Danish Denmark Egypt England English Estonia "
    "Ethiopia Europe Finland Finnish France French German Germany Greece Greek Greenland "
    "Iceland India Ireland Irish Italian Italy Japan Japanese Kingdom Korea Korean Latin "
    "Mediterranean Mexico Missouri Mongolia Moscow Netherlands Norway Norwegian Pacific "
    "Peru Poland Polish Portugal Republic Roman Russia Russian Scotland Siberia "
    "Sicily Soviet Spain Spanish Sweden Swedish Switzerland Tanzania United Zealand "
    "January February March April May June July August September October November December "
    "Agatha Alexander Ann Anne Charles Christian Edvard Ernest Ferdinand "
    "Florence Franz George Jacob James Johann Johannes Louis "
    "Ludwig Marie Mary Robert Wilhelm William Wolfgang"
)
# Words that begin a sentence of the samples or are part of a name there, but are not names.
SHARED_WORDS = listed(
    "Battle Bible Comet Coffee County D Dolphins Earth Express Grey House International Man "
    "Middle Mount Saint Sun Sundays Tower Trains War"
)


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def content(text: str) -> frozenset[str]:
    return frozenset(words(text)) - LITTLE_WORDS


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    """All runs of so many words."""
    found = words(text)
    return {tuple(found[i : i + length]) for i in range(len(found) - length + 1)}


def names(text: str) -> set[str]:
    """The words that begin with a capital letter, without a genitive."""
    return {word for word in CAPITALIZED.findall(text) if word[0].isupper()}


def passages() -> Iterator[tuple[str, str]]:
    """Evidence and claims, each with its kind."""
    for passage in (
        *training_passages(SEED),
        *validation_passages(SEED),
        *read_written(DEVELOPMENT),
    ):
        yield "evidence", passage.evidence
        for _, claim in passage.claims:
            yield "claim", claim


def test_no_text_shares_a_run_of_six_words_with_a_sample() -> None:
    samples = {
        run: line["id"]
        for line in sample_lines()
        for key in ("claim", "evidence")
        for run in runs(line[key], 6)
    }
    for _, text in passages():
        assert not [samples[run] for run in runs(text, 6) if run in samples], text


def test_no_text_has_half_of_its_words_in_common_with_a_sample() -> None:
    samples = {
        kind: [(line["id"], content(line[kind])) for line in sample_lines()]
        for kind in ("claim", "evidence")
    }
    for kind, text in passages():
        own = content(text)
        for name, other in samples[kind]:
            assert 2 * len(own & other) < len(own | other), (text, name)


def test_nobody_and_nothing_that_a_sample_names_is_trained_on() -> None:
    texts = [line[key] for line in sample_lines() for key in ("claim", "evidence")]
    plain = {word for text in texts for word in CAPITALIZED.findall(text) if word[0].islower()}
    named = {name for text in texts for name in names(text) if name.lower() not in plain}
    named -= SHARED_NAMES | SHARED_WORDS
    for _, text in passages():
        assert not names(text) & named, text


def test_what_is_measured_on_is_not_trained_on() -> None:
    trained = {passage.evidence for passage in training_passages(SEED)}
    measured = [*validation_passages(SEED), *read_written(DEVELOPMENT)]
    assert not trained & {passage.evidence for passage in measured}


@pytest.mark.parametrize("chosen", [training_passages, validation_passages])
def test_each_label_has_about_a_third_of_the_claims(chosen) -> None:
    counts = Counter(label for passage in chosen(SEED) for label, _ in passage.claims)
    assert len(counts) == 3
    assert min(counts.values()) > 0.28 * counts.total()


def test_no_evidence_has_a_claim_with_two_labels() -> None:
    for passage in training_passages(SEED):
        claims = [claim for _, claim in passage.claims]
        assert len(set(claims)) == len(claims), passage


def test_a_seed_decides_what_is_generated() -> None:
    assert training_passages(1) == training_passages(1) != training_passages(2)


def test_a_written_file_that_is_not_in_form_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "written.txt"
    path.write_text("E Ice is cold.\nX Ice is hot.\n")
    with pytest.raises(ValueError, match="not a passage"):
        list(read_written(path))


def test_every_written_passage_has_all_three_labels() -> None:
    for path in WRITTEN.glob("*.txt"):
        for passage in read_written(path):
            assert len({label for label, _ in passage.claims}) == 3, passage


def test_the_demos_adapter_is_small_and_fits_its_model(repository: Path) -> None:
    adapter = repository / "samples" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA" and 4 <= config["r"] <= 8
    assert (adapter / "adapter_model.safetensors").stat().st_size <= 5_000_000
    check_adapter_weights(adapter, DEMO_MODEL if DEMO_MODEL.is_dir() else None)
