"""What untrusted code may try, and that none of it gets out: real processes, real kernel limits."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from gradatim.errors import SandboxError
from gradatim.feedback import sandbox
from gradatim.feedback.sandbox import Limits, Ran, run

try:
    sandbox.check()
except SandboxError as missing:
    pytest.skip(str(missing), allow_module_level=True)

FEW = Limits(wall_s=60.0, cpu_s=2, memory_bytes=256 * 2**20, file_bytes=2**20, processes=12)


def python(code: str, limits: Limits = FEW, files: Mapping[str, str] | None = None) -> Ran:
    return run([sys.executable, "-I", "-S", "-c", code], files, limits=limits)


def jailers() -> set[int]:
    """The processes that hold a sandbox; what they hold cannot outlive them."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"jail.py" in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
        except OSError:
            continue
    return found


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    before = jailers()
    yield
    end = time.monotonic() + 5.0
    while jailers() - before:
        assert time.monotonic() < end, "processes of a sandbox are still there"
        time.sleep(0.02)


def test_it_runs_and_tells_how_it_ended() -> None:
    ran = python(
        "import sys; print(open('a/b.txt').read()); print('no', file=sys.stderr); sys.exit(3)", files={"a/b.txt": "x"}
    )
    assert (ran.exit, ran.stopped, ran.stdout, ran.stderr, ran.ok) == (3, "", b"x\n", b"no\n", False)
    assert python("pass").ok
    assert python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").exit == -signal.SIGSEGV
    assert python("import ctypes; ctypes.string_at(0)").exit == -signal.SIGSEGV


def test_names_that_lead_outside_and_commands_that_are_not_there_are_refused() -> None:
    for name in ("/etc/passwd", "../x", "a/../../x", "", ".", "a\0b"):
        with pytest.raises(SandboxError):
            run([sys.executable, "-c", ""], {name: "x"})
    with pytest.raises(SandboxError, match="nowhere"):
        run(["/nowhere"])
    with pytest.raises(SandboxError, match="whole file system"):
        run([sys.executable], also_readable=["/"])


def test_an_endless_loop_ends_by_the_clock_of_the_processor_and_a_sleep_by_that_of_the_wall() -> None:
    assert python("while True: pass", Limits(cpu_s=1, wall_s=60.0)).stopped == "cpu"
    began = time.monotonic()
    ran = python("import time; time.sleep(600)", Limits(wall_s=1.0))
    assert (ran.exit, ran.stopped) == (None, "time") and time.monotonic() - began < 30.0
    deaf = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert python(deaf, Limits(cpu_s=1, wall_s=60.0)).exit == -signal.SIGKILL


def test_a_fork_bomb_ends_at_its_limit() -> None:
    ran = python(
        "import os, time\nn = 0\n"
        "try:\n"
        "    while True:\n"
        "        if os.fork() == 0: time.sleep(600)\n"
        "        n += 1\n"
        "except BlockingIOError: print(n)"
    )
    assert ran.ok and 1 <= int(ran.stdout) <= FEW.processes
    bomb = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"
    assert python(bomb, Limits(wall_s=2.0, cpu_s=1, processes=12)).stopped in ("cpu", "time")


def test_memory_is_limited_in_each_process_and_in_all_together() -> None:
    ran = python("x = bytearray(100 * 2**30)")
    assert ran.exit == 1 and b"MemoryError" in ran.stderr
    many = "import os, time\nfor _ in range(8):\n  if os.fork() == 0:\n    x = b'1' * (100 * 2**20); time.sleep(600)\n"
    assert python(many + "time.sleep(600)").stopped == "memory"


def test_files_are_limited_and_only_its_own_can_be_written() -> None:
    code = """
import os, sys
out = {}
for path in ("/usr/x", "/etc/x", "/x", "/box/x", "/tmp/x", "/root/x", "/dev/x", sys.prefix + "/x", sys.executable):
    try:
        open(path, "ab").close(); out[path] = "written"
    except OSError as e: out[path] = e.strerror
print(__import__("json").dumps(out))
"""
    found = json.loads(python(code).stdout)
    assert {path for path, said in found.items() if said == "written"} == {"/box/x", "/tmp/x"}
    assert b"No space" in python("for i in range(40): open(f'z{i}', 'wb').write(b'1' * 2**16)").stderr
    assert python("open('/box/big', 'wb').write(b'1' * 2**21)").exit in (-signal.SIGXFSZ, 1)
    assert python("open('x', 'wb').write(b'1' * 100)").ok


