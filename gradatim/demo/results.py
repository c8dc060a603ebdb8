"""What a run of the demo leaves behind: plain records, written to ``results.json`` and read by the report.

Times are seconds since the start of the run. Nothing here is computed from anything else in the file: rates and
intervals are the report's business.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gradatim.demo.wire import AdapterInfo


@dataclass(frozen=True, slots=True)
class StoryConfig:
    """Every size of the story. `full` is what is quoted; `quick` shows the same in less than half of the time."""

    name: str
    held_out: int
    """Held-out prompts per task in the tests that are quoted."""
    curve: int
    """Held-out prompts per task for each point of the learning curve: the first ones of the held-out set."""
    rounds: int
    """Rounds of the stream before the redesign; each ends with a point on the curve."""
    redesign_rounds: int
    corrected: int
    """Episodes per round in which the operator corrects."""
    outcomes: int
    """Pages per round of enter-text, and three times as many of click-button: their outcome is the only signal."""
    harmful: int
    """Episodes with inverted corrections."""
    retrieval: int
    """Held-out prompts per task on which the retrieval agent is tested."""
    curve_every: int = 1
    """Rounds between two points of the curve; the last round always has one."""
    concurrency: int = 12
    """Episodes at once, so that the server has requests to batch."""
    temperature: float = 0.7
    """Of the stream; held-out tests are greedy."""
    settle_s: float = 180.0
    """The longest wait for the loop to have learned from a round."""
    judge_s: float = 240.0
    """The longest wait for the loop to have judged the harmful batch."""
    identity: int = 10
    """Prompts on which the frozen model must answer the same before and after."""
    attempts: int = 3
    """At a page whose outcome is the only signal, before the agent gives up on it."""
    random_episodes: int = 200
    retrieved: int = 5
    first_seed: int = 0

    @staticmethod
    def quick() -> StoryConfig:
        return StoryConfig(
            name="quick",
            held_out=16,
            curve=8,
            rounds=3,
            redesign_rounds=2,
            corrected=4,
            outcomes=4,
            harmful=10,
            retrieval=8,
            settle_s=90.0,
            judge_s=180.0,
            identity=5,
            random_episodes=30,
        )

    @staticmethod
    def full() -> StoryConfig:
        return StoryConfig(
            name="full",
            held_out=64,
            curve=8,
            rounds=6,
            redesign_rounds=5,
            corrected=4,
            outcomes=3,
            harmful=12,
            retrieval=16,
            curve_every=2,
            random_episodes=100,
        )


@dataclass(frozen=True, slots=True)
class Split:
    """How a task's held-out set was drawn, and how many distinct prompts that took."""

    task: str
    train: int
    held_out: int
    seeds_tried: int
    distinct_prompts: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One agent on the held-out prompts of one task. ``unknown`` counts episodes that a failed request ended."""

    at_s: float
    phase: str
    agent: str
    model: str
    task: str
    n: int
    successes: int
    corrected_episodes: int
    unknown: int = 0
    dialogs: int = 0
    dialog_successes: int = 0

    @property
    def rate(self) -> float:
        return self.successes / self.n if self.n else 0.0


@dataclass(frozen=True, slots=True)
class Episode:
    """One episode of the stream, as the agent saw it."""

    at_s: float
    phase: str
    task: str
    seed: int
    success: bool | None
    steps: int
    corrections: int
    adapters: tuple[str, ...]
    met_dialog: bool


@dataclass(frozen=True, slots=True)
class Harmful:
    """What became of the inverted corrections. ``judged`` is false when the loop had not decided in time."""

    corrections: int
    live_before: str
    live_after: str
    judged: bool
    adapters: tuple[AdapterInfo, ...] = ()
    updates_refused: int = 0

    @property
    def stopped(self) -> bool:
        return self.judged and self.live_after == self.live_before


@dataclass(frozen=True, slots=True)
class Rollback:
    """Who answered before and after; ``skipped`` says why there was nothing to roll back to."""

    before: str = ""
    target: str = ""
    answered_by: str = ""
    seconds: float = 0.0
    skipped: str = ""

    @property
    def acted(self) -> bool:
        return bool(self.target) and self.answered_by == self.target


@dataclass(frozen=True, slots=True)
class Identity:
    """Greedy answers of the frozen model before and after everything."""

    prompts: int
    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def identical(self) -> bool:
        return self.before == self.after


@dataclass(frozen=True, slots=True)
class Phase:
    name: str
    start_s: float
    end_s: float


@dataclass(slots=True)
class Results:
    """The whole run; it grows as the story goes on, and is written whether or not the story reaches its end."""

    config: StoryConfig
    model: str
    pages: str
    prompt: dict[str, Any]
    started_at: float
    complete: bool = False
    splits: list[Split] = field(default_factory=list)
    random_floor: dict[str, float] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    episodes: list[Episode] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    adapters: list[AdapterInfo] = field(default_factory=list)
    harmful: Harmful | None = None
    rollback: Rollback | None = None
    identity: Identity | None = None
    feedback_to_live_s: list[float] = field(default_factory=list)
    updates_applied: int = 0
    updates_refused: int = 0
    requests: int = 0
    failures: list[str] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)

    @property
    def corrected_episodes(self) -> int:
        """Episodes of the stream so far that an operator looked over (the harmful ones are not among them)."""
        return sum(e.task.startswith("login-user") and e.phase in ("stream", "redesign") for e in self.episodes)

    def write(self, path: Path) -> None:
        body = asdict(self)
        for name in ("harmful", "rollback", "identity"):
            record = getattr(self, name)
            if record is not None:
                body[name] |= _verdict(record)
        path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def _verdict(record: Harmful | Rollback | Identity) -> dict[str, bool]:
    if isinstance(record, Harmful):
        return {"stopped": record.stopped}
    if isinstance(record, Rollback):
        return {"acted": record.acted}
    return {"identical": record.identical}
