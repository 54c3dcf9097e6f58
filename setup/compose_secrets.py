"""Create the files for docker-compose.yml that are not in the repository: passwords, and .env.

    python3 setup/compose_secrets.py

Passwords are random, each in its own file below secrets/, readable only by the user that the
containers run as: the caller, or for root the caller of sudo, or else an unused user id. Existing
files are never changed. Needs only Python.
"""

import os
import secrets
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECRETS, RESULTS, DOTENV = ROOT / "secrets", ROOT / "results", ROOT / ".env"
MODELS = ROOT / ".models"
# Directories that containers read, some of them as another user.
READ_BY_ALL = ("grafana", "prometheus", "rabbitmq", "samples")
ADMIN = "keepwarm-admin"
ROLES = ("producer", "worker", "collector", "operator")
PASSWORDS = (
    *("admin.password", "grafana.password", "postgres.password"),
    *(f"broker/{role}.password" for role in ROLES),
)
DEMO_MODEL = "SmolLM2-135M-Instruct"
# Of the images as well (USER).
_NOBODYS_NUMBER = 10001


def main() -> None:
    os.umask(0o077)
    known = read_dotenv()
    uid, gid = owner(known)
    for directory in (SECRETS, SECRETS / "broker", RESULTS):
        directory.mkdir(exist_ok=True)
    SECRETS.chmod(0o700)
    (SECRETS / "broker").chmod(0o700)
    made = [name for name in PASSWORDS if make_password(SECRETS / name)]
    write_admin()
    (SECRETS / "hf.token").touch()  # for a token, if the user has one
    added = extend_dotenv(known, uid, gid)
    give((SECRETS, *SECRETS.rglob("*"), RESULTS), uid, gid)
    if not MODELS.exists():
        # Docker would create it as root, and the user could not write a model to it.
        MODELS.mkdir()
        give((MODELS,), uid, gid)
    for name in READ_BY_ALL:
        let_all_read(ROOT / name)
    print(f"secrets/: {len(made)} passwords made, {len(PASSWORDS) - len(made)} kept; of user {uid}")
    print(f".env: {', '.join(added) or 'nothing'} added; COMPOSE_PROFILES says what is started")
    print("Next: docker compose up -d")


def read_dotenv() -> dict[str, str]:
    if not DOTENV.exists():
        return {}
    lines = DOTENV.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    return {name.strip(): value.strip() for name, value in pairs}


def owner(known: dict[str, str]) -> tuple[int, int]:
    """As whom the containers run; never root."""
    for named in (known.get("KEEPWARM_UID"), os.geteuid(), os.environ.get("SUDO_UID")):
        if named and int(named):
            uid = int(named)
            break
    else:
        uid = _NOBODYS_NUMBER
    for named in (known.get("KEEPWARM_GID"), os.environ.get("SUDO_GID"), os.getegid()):
        if named and int(named):
            return uid, int(named)
    return uid, uid


def make_password(file: Path) -> bool:
    """Whether it was made now."""
    try:
        with file.open("x", encoding="ascii") as new:
            # Hexadecimal, for rabbitmq.conf has signs of its own.
            new.write(f"{secrets.token_hex(32)}\n")
    except FileExistsError:
        return False
    return True


def write_admin() -> None:
    """The broker's first user, as rabbitmq.conf wants it. A new broker makes it when it starts."""
    password = (SECRETS / "admin.password").read_text(encoding="ascii").strip()
    (SECRETS / "rabbitmq-admin.conf").write_text(
        f"default_user = {ADMIN}\ndefault_pass = {password}\n", encoding="ascii"
    )


def extend_dotenv(known: dict[str, str], uid: int, gid: int) -> list[str]:
    """Add what is missing; the names of it."""
    local = (ROOT / ".models" / DEMO_MODEL / "config.json").exists()
    wanted = {
        "KEEPWARM_UID": str(uid),
        "KEEPWARM_GID": str(gid),
        "COMPOSE_PROFILES": "cuda" if has_gpu() else "cpu",
        "KEEPWARM_MODEL": f"{'/models' if local else 'HuggingFaceTB'}/{DEMO_MODEL}",
    }
    missing = {name: value for name, value in wanted.items() if name not in known}
    if missing:
        with DOTENV.open("a", encoding="utf-8") as file:
            file.write(
                "# For docker compose, by `make secrets`; yours to change: docs/settings.md\n"
            )
            file.writelines(f"{name}={value}\n" for name, value in missing.items())
    return list(missing)


def has_gpu() -> bool:
    try:
        return (
            subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0
        )
    except OSError:
        return False


def give(paths: tuple[Path, ...], uid: int, gid: int) -> None:
    for path in paths:
        if (path.stat().st_uid, path.stat().st_gid) == (uid, gid):
            continue
        try:
            os.chown(path, uid, gid)
        except PermissionError:
            sys.exit(
                f"{path} belongs to user {path.stat().st_uid}, and containers run as {uid} "
                "(KEEPWARM_UID in .env): run this as root, or, where nothing was made with them "
                "yet, remove secrets/ and .env"
            )


def let_all_read(directory: Path) -> None:
    """A checkout that was made with umask 077 keeps them to its owner."""
    for path in (directory, *directory.rglob("*")) if directory.is_dir() else ():
        mode = path.stat().st_mode
        wanted = mode | (0o055 if path.is_dir() else 0o044)
        if mode == wanted:
            continue
        try:
            path.chmod(wanted)
        except PermissionError:
            sys.exit(f"{path} cannot be made readable for containers; ask its owner to run chmod")


if __name__ == "__main__":
    main()
