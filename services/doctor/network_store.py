"""The warning about a store on a network file system."""

from pathlib import Path

from services.contracts import Settings
from services.doctor.findings import shared_file_system
from services.store.database import checked_url, redacted


def network_store_warning(settings: Settings) -> str | None:
    """A warning when the store is an SQLite file on a network file system; None otherwise."""
    url = checked_url(settings)
    if url.get_backend_name() != "sqlite":
        return None
    kind = shared_file_system(Path(url.database or ""))
    return kind and (
        f"the store {redacted(url)} is on {kind}, where SQLite can lose data; name a file on a "
        "local disk with --store, or use PostgreSQL"
    )
