"""PostgreSQL as people have it: behind a pool, in another encoding, with TLS."""

from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from services.contracts import (
    ContextSpec,
    PromptSpec,
    Run,
    RunAnnouncement,
    Totals,
    Verdict,
    VerdictBatch,
    load_settings,
)
from services.contracts.errors import StoreError, StoreRefused
from services.store import Incoming, Store, run_status
from tests.certificates import Authority
from tests.integration.postgres import PostgreSQL

Opener = Callable[[str], Store]


@pytest.fixture
def opened() -> Iterator[Opener]:
    """Opens stores, and closes them after the test."""
    stores: list[Store] = []

    def open_store(url: str) -> Store:
        stores.append(Store.open(load_settings(store_url=url)))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


@pytest.fixture(scope="module")
def run(small_model: Path) -> Run:
    context = ContextSpec(model=str(small_model))
    return Run(source="f", source_digest="d", context=context, prompt=PromptSpec())


def verdicts(run: Run, number: int, text: str = "Łódź is a city. 東京 too.") -> Incoming:
    """A batch of one claim."""
    verdict = Verdict(
        claim_id=f"c{number}",
        position=number,
        text=text,
        label="SUPPORTS",
        probabilities=(1.0, 0.0, 0.0),
        mass=1.0,
        raw_text="True",
        prompt_tokens=1,
    )
    batch = VerdictBatch(
        run_id=run.run_id,
        batch_id=f"b-{number}",
        labels=run.prompt.label_names,
        verdicts=(verdict,),
        worker_id="w",
        device="d",
        attempt=1,
        engine_seconds=1.0,
    )
    totals = Totals(lines=100, claims=100, repeated=0, rejected=0)
    announcement = RunAnnouncement(run=run, submission_id="sub-1", totals=totals)
    return Incoming([announcement], [batch], [])


def test_a_pool_that_gives_connections_for_one_transaction_is_a_store_as_any(
    postgresql: PostgreSQL, opened: Opener, run: Run
) -> None:
    database = postgresql.new_database().partition("?")[0]
    with postgresql.pooled() as pool:
        stores = [opened(f"{database}?{pool}") for _ in range(3)]
        for number in range(30):  # what psycopg does often, it would prepare on one connection
            store = stores[number % 3]
            store.write(verdicts(run, number))
            status = run_status(stores[(number + 1) % 3], run.run_id)
            assert status is not None and status.done == number + 1


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII", "EUC_JP"])
def test_a_database_that_cannot_hold_every_claim_is_refused_when_it_is_opened(
    encoding: str, postgresql: PostgreSQL, opened: Opener
) -> None:
    with pytest.raises(StoreError) as refused:
        opened(postgresql.new_database(encoding))
    said = str(refused.value)
    assert f"has the encoding {encoding}" in said and "createdb -E UTF8 -T template0" in said


