"""The label words' share of the model's probability, and its answer where that is low."""

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection, bindparam, select

from services.contracts.label_mass import find_low_mass
from services.store.schema import outcomes

ENOUGH_VERDICTS = 64
"""The default batch size. A median of this many is robust to single claims."""
_FEWEST_VERDICTS = 8
_some = (
    select(outcomes.c.mass, outcomes.c.raw_text, outcomes.c.label)
    .where(outcomes.c.run_key == bindparam("run_key"))
    .order_by(outcomes.c.claim_id)  # by the key: no sort, and no scan of other runs
    .limit(1_000)  # a run may have any number of dead claims
    .subquery()
)
_SOME_VERDICTS = (
    select(_some.c.mass, _some.c.raw_text).where(_some.c.label.is_not(None)).limit(ENOUGH_VERDICTS)
)


class LowMass(BaseModel):
    """The label words have almost no probability: the model answers something else."""

    model_config = ConfigDict(frozen=True)

    claims: int
    """The number of verdicts examined."""
    median: float
    says: str
    """The model's most frequent answer."""

    def __str__(self) -> str:
        percent = 100 * self.median
        share = "less than 0.01" if percent < 0.01 else f"{percent:.2g}"
        return (
            f"the labels have {share} % of the probability; the model answers {self.says!r} "
            f"(median of {self.claims} claims)"
        )


def low_mass(connection: Connection, run_key: int, *, complete: bool) -> LowMass | None:
    """Examine some of the run's verdicts; None if the labels have more probability, or if there
    are too few verdicts before the run is `complete`.
    """
    rows = connection.execute(_SOME_VERDICTS, {"run_key": run_key}).all()
    if not rows or (len(rows) < _FEWEST_VERDICTS and not complete):
        return None
    found = find_low_mass([(row.mass, row.raw_text) for row in rows])
    return found and LowMass(claims=len(rows), median=found[0], says=found[1])
