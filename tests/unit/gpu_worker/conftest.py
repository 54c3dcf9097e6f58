"""Tokenizers of the common families, a device and a context, a batch, a broker that records."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from services.broker import Delivery, Outgoing
from services.contracts import Claim, ClaimBatch, Run, Verdict, encode, topology
from services.contracts.wire import PROOFS_VERSION
from services.gpu_worker.crashes import CrashRecords, Key
from services.node.device import Device

PROOF_KEY = bytes(range(16))
DEVICE = Device("cpu", "Xeon", 2**34, (0,))


@pytest.fixture(scope="session")
def batch(run: Run) -> ClaimBatch:
    claims = tuple(
        Claim(claim_id=f"c{n}", position=n, text=f"Claim {n}.", evidence=f"Evidence {n}.")
        for n in range(7)
    )
    return ClaimBatch(
        schema_version=PROOFS_VERSION,
        run=run,
        submission_id="sub-1",
        batch_id="00000000-0",
        claims=claims,
        proofs=tuple(claim.proof(PROOF_KEY) for claim in claims),
    )


@pytest.fixture
def crashes(tmp_path: Path) -> Iterator[CrashRecords]:
    directory = tmp_path / "node"
    directory.mkdir(mode=0o700)
    record = CrashRecords(directory, "worker-1")
    yield record
    record.close()


def died_asking(runtime_dir: Path, name: str, keys: Iterable[Key], *, alone: bool = False) -> Path:
    """A worker that was killed while it asked about these claims, but for the time that a process
    takes: what it left, and nobody holds the lock.
    """
    dead = CrashRecords(runtime_dir, name)
    left = dead._own_dir / "0.json"
    with dead.recorded(keys, alone=alone):
        record = left.read_text()
    left.write_text(record)
    assert dead._lock is not None
    os.close(dead._lock)
    return dead._own_dir


class RecordingBroker:
    """A consumer and publisher that records what is settled and published. `confirm` confirms."""

    def __init__(self) -> None:
        self.settled: list[tuple[str, int]] = []
        self.messages: list[Outgoing] = []
        self.prefetch = 1

    def set_prefetch(self, prefetch: int) -> None:
        self.prefetch = prefetch

    def acknowledge(self, deliveries: Iterable[Delivery]) -> None:
        self.settled += [("acknowledged", delivery.tag) for delivery in deliveries]

    def stop_taking(self, timeout_seconds: float) -> None:
        self.settled.append(("stopped taking", 0))

    def give_back(self, deliveries: Iterable[Delivery]) -> None:
        self.settled += [("given back", delivery.tag) for delivery in deliveries]

    def publish(self, message: Outgoing) -> None:
        self.messages.append(message)

    def confirm(self, message: Outgoing) -> None:
        assert message.on_confirmed is not None
        message.on_confirmed()

    def to(self, queue: str) -> list[Outgoing]:
        return [message for message in self.messages if message.routing_key == queue]


@pytest.fixture
def broker() -> RecordingBroker:
    return RecordingBroker()


def verdict(claim: Claim, label: str = "SUPPORTS") -> Verdict:
    return Verdict(
        claim_id=claim.claim_id,
        position=claim.position,
        text=claim.text,
        gold=claim.gold,
        label=label,
        probabilities=(0.5, 0.25, 0.25),
        mass=0.75,
        raw_text="True",
        prompt_tokens=9,
    )


def delivered(
    batch: ClaimBatch, *, earlier: int = 0, failures: int = 0, **changes: object
) -> Delivery:
    """The batch as the broker delivers it, with `earlier` deliveries before this one."""
    delivery = Delivery(
        queue=topology.claims_queue(batch.run.context.context_id),
        body=encode(batch),
        headers={"x-delivery-count": earlier, topology.FAILURES_HEADER: failures},
        message_id="m-1",
        redelivered=earlier > 0,
        tag=7,
        epoch=1,
        kind="ClaimBatch",
    )
    return replace(delivery, **changes)  # type: ignore[arg-type]
