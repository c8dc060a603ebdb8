"""Critics that run the answer's code in the sandbox: does it run, and does it pass the tests.

The tests are read once, when the critic is made, and put into the sandbox over whatever the answer brings: an answer
that changes its tests is judged by the real ones. A friendly exit status is not enough: every test must report, under a
number that the code is not told. What the sandbox prevents or stops (time, memory, output) is a failed test; where
there is no sandbox, nothing is judged. Code and tests share a process, so code that searches the interpreter's own
frames for the number can still lie; tests that the agent never sees (``held``) find what only fits the ones it does.
"""

from __future__ import annotations

import ast
import re
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from gradatim.errors import ConfigError
from gradatim.feedback import sandbox
from gradatim.feedback.critics import last_step, opinion
from gradatim.feedback.sandbox import Limits, Ran
from gradatim.protocols import Critic
from gradatim.types import Episode, Feedback

_BLOCK = re.compile(r"^```[ \t]*([^\n`]*)\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
_TITLE = re.compile(r"(?:(?:title|file|filename|path)=)?[\"']?([\w./-]+\.\w+)[\"']?$")
_RUNNER = Path(__file__).with_name("runner.py")
_TRIVIAL = frozenset({"0", "1", "-1", "2", "''", "' '", "True", "False", "None", "[]", "()", "{}"})
_MEMORIZED = 0.5  # share of a test's cases that code has word for word, from which on it is taken to know them by heart


def files_of(text: str, main: str = "solution.py") -> dict[str, str]:
    """The fenced blocks of an answer as files: under the name that a fence gives (```python title=util.py), else
    ``main``, whose blocks are joined. An answer without a fence is ``main`` as a whole."""
    out: dict[str, str] = {}
    for info, body in _BLOCK.findall(text):
        named = _TITLE.match(info.split()[-1]) if info.split() else None
        name = str(PurePosixPath(named[1])) if named else main
        out[name] = out[name] + "\n" + body if name in out else body
    return out or {main: text}


def runs(*, main: str = "solution.py", limits: Mapping[str, Any] | None = None) -> Critic:
    """Against code that does not run to its end with status 0. That it runs says nothing more."""
    sandbox.check()
    bounds = _limits(limits)

    def critic(episode: Episode) -> Feedback | None:
        step = last_step(episode)
        if step is None:
            return None
        ran = sandbox.run([sys.executable, "-I", "-B", main], files_of(step.text, main), limits=bounds)
        return None if ran.ok else opinion(step, -1.0, _how(ran))

    return critic


def unit_tests(
    tests: str, *, held: str | None = None, main: str = "solution.py", limits: Mapping[str, Any] | None = None
) -> Critic:
    """The outcome: whether the last answer's code passes the tests, Python files named ``test_*.py``.

    ``tests``: their folder; where it has a folder named like the episode's skill, the tests are those in it. They are
    functions ``test_*`` or unittest's classes, and import ``solution``. ``held``: a folder of the same form with tests
    that the agent never sees: code that passes those it sees and fails these is special-cased. A pass of code that
    changed its tests, or that holds their cases word for word, is *unknown*: it is not what is to be imitated.
    """
    sandbox.check()
    bounds, seen, unseen = _limits(limits), _Tests(tests), _Tests(held) if held else None

    def critic(episode: Episode) -> Feedback | None:
        step = last_step(episode)
        visible = seen.of(step.skill) if step is not None else {}
        if step is None or not visible:
            return None
        brought = files_of(step.text, main)
        edited = sorted(n for n, text in brought.items() if _edits(PurePosixPath(n).name, text, visible))
        code = {name: text for name, text in brought.items() if not _shadows(name)}
        tags = ["edited-tests"] if edited else []
        failed = _failed(code, visible, bounds)
        if failed:
            return opinion(episode, False, failed, tags=tags)
        hidden = unseen.of(step.skill) if unseen else {}
        if hidden and (failed := _failed(code, hidden, bounds)):
            return opinion(episode, False, f"passes the tests it was shown, and not others: {failed}", tags=_SPECIAL)
        if edited:
            return opinion(episode, None, f"it passes, but changed its tests: {', '.join(edited)}", tags=tags)
        if not hidden and memorized(code.values(), visible.values()) >= _MEMORIZED:
            return opinion(episode, None, "it passes, but holds the cases of its tests", tags=_SPECIAL)
        return opinion(episode, True)

    return critic


_SPECIAL = ("special-cased",)


class _Tests:
    """The files of a folder of tests, kept as they were when the critic was made."""

    def __init__(self, folder: str) -> None:
        root = Path(folder)
        if not root.is_dir():
            raise ConfigError(f"{folder} is not a folder of tests")
        self._common = _texts(root)
        self._by_skill = {sub.name: _texts(sub) for sub in root.iterdir() if sub.is_dir()}
        if not self._common and not any(self._by_skill.values()):
            raise ConfigError(f"{folder} holds no test_*.py")

    def of(self, skill: str) -> Mapping[str, str]:
        return self._by_skill.get(skill) or self._common


def _texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.glob("test_*.py"))}


