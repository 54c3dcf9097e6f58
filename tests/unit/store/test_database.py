"""How a database is connected to."""

import psycopg
import pytest

from services.contracts import load_settings
from services.store.database import open_engine


@pytest.mark.parametrize(("query", "idle"), [("", 20), ("?keepalives_idle=5", "5")])
def test_a_postgresql_that_stops_answering_is_noticed_unless_its_url_sets_other_keepalives(
    query: str, idle: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def connect(*_: object, **options: object) -> None:
        asked.update(options)
        raise psycopg.OperationalError("no server here")

    monkeypatch.setattr(psycopg, "connect", connect)
    settings = load_settings(store_url=f"postgresql://u@127.0.0.1/d{query}")
    with pytest.raises(Exception, match="no server here"):
        open_engine(settings, create=False).connect()
    assert (asked["keepalives_idle"], asked["tcp_user_timeout"]) == (idle, 60_000)
