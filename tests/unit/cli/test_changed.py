"""A file that was changed, or is read in another way, while its run is unfinished."""

from pathlib import Path

import pytest

from services.cli.changed import refuse_changed_file
from services.contracts import ContextSpec, PromptSpec, RunAnnouncement, load_settings
from services.contracts.errors import InputError
from services.producer import ClaimsFile, Selection, Source, Submission
from services.store import Incoming, Store


@pytest.mark.parametrize(
    ("claim", "columns", "says"),
    [
        (
            "A.",
            {"evidence": "more"},
            "is read with another --column since it was submitted as run-",
        ),
        ("B.", {}, r"has changed, or is read with other flags \(--column, .*\), since it was sub"),
    ],
)
def test_the_refusal_names_the_flag_where_only_one_differs(
    claim: str, columns: dict[str, str], says: str, tmp_path: Path, context: ContextSpec
) -> None:
    path = tmp_path / "claims.csv"
    path.write_text("claim,more\nA.,E.\n")
    store = Store.open(load_settings(store_url=str(tmp_path / "store.sqlite")), create=True)
    with Source.open(str(path)) as source:
        run = Submission(ClaimsFile(source, PromptSpec()), context).run
    store.write(Incoming.of([RunAnnouncement(run=run, submission_id="sub-1")]))
    path.write_text(f"claim,more\n{claim},E.\n")
    with Source.open(str(path)) as source:
        file = ClaimsFile(source, PromptSpec(), Selection(columns=columns))
        with pytest.raises(InputError, match=says):
            refuse_changed_file(Submission(file, context), store)
    store.close()