def _edits(name: str, text: str, tests: Mapping[str, str]) -> bool:
    return name in tests and text.strip() != tests[name].strip()


def _shadows(name: str) -> bool:
    """Files by which code would reach into the tests' process before they do: tests, and hooks of Python or pytest."""
    base = PurePosixPath(name).name
    return base.startswith("test_") or base in ("conftest.py", "sitecustomize.py", "usercustomize.py", "runner.py")


def _failed(code: Mapping[str, str], tests: Mapping[str, str], limits: Limits) -> str:
    """What went wrong; empty where every test passed and said so."""
    number = secrets.token_hex(16)
    files = {**code, **tests, "runner.py": _RUNNER.read_text(), ".number": number}
    ran = sandbox.run([sys.executable, "-I", "-B", "runner.py"], files, limits=limits)
    told = re.search(rf"^{number} (\d+) (\d+) ?(.*)$", ran.stdout.decode(errors="replace"), re.MULTILINE)
    if ran.stopped or told is None:
        return _how(ran) if ran.stopped or not ran.ok else "it ended before the tests did"
    passed, total, first = int(told[1]), int(told[2]), told[3]
    if total == 0:
        return "no test was found"
    return "" if ran.ok and passed == total else f"{total - passed} of {total} tests failed: {first}"


def _how(ran: Ran) -> str:
    if ran.stopped:
        return f"it was stopped: too much {ran.stopped}"
    last = ran.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    return f"status {ran.exit}: {last[:200]}"


def _limits(given: Mapping[str, Any] | None) -> Limits:
    try:
        return Limits(**(given or {}))
    except TypeError as e:
        raise ConfigError(f"limits: {e}") from e


# ------------------------------------------------------------------------------ answers known by heart


def memorized(code: Iterable[str], tests: Iterable[str]) -> float:
    """The share of the tests' cases (``f(input) == output``, neither of them trivial) of which code has input and
    output as literals. 0 where there are fewer than two cases."""
    cases = {case for text in tests for case in _cases(text)}
    literals = {literal for text in code for literal in _literals(text)}
    known = [case for case in cases if all(part in literals for part in case)]
    return len(known) / len(cases) if len(cases) >= 2 else 0.0


def _parsed(text: str) -> ast.AST:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module(body=[], type_ignores=[])


def _literal(node: ast.AST) -> str | None:
    try:
        return repr(ast.literal_eval(node))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _literals(text: str) -> set[str]:
    found = (_literal(node) for node in ast.walk(_parsed(text)) if isinstance(node, ast.expr))
    return {literal for literal in found if literal is not None}


def _cases(text: str) -> Iterator[tuple[str, ...]]:
    for node in ast.walk(_parsed(text)):
        pair: list[ast.expr] = []
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq):
            pair = [node.left, node.comparators[0]]
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "assertEqual" and len(node.args) >= 2:
            pair = node.args[:2]
        for call, output in (pair, pair[::-1]) if pair else ():
            if isinstance(call, ast.Call):
                parts = [*map(_literal, call.args), _literal(output)]
                if len(parts) > 1 and all(part is not None and part not in _TRIVIAL for part in parts):
                    yield tuple(str(part) for part in parts)
