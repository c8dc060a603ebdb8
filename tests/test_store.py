"""The store passes its conformance suite, on SQLite and on PostgreSQL."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from gradatim.errors import InUseError
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


@pytest.mark.postgresql
def test_one_server_a_postgresql_database(postgresql_socket: Path) -> None:
    """The second is refused in words; the role is free again with the first one's end, and others never taken."""
    url, elsewhere = create_database(postgresql_socket, "alone"), create_database(postgresql_socket, "elsewhere")
    with open_store(url) as first, open_store(url) as second, open_store(elsewhere) as other:
        with first.exclusive("server"), second.exclusive("loop"), other.exclusive("server"):
            refused = pytest.raises(InUseError, match=rf"another server \(gradatim server, pid {os.getpid()} on")
            with refused, second.exclusive("server", wait_s=0.1):
                pass
        with second.exclusive("server", wait_s=0.0) as held:
            held.keep()


@pytest.mark.postgresql
def test_the_lock_of_a_killed_server_is_free(postgresql_socket: Path) -> None:
    url = create_database(postgresql_socket, "killed")
    code = "import sys, time; from gradatim.store import open_store\n"
    code += "with open_store(sys.argv[1]) as s, s.exclusive('server'): print('held', flush=True); time.sleep(60)"
    with open_store(url) as store:
        with subprocess.Popen([sys.executable, "-c", code, url], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stdout.readline() == b"held\n"
            with pytest.raises(InUseError), store.exclusive("server", wait_s=0.0):
                pass
            child.kill()
        with store.exclusive("server", wait_s=5.0):
            pass


@pytest.mark.postgresql
def test_a_lock_that_the_database_lost_is_taken_again_unless_another_was_faster(postgresql_socket: Path) -> None:
    url = create_database(postgresql_socket, "lost")

    def lose(store: SqlStore) -> None:
        with store.engines.write.connect() as connection, connection.begin():
            ends = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'gradatim server%'"
            )
            connection.execute(text(ends))

    with open_store(url) as first, open_store(url) as second, first.exclusive("server") as held:
        lose(second)
        held.keep()
        with pytest.raises(InUseError), second.exclusive("server", wait_s=0.0):
            pass
        lose(second)
        with second.exclusive("server", wait_s=5.0), pytest.raises(InUseError):
            held.keep()


def test_sqlite_needs_no_lock_beside_its_data_directorys(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.db") as store, store.exclusive("server") as held, store.exclusive("server"):
        held.keep()
        assert not held.needed
