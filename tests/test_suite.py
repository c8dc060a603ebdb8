"""The user's own cases: how they are read, judged and decided on; and the command that runs them on a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from gradatim.app.answering import Answers
from gradatim.config import GateConfig
from gradatim.errors import ConfigError
from gradatim.release.suite import SuiteCase, SuiteGate, decide, load_suite
from gradatim.testing.fakes import FakeEngine
from gradatim.types import Adapter, Decision

from .records import adapter
from .test_cli import run

ASK = ({"role": "user", "content": "6 * 7?"},)


def case(**given: Any) -> SuiteCase:
    return SuiteCase(messages=ASK, **({"answer": "42"} | given))


def write(path: Path, *rows: Mapping[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


@pytest.mark.parametrize(
    ("asked", "text", "right"),
    [
        ({"answer": "42"}, " 42\n", True),
        ({"answer": "42"}, "42.", False),
        ({"answer": None, "contains": ("4", "2")}, "24", True),
        ({"answer": None, "lacks": ("sorry",)}, "sorry, 42", False),
        ({"answer": None, "matches": "^4.$"}, "42", True),
        ({"answer": "42", "matches": "x"}, "42", False),
    ],
)
def test_all_that_is_asked_must_hold(asked: dict[str, Any], text: str, right: bool) -> None:
    assert case(**asked).is_right(text) is right


def test_a_folder_of_files_is_read_in_order_and_a_wrong_line_is_named(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", {"messages": ASK, "contains": ["2"]})
    write(tmp_path / "a.jsonl", {"messages": ASK, "answer": "42", "must": True}, {"messages": ASK, "matches": "4"})
    assert [c.name for c in load_suite(tmp_path)] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]
    wrong: list[dict[str, Any]] = [
        {"messages": ASK},
        {"messages": ASK, "anwser": "42"},
        {"answer": "42"},
        {"messages": ASK, "matches": "("},
    ]
    for row in wrong:
        with pytest.raises(ConfigError, match=r"w\.txt:1"):
            load_suite(write(tmp_path / "w.txt", row))
    (tmp_path / "w.txt").write_text("{")
    with pytest.raises(ConfigError, match=r"w\.txt:1"):
        load_suite(tmp_path / "w.txt")
    (tmp_path / "w.txt").write_text("")
    with pytest.raises(ConfigError, match="no cases"):
        load_suite(tmp_path / "w.txt")


@pytest.mark.parametrize(
    ("candidate", "live", "must", "decision"),
    [
        ([1] * 30, [1] * 30, False, Decision.PASS),
        ([1] * 29 + [0], [1] * 30, False, Decision.PASS),
        ([1] * 29 + [0], [1] * 30, True, Decision.FAIL),
        ([1] * 15 + [0] * 15, [1] * 30, False, Decision.REPAIR),
        ([1] * 27 + [0] * 3, [1] * 30, False, Decision.REPAIR),
        ([0] * 30, [0] * 30, False, Decision.PASS),
        ([1] * 4 + [0], [1] * 4 + [0], False, Decision.WAIT),
        ([1] * 5, [0] * 5, False, Decision.PASS),
    ],
)
def test_the_decision(candidate: Sequence[int], live: Sequence[int], must: bool, decision: Decision) -> None:
    cases = [case(must=must, name=str(i)) for i in range(len(candidate))]
    assert decide(cases, list(map(bool, candidate)), list(map(bool, live)), GateConfig())[0] is decision


def test_the_gate_asks_each_adapter_once() -> None:
    asked: list[str] = []

    def answer(of: Adapter, cases: Sequence[SuiteCase]) -> Sequence[str]:
        asked.append(of.id)
        return ["42" if of.step < 2 else "no"] * len(cases)

    gate = SuiteGate([case() for _ in range(30)], answer, GateConfig())
    live, good, bad = (adapter(n, parent=n - 1 if n else None) for n in (0, 1, 2))
    assert gate.check(good, live, live).decision is Decision.PASS
    verdict = gate.check(bad, live, live)
    assert (verdict.decision, verdict.evidence["right"], verdict.evidence["right.live"]) == (Decision.REPAIR, 0.0, 30.0)
    assert asked == ["agent@1", "agent@0", "agent@2"]


def test_answers_are_an_engines_own_in_the_order_of_the_cases() -> None:
    engine = FakeEngine(lambda request: str((request.messages or ({},))[0]["content"]))
    cases = [SuiteCase(messages=({"role": "user", "content": f"word {i}"},), answer="") for i in range(20)]
    assert list(Answers(engine)(adapter(1, parent=0), cases)) == [f"word {i}" for i in range(20)]
    assert {request.sampling.temperature for request, _ in engine.requests} == {0.0}
    assert engine.loaded() == {"agent@0"}


def test_the_command_runs_a_model_and_exits_with_the_verdict(tiny_model_dir: Path, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    assert run("learn", "--once", "-d", str(data_dir), "-m", str(tiny_model_dir))[0] == 1  # there is no such folder
    data_dir.mkdir()
    assert run("learn", "--once", "-d", str(data_dir), "-m", str(tiny_model_dir))[0] == 3
    words = ("--adapter", "agent@0", "-d", str(data_dir), "-m", str(tiny_model_dir), "--json")
    right = write(tmp_path / "right.jsonl", {"messages": ASK, "matches": "", "max_tokens": 4})
    code, said = run("eval", str(right), *words)
    assert (code, json.loads(said)["decision"]) == (0, "pass")
    short = write(tmp_path / "short.jsonl", {"messages": ASK, "answer": "42", "max_tokens": 4})
    assert run("eval", str(short), *words)[0] == 3
    must = write(tmp_path / "must.jsonl", {"messages": ASK, "answer": "42", "max_tokens": 4, "must": True})
    code, said = run("eval", str(must), *words)
    assert (code, "must.jsonl:1" in json.loads(said)["reason"]) == (1, True)
