"""`keepwarm dead`: dead claims, and messages that no service could use."""

import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.text import Text

from services.broker import BrokerAddress, Declares, Delivery, Outgoing, Publisher
from services.broker.dead_messages import (
    MAX_SHOWN,
    Action,
    DeadMessages,
    origin,
    reason,
    retry_error,
    short_id,
)
from services.cli.logs import configure_logs
from services.cli.options import BrokerOption, StoreOption
from services.cli.printable import printable
from services.cli.screen import Screen, add_numbers, plain_table
from services.cli.screen import show as show_on
from services.cli.stores import readable_stores, store_of_run
from services.contracts import (
    ClaimBatch,
    Run,
    Settings,
    load_settings,
    topology,
)
from services.contracts.claims import split_claims
from services.contracts.errors import StoreError, UsageError
from services.contracts.proofs import new_key
from services.store import DeadRow, KnownRun, Store, dead_claims, drop_dead, reopen_dead

_MESSAGE = "msg-"
_SHOWN_CHARS = 60
_SHOWN_BYTES = 4_096
_FLUSH_SECONDS = 30.0

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN|MESSAGE", help="A run, or one message's id (msg-…).")
]
OptionalRunArgument = Annotated[
    str | None,
    typer.Argument(metavar="RUN|MESSAGE", help="A run, or one message's id (msg-…)."),
]
ReasonOption = Annotated[
    str | None,
    typer.Option(
        "--reason",
        help="Messages whose reason contains this text (case is ignored).",
        show_default=False,
    ),
]
OfRunOption = Annotated[
    str | None, typer.Option("--run", help="Messages of this run (its complete id).")
]
AllOption = Annotated[bool, typer.Option("--all", help="All messages.")]
ClaimsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CLAIM", help="Ids of claims of that run. Default: all its dead claims."
    ),
]


def show(
    what: RunArgument,
    claim: Annotated[
        str | None, typer.Argument(metavar="CLAIM", help="The id of a claim of that run.")
    ] = None,
    broker: BrokerOption = None,
    store: StoreOption = None,
) -> None:
    """Show one dead claim (`dead show RUN CLAIM`) or message (`dead show msg-…`)."""
    settings = _settings(broker, store)
    if what.startswith(_MESSAGE):
        with _messages(settings) as messages:
            message = _picked(messages, what)
            _show(f"from: {origin(message)}\nreason: {reason(message)}")
            _show(f"type: {message.kind}\nmessage_id: {message.message_id}")
            _show(message.body[:_SHOWN_BYTES].decode(errors="replace"))
        return
    if claim is None:
        raise UsageError("name a claim of the run: `keepwarm dead show RUN CLAIM`")
    with _claims(settings, what, [claim]) as (_, _, rows):
        (row,) = rows
    _show(f"run: {row.run_id}\nclaim: {row.claim.claim_id} (line {row.claim.position + 1})")
    _show(f"reason: {row.reason.value}\nengine failures: {row.failures}\n{row.detail}")
    _show(f"text: {row.claim.text}")
    if row.claim.evidence:
        _show(f"evidence: {row.claim.evidence}")


def retry(
    what: OptionalRunArgument = None,
    claims: ClaimsArgument = None,
    of_reason: ReasonOption = None,
    of_run: OfRunOption = None,
    every: AllOption = False,
    broker: BrokerOption = None,
    store: StoreOption = None,
) -> None:
    """Send dead claims to the workers again, and dead messages to the queue of their type.

    The run is incomplete until these claims have an outcome. A run's announcement is not sent
    again: submit the file again.
    """
    settings = _settings(broker, store)
    selected = _message_filter(what, of_reason, of_run, every=every)
    if selected is not None:
        _retry_messages(settings, selected, one=what)
        return
    assert what is not None
    with _claims(settings, what, claims or ()) as (database, run, rows):
        if run.run is None:
            raise StoreError(f"{run.run_id} was never announced; submit its file again instead")
        submission_id = f"retry-{secrets.token_hex(8)}"
        proof_key = new_key()
        database.add_submission(rows[0].run_key, submission_id, proof_key)
        _publish(settings, run.run, rows, submission_id, bytes.fromhex(proof_key))
        # Last: after an interrupted retry they are still dead, and the retry can be repeated.
        reopen_dead(database, rows)
    _show(f"{len(rows):,} claims of {run.run_id} are sent again")


def drop(
    what: OptionalRunArgument = None,
    claims: ClaimsArgument = None,
    of_reason: ReasonOption = None,
    of_run: OfRunOption = None,
    every: AllOption = False,
    broker: BrokerOption = None,
    store: StoreOption = None,
) -> None:
    """Delete dead messages, and no longer list dead claims; they stay dead in the results."""
    settings = _settings(broker, store)
    selected = _message_filter(what, of_reason, of_run, every=every)
    if selected is not None:
        with _messages(settings) as messages:
            settled = messages.settle(lambda message: "drop" if selected(message) else "keep")
        _refuse_none(settled["drop"], what)
        _show(f"{settled['drop']:,} messages are deleted, {settled['keep']:,} are left")
        return
    assert what is not None
    with _claims(settings, what, claims or ()) as (database, run, rows):
        drop_dead(database, rows)
    _show(f"{len(rows):,} claims of {run.run_id} are no longer listed")


