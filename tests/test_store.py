"""The store passes its conformance suite, on SQLite and on PostgreSQL."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gradatim.store import SqlStore, open_store
from gradatim.testing.store import STORE_CHECKS, Check, check_store


@pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_sqlite(check: Check, tmp_path: Path) -> None:
    check(lambda name: open_store(tmp_path / f"{name}.db"))


def test_check_store_names_the_check_that_failed(tmp_path: Path) -> None:
    class Forgetful(SqlStore):
        def cursor(self, name: str) -> int:
            return 0

    def open_forgetful(name: str) -> SqlStore:
        store = open_store(tmp_path / f"{name}.db")
        store.__class__ = Forgetful
        return store

    with pytest.raises(AssertionError) as failure:
        check_store(open_forgetful)
    assert "check_a_submit_is_all_or_nothing" in failure.value.__notes__[0]


# --------------------------------------------------------------------------------------------- PostgreSQL


@pytest.fixture(scope="module")
def postgresql_socket() -> Iterator[Path]:
    """A private server on a unix socket. Skips where its programs are absent."""
    homes = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not homes:
        pytest.skip("PostgreSQL's server programs are not installed (Debian: apt-get install postgresql)")
    bin_dir = homes[-1].parent
    as_owner: list[str] = []
    if os.geteuid() == 0:  # the server refuses to run as root
        if not shutil.which("setpriv"):
            pytest.skip("PostgreSQL's server does not run as root, and setpriv is not installed")
        as_owner = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    home = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # short: a socket's path has 107 characters at most
    if as_owner:
        shutil.chown(home, "postgres", "postgres")
    data = str(home / "data")

    def run(*command: str) -> None:
        # the server inherits our pipes: reading them to their end would wait for it
        subprocess.run(
            [*as_owner, *command], check=True, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    pg_ctl = str(bin_dir / "pg_ctl")
    try:
        run(str(bin_dir / "initdb"), "-D", data, "-A", "trust", "-U", "gradatim", "-E", "UTF8", "--locale=C")
        run(pg_ctl, "-D", data, "-w", "-o", f"-k {home} -c listen_addresses=''", "start")
        yield home
    finally:
        subprocess.run([*as_owner, pg_ctl, "-D", data, "-m", "immediate", "stop"], check=False, cwd=home)
        shutil.rmtree(home, ignore_errors=True)


def create_database(socket: Path, name: str) -> str:
    """Its URL; it is made where it does not exist."""
    import psycopg

    with psycopg.connect(f"host={socket} user=gradatim dbname=postgres", autocommit=True) as connection:
        if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone():
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
    return f"postgresql://gradatim@/{name}?host={socket}"


@pytest.mark.postgresql
@pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_postgresql(check: Check, postgresql_socket: Path) -> None:
    check(lambda name: open_store(create_database(postgresql_socket, name)))
