"""What a store is like, found out without a change to it."""

from services.collector.database import open_engine
from services.collector.schema import SCHEMA_VERSION
from services.collector.store import Store
from services.collector.versions import UPGRADABLE, refusal, version_of
from services.contracts import Settings


def schema_version(settings: Settings) -> int | None:
    """That of the store, which is this Keepwarm's or one that it brings up to date; None: it is
    empty. Raises StoreError when it cannot be used.
    """
    engine = open_engine(settings, create=False, as_it_is=True)
    try:
        with Store(engine).transaction() as connection:
            version = version_of(connection)
    finally:
        engine.dispose()
    if version != SCHEMA_VERSION and version not in UPGRADABLE:
        raise refusal(engine.url, version)
    return version
