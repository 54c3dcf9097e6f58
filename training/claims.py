"""The claims that the demo's adapter is trained on, as files that `keepwarm` reads too.

    .venv/bin/python training/claims.py --out results/adapter

Writes `train.jsonl`; `validation.jsonl`, of generated topics that are not trained on; and
`development.jsonl`, written by hand like a part of `train.jsonl`. None of them holds a sample, or
anything close to one: tests/unit/training compares them.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.generated import REFUTES, SUPPORTS, UNKNOWN, Passage, generate

WRITTEN = Path(__file__).parent / "written"
DEVELOPMENT = WRITTEN / "development.txt"
LABELS = {"S": SUPPORTS, "R": REFUTES, "N": UNKNOWN}


def read_written(path: Path) -> Iterator[Passage]:
    """The passages of a file: a line of evidence (E), then its claims, each after its label."""
    for block in path.read_text(encoding="utf-8").strip().split("\n\n"):
        first, *rest = block.splitlines()
        if not first.startswith("E ") or any(line[:2] not in ("S ", "R ", "N ") for line in rest):
            raise ValueError(f"{path}: not a passage: {block}")
        yield Passage(first[2:], tuple((LABELS[line[0]], line[2:]) for line in rest))


def training_passages(seed: int) -> list[Passage]:
    """What is written, but for the development file, and as many generated passages."""
    written = [
        passage
        for path in sorted(WRITTEN.glob("*.txt"))
        if path != DEVELOPMENT
        for passage in read_written(path)
    ]
    return [*written, *generate(seed, len(written))]


def validation_passages(seed: int) -> list[Passage]:
    """Generated passages of topics that are not trained on."""
    return generate(seed + 1, 60, validation=True)


def write(path: Path, passages: Iterable[Passage], seed: int) -> int:
    """Write passages in a random order as a file of claims; returns the number of claims."""
    shuffled = list(passages)
    Random(seed).shuffle(shuffled)
    rows = [
        {"claim": claim, "evidence": passage.evidence, "label": label}
        for passage in shuffled
        for label, claim in passage.claims
    ]
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows, start=1):
            line = {"id": f"{path.stem}-{number:04}", **row}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the directory of the three files")
    parser.add_argument("--seed", type=int, default=18, help="of what is generated (default: 18)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, passages in (
        ("train", training_passages(arguments.seed)),
        ("validation", validation_passages(arguments.seed)),
        ("development", read_written(DEVELOPMENT)),
    ):
        path = arguments.out / f"{name}.jsonl"
        print(f"{path}: {write(path, passages, arguments.seed)} claims")


if __name__ == "__main__":
    main()
