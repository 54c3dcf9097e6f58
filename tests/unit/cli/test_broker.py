import base64
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.broker.administration import password_hash
from services.contracts.topology import CORE_QUEUES
from tests.unit.management_double import ManagementDouble, management_double

ROLES = ("producer", "worker", "collector", "operator")
Command = Callable[..., int]


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[ManagementDouble]:
    with management_double() as double:
        double.admin = ("root", "hunter2")
        monkeypatch.setenv("KEEPWARM_BROKER_ADMIN_PASSWORD", "hunter2")
        # The double speaks no AMQP; tests/integration/test_roles.py has a node that does.
        monkeypatch.setattr("services.cli.broker._declare_topology", lambda *_: None)
        yield double


@pytest.fixture
def setup(broker: ManagementDouble, keepwarm: Command) -> Command:
    return lambda *flags: keepwarm(
        "broker", "setup", "--management", broker.url, "--admin", "root", *flags
    )


def passwords(directory: str = "secrets") -> dict[str, str]:
    return {role: Path(directory, f"{role}.password").read_text() for role in ROLES}


def test_every_role_gets_a_user_and_a_password_for_its_owners_eyes(
    broker: ManagementDouble, setup: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup() == 0
    assert stat.S_IMODE(Path("secrets").stat().st_mode) == 0o700
    assert len(set(passwords().values())) == len(ROLES)
    shown = capsys.readouterr()
    for role, password in passwords().items():
        assert stat.S_IMODE(Path(f"secrets/{role}.password").stat().st_mode) == 0o600
        assert len(password.strip()) >= 40
        assert password.strip() not in shown.out + shown.err
        assert f"secrets/{role}.password" in shown.out
        assert (
            f"\nKEEPWARM_BROKER_URL=amqp://keepwarm-{role}@127.0.0.1:5672/keepwarm\n" in shown.out
        )
        assert f"/api/users/keepwarm-{role}" in broker.things
    assert "hunter2" not in shown.out + shown.err


def test_again_it_changes_nothing(
    broker: ManagementDouble, setup: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    setup()
    before = passwords()
    broker.puts.clear()
    capsys.readouterr()
    assert setup() == 0
    assert passwords() == before
    again = (
        "permissions/keepwarm/",
        "user-limits/keepwarm-",
        "vhost-limits/keepwarm/",
        "policies/",
    )
    assert all(path.removeprefix("/api/").startswith(again) for path in broker.puts)
    assert capsys.readouterr().out.count(" kept ") == len(ROLES)


def test_what_a_password_can_use_up_is_bounded_by_the_number_of_workers(
    broker: ManagementDouble, setup: Command
) -> None:
    assert setup("--workers", "10") == 0
    for role in ROLES:
        connections = 60 if role == "worker" else 300
        limits = f"/api/user-limits/keepwarm-{role}"
        assert broker.things[f"{limits}/max-connections"] == {"value": connections}
        assert broker.things[f"{limits}/max-channels"] == {"value": 2 * connections}
    whole = "/api/vhost-limits/keepwarm"
    assert broker.things[f"{whole}/max-connections"] == {"value": 960}
    assert broker.things[f"{whole}/max-queues"] == {"value": 10_020}
    for name, queue in (("notices", "notices.w"), ("presence", "presence.c")):
        policy = broker.things[f"/api/policies/keepwarm/keepwarm-{name}"]
        assert re.search(policy["pattern"], queue) and policy["apply-to"] == "queues"
        assert policy["definition"].keys() == {"max-length", "max-length-bytes", "expires"}
        for lasting in (*CORE_QUEUES, "claims.ctx-1"):
            assert not re.search(policy["pattern"], lasting)


def test_renewed_passwords_are_new_on_disk_and_on_the_broker(
    broker: ManagementDouble, setup: Command
) -> None:
    setup()
    before = passwords()
    hashes = {role: broker.things[f"/api/users/keepwarm-{role}"] for role in ROLES}
    assert setup("--renew") == 0
    for role in ROLES:
        assert passwords()[role] != before[role]
        assert broker.things[f"/api/users/keepwarm-{role}"] != hashes[role]


def test_passwords_that_are_there_are_used_so_that_a_second_broker_has_the_same(
    broker: ManagementDouble, setup: Command
) -> None:
    setup()
    before = passwords()
    broker.things.clear()
    assert setup() == 0
    assert passwords() == before


def test_a_password_that_a_person_wrote_is_used(broker: ManagementDouble, setup: Command) -> None:
    Path("own").mkdir(mode=0o700)
    file = Path("own/worker.password")
    file.touch(mode=0o600)
    file.write_bytes("pässword\r\n".encode())
    assert setup("--secrets", "own", "--vhost", "trial") == 0
    stored = broker.things["/api/users/trial-worker"]["password_hash"]
    assert stored == password_hash("pässword", salt=base64.b64decode(stored)[:4])
    assert file.read_bytes() == "pässword\r\n".encode()


def test_a_user_whose_password_nobody_here_knows_is_not_taken_over(
    broker: ManagementDouble, setup: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    setup()
    Path("secrets/worker.password").unlink()
    broker.puts.clear()
    assert setup() == 2
    said = capsys.readouterr().err
    assert "secrets/worker.password is missing" in said
    assert "--renew" in said
    assert not broker.puts
    assert not Path("secrets/worker.password").exists()


@pytest.mark.parametrize(
    ("mode", "content", "says"),
    [
        (0o640, "password\n", "chmod 600 secrets/worker.password"),
        (0o600, "\n", "secrets/worker.password is empty"),
    ],
)
def test_a_password_file_that_is_no_secret_is_refused(
    mode: int, content: str, says: str, setup: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    setup()
    Path("secrets/worker.password").write_text(content)
    Path("secrets/worker.password").chmod(mode)
    assert setup() == 2
    assert says in capsys.readouterr().err


def test_a_directory_that_others_may_enter_is_refused(
    setup: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("secrets").mkdir()
    Path("secrets").chmod(0o755)
    assert setup() == 2
    assert "chmod 700 secrets" in capsys.readouterr().err
    assert not list(Path("secrets").iterdir())


def test_a_directory_that_cannot_be_made_ends_with_6(
    setup: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("")
    assert setup("--secrets", "file/secrets") == 6
    assert "--secrets" in capsys.readouterr().err


def test_a_wrong_administrators_password_ends_with_5_before_anything_is_written(
    setup: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KEEPWARM_BROKER_ADMIN_PASSWORD", "hunter3")
    assert setup() == 5
    said = capsys.readouterr().err
    assert "KEEPWARM_BROKER_ADMIN_PASSWORD" in said
    assert "hunter3" not in said
    assert not Path("secrets").exists()


def test_the_administrators_password_may_be_in_a_file(
    setup: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("KEEPWARM_BROKER_ADMIN_PASSWORD")
    (tmp_path / "admin").write_text("hunter2\n")
    monkeypatch.setenv("KEEPWARM_BROKER_ADMIN_PASSWORD_FILE", "admin")
    assert setup() == 0


def test_guest_with_its_first_password_is_accepted_and_reported(
    broker: ManagementDouble,
    keepwarm: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("KEEPWARM_BROKER_ADMIN_PASSWORD")
    broker.admin = ("guest", "guest")
    assert keepwarm("broker", "setup", "--management", broker.url) == 0
    assert "rabbitmqctl change_password guest" in capsys.readouterr().out


def test_missing_tls_is_reported(
    broker: ManagementDouble, setup: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    setup()
    assert "This broker has no TLS" in capsys.readouterr().out
    broker.listeners.append({"protocol": "amqp/ssl", "port": 5671})
    setup()
    shown = capsys.readouterr().out
    assert "This broker has no TLS" not in shown
    assert "amqps://keepwarm-worker@127.0.0.1:5671/keepwarm" in shown


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--admin", "root"], "KEEPWARM_BROKER_ADMIN_PASSWORD_FILE"),
        (["--admin", "keepwarm-worker"], "one of Keepwarm's own users"),
        (["--vhost", "/"], "--vhost"),
        (["--management", "http://broker.example.org:15672"], "ssh -N -L"),
        (["--management", "https://root:hunter2@broker.example.org"], "every user of this machine"),
    ],
)
def test_a_flag_that_will_not_do_ends_with_2(
    flags: list[str], says: str, keepwarm: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keepwarm("broker", "setup", *flags) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "hunter2" not in said


def test_the_help_teaches(keepwarm: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert keepwarm("broker", "setup", "--help") == 0
    shown = capsys.readouterr().out
    flags = ("--management", "--admin", "--vhost", "--secrets", "--renew")
    for part in (*flags, "KEEPWARM_BROKER_ADMIN_PASSWORD", "rabbitmq-plugins enable"):
        assert part in shown


def test_without_its_packages_a_verb_names_them_and_the_others_are_there(repository: Path) -> None:
    code = (
        "import sys; sys.modules['httpx'] = None\n"
        "from services.cli.main import main\n"
        "sys.argv = ['keepwarm', 'broker', 'setup', '--vhost', 'v']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "`keepwarm broker setup` needs httpx" in done.stderr