def test_nothing_outside_can_be_read(tmp_path: Path) -> None:
    secret = tmp_path / "gradatim.db"
    secret.write_text("secret")
    for path in (secret, Path("/etc/passwd"), Path("/etc/shadow"), Path(__file__), Path("/proc/1/environ")):
        ran = python(f"print(open({str(path)!r}).read())")
        assert ran.exit == 1 and not ran.stdout, path
    assert "secret" not in python("import os; print(dict(os.environ))").stdout.decode()
    os.environ["GRADATIM_API_KEY"] = "secret"
    try:
        assert b"secret" not in python("import os; print(dict(os.environ))").stdout
    finally:
        del os.environ["GRADATIM_API_KEY"]


def test_there_is_no_network_not_even_the_machine_itself() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        ran = python(f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)")
    assert ran.exit == 1 and (b"refused" in ran.stderr or b"unreachable" in ran.stderr)
    assert python("import socket; socket.create_connection(('1.1.1.1', 53), 5)").exit == 1
    assert python("import socket; print(len(socket.if_nameindex()))").stdout == b"1\n"


def test_other_processes_cannot_be_seen_killed_or_traced() -> None:
    code = f"""
import os, signal
out = []
for pid in (1, {os.getpid()}, {os.getppid()}, -1):
    try: os.kill(pid, signal.SIGKILL); out.append("sent")
    except OSError as e: out.append(e.strerror)
print(out)
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print(libc.ptrace(16, 1, 0, 0), libc.unshare(0x10000000), libc.mount(b"none", b"/box", b"tmpfs", 0, None))
print(sorted(p for p in os.listdir("/proc") if p.isdigit()))
"""
    ran = python(code)
    assert ran.exit is not None
    if ran.stdout:  # kill(-1) spares its caller
        killed, tried, seen = ran.stdout.decode().splitlines()
        assert tried == "-1 -1 -1" and seen == "['1', '2']"
        assert killed.count("sent") <= 2  # signals to pid 1 of the box, or to nobody: neither does anything
    os.kill(os.getpid(), 0)


def test_what_it_leaves_running_is_killed_and_does_not_hold_the_answer_up() -> None:
    orphan = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(600)\n  os._exit(0)\n"
    began = time.monotonic()
    ran = python(orphan + "print('done')")
    assert ran.ok and ran.stdout == b"done\n" and time.monotonic() - began < 30.0


def test_an_endless_output_is_cut() -> None:
    ran = python("while True: print('x' * 10000)", Limits(output_bytes=50_000))
    assert (ran.exit, ran.stopped, len(ran.stdout)) == (None, "output", 50_000)


def test_it_dies_with_who_started_it() -> None:
    code = (
        "import sys; from gradatim.feedback.sandbox import run, Limits\n"
        "run([sys.executable, '-I', '-S', '-c', 'while True: pass'], limits=Limits(cpu_s=500, wall_s=500.0))"
    )
    for enough in (1, 2, 3):  # in the middle of its building, and when it runs
        before = jailers()
        parent = subprocess.Popen([sys.executable, "-c", code])
        end = time.monotonic() + 60.0
        while len(jailers() - before) < enough:
            assert time.monotonic() < end, "the sandbox did not come up"
        parent.kill()
        parent.wait()


def test_where_there_is_none_it_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "jail.py"
    source = Path(sandbox.__file__).with_name("jail.py").read_text()
    broken.write_text(source.replace("_LIBC.unshare(new)", "_LIBC.unshare(-1)"))
    monkeypatch.setattr(sandbox, "_JAIL", broken)
    with pytest.raises(SandboxError, match="user namespaces"):
        python("print('this must not run')")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="Linux"):
        python("pass")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="needs a Python that anybody may run")
def test_it_needs_no_root(tmp_path: Path) -> None:
    """The same as a user without privileges, in whose process nothing is mapped to root."""
    told, tells = os.pipe()
    jail = tmp_path / "jail.py"
    jail.write_text(Path(sandbox.__file__).with_name("jail.py").read_text())
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    orders = {
        **{"wall_s": 30.0, "cpu_s": 5, "memory_bytes": 2**30, "file_bytes": 2**20, "processes": 12, "open_files": 64},
        **{"command": ["/bin/sh", "-c", "id -u; (:|:|:) && cat /root/x /etc/shadow"], "files": {"a/b": ""}, "env": {}},
        **{"status": tells, "parent": os.getpid(), "readable": ["/usr", "/bin", "/lib", "/lib64"]},
    }
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-S", str(jail)],
        input=json.dumps(orders).encode(),
        capture_output=True,
        user=65534,
        group=65534,
        extra_groups=[],
        pass_fds=(tells,),
        timeout=60,
    )
    os.close(tells)
    with open(told) as status:
        assert '"exit": 1' in status.read()
    assert done.stdout == b"1000\n" and done.stderr.count(b"No such file") == 2, done
