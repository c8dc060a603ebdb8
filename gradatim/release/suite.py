"""The user's own cases, as a gate: a JSONL file, or a folder of them, of prompts and what a right answer is.

    {"messages": [...], "answer": "click 3", "must": true, "skill": "login", "max_tokens": 32}
    {"messages": [...], "contains": ["42"], "matches": "^The", "lacks": ["sorry"]}

Both adapters answer every case, greedily. A case that ``must`` pass and does not fails the candidate; harm by the
replay gate's rule, skill by skill, against what the other adapter got right, has its step halved. Knows nothing of how
answers are made.
"""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from gradatim.config import GateConfig
from gradatim.errors import ConfigError
from gradatim.release.harm import Pairs, harm
from gradatim.types import Adapter, Decision, Verdict

ENOUGH = 20  # cases on which no harm means something; with fewer, all have to pass


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteCase:
    """One prompt, and what its answer is held to: all that is given must hold."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    messages: tuple[dict[str, Any], ...]
    answer: str | None = None  # the whole answer, but for white space around it
    contains: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    matches: str | None = None  # a regular expression that is searched for
    must: bool = False
    skill: str = "default"
    max_tokens: int = 256
    name: str = field(default="")

    def is_right(self, text: str) -> bool:
        held = [
            self.answer is None or text.strip() == self.answer.strip(),
            all(part in text for part in self.contains),
            not any(part in text for part in self.lacks),
            self.matches is None or re.search(self.matches, text) is not None,
        ]
        return all(held)


Answerer = Callable[[Adapter, Sequence[SuiteCase]], Sequence[str]]
_CASE = TypeAdapter(SuiteCase)


def load_suite(path: Path) -> Sequence[SuiteCase]:
    """ConfigError names the line that is wrong. A folder's files are read in the order of their names."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    cases = [case for file in files for case in _cases(file)]
    if not cases:
        raise ConfigError(f"{path} holds no cases: a case is a line of JSON in a .jsonl file")
    return cases


def _cases(file: Path) -> Sequence[SuiteCase]:
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read {file}: {e}") from e
    return [_case(line, f"{file.name}:{i}", file) for i, line in enumerate(lines, 1) if line.strip()]


def _case(line: str, name: str, file: Path) -> SuiteCase:
    try:
        case = _CASE.validate_python({"name": name, **json.loads(line)})
        if case.matches is not None:
            re.compile(case.matches)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{file.parent / name}: {where}: {first['msg']}") from e
    except (ValueError, TypeError, re.error) as e:
        raise ConfigError(f"{file.parent / name}: {e}") from e
    if case.answer is None and not case.contains and not case.lacks and case.matches is None:
        raise ConfigError(
            f"{file.parent / name}: nothing is asked of the answer: give answer, contains, lacks or matches"
        )
    return case


class SuiteGate:
    """Candidate against live on the suite; ``answer`` gives an adapter's answers, in order."""

    name = "suite"

    def __init__(
        self,
        cases: Sequence[SuiteCase],
        answer: Answerer,
        config: GateConfig,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._cases, self._answer, self._config, self._clock = cases, answer, config, clock
        self._known: dict[str, Sequence[bool]] = {}  # by digest: of the candidate and the live one

    def check(self, candidate: Adapter, live: Adapter, anchor: Adapter) -> Verdict:
        right = {a.id: self._right(a) for a in (candidate, live)}
        self._known = {a.sha256: right[a.id] for a in (candidate, live)}
        decision, reason = decide(self._cases, right[candidate.id], right[live.id], self._config)
        evidence = {"cases": len(self._cases), "right": sum(right[candidate.id]), "right.live": sum(right[live.id])}
        return Verdict(
            adapter_id=candidate.id,
            created_at=self._clock(),
            gate=self.name,
            decision=decision,
            against=(live.id,),
            evidence={k: float(v) for k, v in evidence.items()},
            reason=reason,
        )

    def _right(self, adapter: Adapter) -> Sequence[bool]:
        known = self._known.get(adapter.sha256)
        if known is not None:
            return known
        texts = self._answer(adapter, self._cases)
        return [case.is_right(text) for case, text in zip(self._cases, texts, strict=True)]


def decide(
    cases: Sequence[SuiteCase], candidate: Sequence[bool], live: Sequence[bool], config: GateConfig
) -> tuple[Decision, str]:
    """FAIL for a broken ``must``, REPAIR for harm; WAIT where too few cases are right to say."""
    broken = [case.name for case, right in zip(cases, candidate, strict=True) if case.must and not right]
    if broken:
        return Decision.FAIL, f"must be right and is not: {', '.join(broken[:5])}"
    by_skill: Mapping[str, list[int]] = defaultdict(list)
    for i, case in enumerate(cases):
        by_skill[case.skill].append(i)
    for skill, rows in sorted(by_skill.items()):
        gains = [candidate[i] - live[i] for i in rows]
        pairs = Pairs(n=len(gains), net=float(-sum(gains)), lost=gains.count(-1), won=gains.count(1), logprob=0.0)
        decision, problem = harm(pairs, config)
        if decision is not Decision.PASS:
            return decision, f"{skill}: {problem}"
    said = f"{sum(candidate)} of {len(cases)} right ({sum(live)} before)"
    if len(cases) < ENOUGH and not all(candidate):
        return Decision.WAIT, f"{said}: too few cases to say more"
    return Decision.PASS, said