def test_a_password_a_user_or_a_database_that_is_wrong_is_reported_with_the_next_step(
    own_server: PostgreSQL, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = own_server.new_database()
    with psycopg.connect(url) as server:
        server.execute("CREATE ROLE reader LOGIN PASSWORD 'right'")
    own_server.require_passwords("reader")
    reader = url.replace("keepwarm@", "reader@")
    with pytest.raises(StoreError, match="no password supplied. Set the right password with KEEP"):
        opened(reader)
    monkeypatch.setenv("KEEPWARM_STORE_PASSWORD", "wrong")
    with pytest.raises(StoreError, match="KEEPWARM_STORE_PASSWORD or KEEPWARM_STORE_PASSWORD_FILE"):
        opened(reader)
    with pytest.raises(StoreError, match="Create it with createdb"):
        opened(url.replace("/keepwarm1", "/none"))
    with pytest.raises(StoreError, match="Create this user"):
        opened(url.replace("keepwarm@", "nobody@"))
    monkeypatch.setenv("KEEPWARM_STORE_PASSWORD", "right")
    with pytest.raises(StoreError, match="permission denied for schema public. Use another user"):
        opened(reader)
    with pytest.raises(StoreError, match="has no runs yet"):
        Store.open(load_settings(store_url=reader), create=False)


@pytest.mark.parametrize(
    "changes",
    [{"text": "NUL \0"}, {"text": "lone \ud800"}, {"position": 2**63}, {"text": None}],
    ids=["NUL", "a lone surrogate", "over 64 bits", "NULL"],
)
def test_a_value_that_it_cannot_hold_is_refused_and_not_waited_for(
    changes: dict[str, object], postgresql: PostgreSQL, opened: Opener, run: Run
) -> None:
    store = opened(postgresql.new_database())
    wrong = verdicts(run, 0)
    (batch,) = wrong.verdicts
    verdict = Verdict.model_construct(**{**dict(batch.verdicts[0]), **changes})
    wrong.verdicts = [VerdictBatch.model_construct(**{**dict(batch), "verdicts": (verdict,)})]
    with pytest.raises(StoreRefused, match="refuses a value") as refused:
        store.write(wrong)
    assert "\n" not in str(refused.value)  # what follows quotes the row
    store.write(verdicts(run, 0))


def test_what_may_be_mended_is_not_a_refusal(
    postgresql: PostgreSQL, opened: Opener, run: Run
) -> None:
    url = postgresql.new_database()
    store = opened(f"{url}&options=-clock_timeout%3D100")
    with psycopg.connect(url) as other:
        other.execute("LOCK TABLE outcomes IN EXCLUSIVE MODE")
        with pytest.raises(StoreError) as failed:
            store.write(verdicts(run, 0))
    assert not isinstance(failed.value, StoreRefused)
    with psycopg.connect(url) as other:
        other.execute("ALTER TABLE deliveries RENAME TO hidden")
    with pytest.raises(StoreError) as failed:
        store.write(verdicts(run, 0))
    assert not isinstance(failed.value, StoreRefused)


def test_a_client_encoding_in_the_environment_changes_nothing(
    postgresql: PostgreSQL, opened: Opener, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    store = opened(postgresql.new_database())
    store.write(verdicts(run, 0))
    assert store.texts(run.run_id, ["c0"]) == {"c0": "Łódź is a city. 東京 too."}


# TLS, on a server of its own.


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def own_server(postgresql: PostgreSQL) -> Iterator[PostgreSQL]:
    """Beside the others' server, which shows that there is one to start."""
    assert postgresql
    with PostgreSQL() as server:
        yield server


@pytest.mark.parametrize(
    ("host", "years", "says"),
    [
        ("DNS:elsewhere.example", None, "Use a name that the certificate contains"),
        ("DNS:localhost", (2001, 2002), "Its certificate has expired, or is not signed"),
    ],
)
def test_a_certificate_that_cannot_be_used_is_reported(
    host: str,
    years: tuple[int, int] | None,
    says: str,
    own_server: PostgreSQL,
    authority: Authority,
    opened: Opener,
) -> None:
    shows = authority.sign(f"database-{years}", host=host, years=years)
    url = own_server.tls(authority.certificate, shows, wants_certificate=False)
    with pytest.raises(StoreError, match=says):
        opened(f"{url}?sslmode=verify-full&sslrootcert={authority.certificate.file}")


def test_tls_and_a_client_certificate_are_named_in_the_url(
    own_server: PostgreSQL, authority: Authority, opened: Opener, tmp_path: Path
) -> None:
    shows = authority.sign("database")
    url = own_server.tls(authority.certificate, shows, wants_certificate=True)
    url += f"?sslmode=verify-full&sslrootcert={authority.certificate.file}"
    with pytest.raises(StoreError, match="Set sslcert, and sslkey for its key, in the URL"):
        opened(url)
    ours = authority.sign("keepwarm")
    opened(f"{url}&sslcert={ours.file}&sslkey={ours.key}")
    stranger = Authority(tmp_path, "stranger").certificate.file
    with pytest.raises(StoreError, match="not signed by an authority in the URL's sslrootcert"):
        opened(url.replace(str(authority.certificate.file), str(stranger)))
