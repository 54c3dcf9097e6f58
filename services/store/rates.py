"""How fast devices answered claims of a context, as stored."""

from pydantic import BaseModel, ConfigDict
from sqlalchemy import func, select

from services.store.progress import known_runs
from services.store.schema import deliveries
from services.store.store import Store


class DeviceRate(BaseModel):
    """The work of one kind of device on a context: `seconds` is the time of its workers, one after
    the other, each from its first request to its last verdict stored, pauses included.
    """

    model_config = ConfigDict(frozen=True)

    device: str
    claims: int
    prompt_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.prompt_tokens / self.seconds


def device_rates(store: Store, context_id: str) -> tuple[DeviceRate, ...]:
    """The measured rates of a context in all its runs, the device with most claims first."""
    keys = [
        known.run_key
        for known in known_runs(store)
        if known.run is not None and known.run.context.context_id == context_id
    ]
    seconds = func.max(deliveries.c.received_at) - func.min(
        deliveries.c.received_at - deliveries.c.engine_seconds
    )
    by_worker = (
        select(
            deliveries.c.device,
            func.sum(deliveries.c.fresh + deliveries.c.duplicates).label("claims"),
            func.sum(deliveries.c.prompt_tokens).label("prompt_tokens"),
            seconds.label("seconds"),
        )
        .where(deliveries.c.run_key.in_(keys))
        .group_by(deliveries.c.worker_id, deliveries.c.device)
        .subquery()
    )
    query = (
        select(
            by_worker.c.device,
            func.sum(by_worker.c.claims).label("claims"),
            func.sum(by_worker.c.prompt_tokens).label("prompt_tokens"),
            func.sum(by_worker.c.seconds).label("seconds"),
        )
        .group_by(by_worker.c.device)
        .order_by(func.sum(by_worker.c.claims).desc())
    )
    with store.transaction() as connection:
        rows = connection.execute(query).all()
    return tuple(DeviceRate.model_validate(row._mapping) for row in rows if row.seconds > 0)