def list(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="Only claims of this run.")
    ] = None,
    broker: BrokerOption = None,
    store: StoreOption = None,
) -> None:
    """List dead claims and, if a broker is set, messages that no service could use."""
    settings = _settings(broker, store)
    rows = _listed(settings, run)
    console = Screen()
    table = plain_table()
    table.add_column("run", no_wrap=True)
    table.add_column("claim", overflow="fold")
    table.add_column("reason", no_wrap=True)
    add_numbers(table, "failures")
    table.add_column("what", overflow="fold")
    for row in rows:
        table.add_row(
            row.run_id,
            row.claim.claim_id,
            row.reason.value,
            str(row.failures),
            row.detail.partition("\n")[0][:_SHOWN_CHARS],
        )
    show_on(console, table if rows else Text("no dead claims"))
    if settings.broker_url is not None and run is None:
        with _messages(settings) as messages:
            _list_messages(console, messages)


def _list_messages(console: Screen, messages: DeadMessages) -> None:
    found = messages.first()
    table = plain_table()
    table.add_column("message", no_wrap=True)
    table.add_column("from", overflow="fold")
    add_numbers(table, "bytes")
    table.add_column("reason", overflow="fold")
    for each, message in found.items():
        table.add_row(
            each,
            origin(message),
            f"{len(message.body):,}",
            reason(message),
        )
    show_on(console, table if found else Text("no dead messages"))
    if len(found) == MAX_SHOWN:
        console.print(f"only the first {MAX_SHOWN:,} are shown")


def _show(text: str) -> None:
    print(printable(text))


def _settings(broker: str | None, store: str | None) -> Settings:
    settings = load_settings(broker_url=broker, store_url=store)
    configure_logs(settings)
    return settings


def _messages(settings: Settings) -> DeadMessages:
    address = BrokerAddress.from_settings(settings)
    return DeadMessages(address, settings.broker_connect_timeout_seconds)


def _picked(messages: DeadMessages, wanted: str) -> Delivery:
    found = messages.first()
    if wanted not in found:
        raise UsageError(f"there is no dead message {wanted}; `keepwarm dead list` lists them")
    return found[wanted]


def _message_filter(
    what: str | None, of_reason: str | None, of_run: str | None, *, every: bool
) -> Callable[[Delivery], bool] | None:
    """Selects dead messages; None when the arguments select claims."""
    one = what is not None and what.startswith(_MESSAGE)
    by_option = every or of_reason is not None or of_run is not None
    if what is None and not by_option:
        raise UsageError("name a run or a message, or use --reason, --run or --all for messages")
    if what is not None and by_option:
        raise UsageError("--reason, --run and --all select messages; leave the argument out")
    if what is not None and not one:
        return None

    def is_selected(message: Delivery) -> bool:
        if one:
            return short_id(message) == what
        return (of_reason is None or of_reason.casefold() in reason(message).casefold()) and (
            of_run is None or message.message_id.partition("/")[0] == of_run
        )

    return is_selected


def _retry_messages(
    settings: Settings, selected: Callable[[Delivery], bool], *, one: str | None
) -> None:
    errors: Counter[str] = Counter()

    def action(message: Delivery) -> Action:
        if not selected(message):
            return "keep"
        error = retry_error(message)
        if error is not None:
            errors[error] += 1
            return "keep"
        return "retry"

    with _messages(settings) as messages:
        settled = messages.settle(action)
    for error, count in errors.items():
        if one is not None:
            raise UsageError(f"{one} is not sent again: {error}")
        _show(f"left: {count:,} of this kind: {error}")
    if not errors:
        _refuse_none(settled["retry"], one)
    _show(f"{settled['retry']:,} messages are sent again, {settled['keep']:,} are left")


def _refuse_none(settled: int, one: str | None) -> None:
    if not settled:
        which = "matches" if one is None else f"has the id {one}"
        raise UsageError(f"no dead message {which}; `keepwarm dead list` lists them")


def _listed(settings: Settings, run: str | None) -> Sequence[DeadRow]:
    if run is not None:
        with store_of_run(settings, run) as (database, known):
            return dead_claims(database, known)
    return [row for store in readable_stores(settings) for row in dead_claims(store)]


@contextmanager
def _claims(
    settings: Settings, wanted: str, claim_ids: Sequence[str]
) -> Iterator[tuple[Store, KnownRun, Sequence[DeadRow]]]:
    """Dead claims of a run. Raises StoreError when there are none, or an id is not among them."""
    with store_of_run(settings, wanted) as (database, known):
        rows = dead_claims(database, known, claim_ids)
        missing = set(claim_ids) - {row.claim.claim_id for row in rows}
        if missing or not rows:
            what = ", ".join(sorted(missing)) or "any claim"
            raise StoreError(
                f"{known.run_id} does not have {what} among its dead claims; `keepwarm dead list` "
                "lists them"
            )
        yield database, known, rows


def _publish(
    settings: Settings,
    run: Run,
    rows: Sequence[DeadRow],
    submission_id: str,
    proof_key: bytes,
) -> None:
    declares = Declares("if-missing", (run.context.context_id,))
    with Publisher(
        BrokerAddress.from_settings(settings),
        "dead-retry",
        window=settings.publish_window,
        declares=declares,
    ).open(settings.broker_connect_timeout_seconds) as publisher:
        claims_of_rows = (row.claim for row in rows)
        for index, claims in enumerate(split_claims(claims_of_rows, settings.batch_size)):
            batch = ClaimBatch.with_proofs(
                run, submission_id, f"{submission_id}-{index}", claims, proof_key
            )
            publisher.publish(
                Outgoing.of(
                    batch,
                    topology.CLAIMS_EXCHANGE,
                    topology.claims_queue(run.context.context_id),
                    message_id=f"{run.run_id}/{batch.batch_id}",
                )
            )
        publisher.flush(_FLUSH_SECONDS)
