"""The share of the model's probability that the label words hold, and what it says instead."""

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection, select

from services.contracts.label_mass import said_instead
from services.store.schema import outcomes

ENOUGH_VERDICTS = 64
"""A batch of the default size. A median over so many is not one odd claim, and costs seconds."""
_FEWEST_VERDICTS = 8


class LowMass(BaseModel):
    """The label words hold nearly nothing of the probability: the model answers something else."""

    model_config = ConfigDict(frozen=True)

    claims: int
    """How many verdicts this is of."""
    median: float
    says: str
    """What the model says most often."""

    def __str__(self) -> str:
        percent = 100 * self.median
        share = "less than 0.01" if percent < 0.01 else f"{percent:.2g}"
        return (
            f"the labels hold {share} % of the probability; the model says {self.says!r} "
            f"(median of {self.claims} claims)"
        )


def low_mass(connection: Connection, run_key: int, *, complete: bool) -> LowMass | None:
    """Of some of the run's verdicts; None where the labels hold more, or verdicts are too few to
    tell before the run is `complete`. Reads `ENOUGH_VERDICTS` rows, however large the run is.
    """
    rows = connection.execute(
        select(outcomes.c.mass, outcomes.c.raw_text)
        .where(outcomes.c.run_key == run_key, outcomes.c.label.is_not(None))
        .order_by(outcomes.c.claim_id)  # by the key: no sort, and no scan of other runs
        .limit(ENOUGH_VERDICTS)
    ).all()
    if not rows or (len(rows) < _FEWEST_VERDICTS and not complete):
        return None
    found = said_instead([(row.mass, row.raw_text) for row in rows])
    return found and LowMass(claims=len(rows), median=found[0], says=found[1])
