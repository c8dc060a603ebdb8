"""What changes beside the live adapter: follows the log, tells what changed, and if it is the world or the adapter.

Watched are rewards of either class of sources, the share of abstentions, the length of answers, and the prompts, for
all requests and for each skill (``release.series``). An episode is one unit: its first request, and its first
judgement. A fall of rewards is looked into by comparing with whoever answers beside the live adapter (see ``cause``).
What is found is a verdict of the gate ``drift`` on the live adapter: PASS, it is not its fault; WAIT, it is being
looked into or could not be told; FAIL, it is at fault. Nothing is rolled back here: that is the watch's.

All of it is a function of the log. ``drift-state.json`` saves reading it all again at a start, and may be deleted: what
was told once is not told again.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradatim.config import Config
from gradatim.protocols import Store
from gradatim.release import telling
from gradatim.release.cause import CONTROL, LIVE, Comparison, Rated, compare
from gradatim.release.lift import Lift
from gradatim.release.series import Series, Shift
from gradatim.release.sketch import PROJECTIONS, log_length, sketch
from gradatim.release.state_file import StateFile
from gradatim.release.units import CLASSES, rewards_of
from gradatim.types import DRIFT, AdapterId, Decision, EpisodeId, Feedback, Reward, Stage, Step, Verdict

log = logging.getLogger(__name__)

ASKED, RATED = "drift.asked", "drift.rated"  # cursors: what was found in requests, in judgements up to here is told
STATE = "drift-state.json"
_VERSION = 1
_PAGE = 100
_SAVE_EVERY = 1000  # records
_RECENT = 256  # episodes whose first request is kept in memory
_KEPT = 8192  # rated episodes that a fall is looked into with
KINDS = ("changed", "world", "adapter", "unknown")  # what is told: a change; then what a fall of rewards came of
_LOOK_EVERY = 10  # rated episodes, while a fall is looked into
# families of measures: how many there are of each, and their share of false alarms; all of them add up to 1
_IN_REQUESTS: Mapping[str, tuple[int, float]] = {telling.ANSWERS: (1, 0.125), telling.PROMPTS: (1 + PROJECTIONS, 0.25)}
_IN_JUDGEMENTS: Mapping[str, tuple[int, float]] = {
    **{telling.rewards_of(name): (1, 0.5 / len(CLASSES)) for name in CLASSES},
    telling.ABSTENTIONS: (1, 0.125),
}


@dataclass(slots=True)
class Suspicion:
    """A fall of rewards that is being looked into."""

    source: int  # of CLASSES
    skill: str
    since: float
    live: AdapterId
    left: int  # rated episodes until it stays unknown


class Drift:
    """``turn`` takes in a page of what is new. One process at a time: the one that holds the loop's lock."""

    def __init__(
        self, store: Store, config: Config, folder: Path | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._store, self._config, self._clock = store, config, clock
        self._file = StateFile(folder / STATE if folder else None)
        self._begin()
        if not self._file.load(self._restore):
            self._begin()
        self._told = {name: store.cursor(name) for name in (ASKED, RATED)}

    def _begin(self) -> None:
        self._read = {ASKED: 0, RATED: 0}  # store positions
        self._requests = Series(_IN_REQUESTS, self._config.drift)
        self._judgements = Series(_IN_JUDGEMENTS, self._config.drift)
        self._rated: deque[Rated] = deque(maxlen=_KEPT)
        self._suspicion: Suspicion | None = None
        self._live = AdapterId(f"{self._config.name}@0")
        self._lift, self._lift_now = Lift(), Lift()
        self._counts: Counter[str] = Counter()  # what was found
        self._firsts: OrderedDict[EpisodeId, tuple[int, Step]] = OrderedDict()
        self._unsaved = 0

    def turn(self) -> bool:
        """True if there was anything."""
        steps = self._store.read(Step, after=self._read[ASKED], limit=_PAGE)
        rewards = self._store.read(Reward, after=self._read[RATED], limit=_PAGE)
        for position, step in steps:
            self._tell(ASKED, position, self._ask(position, step))
            self._read[ASKED] = position
        for position, reward in rewards:
            self._tell(RATED, position, self._judge(position, reward))
            self._read[RATED] = position
        self._unsaved += len(steps) + len(rewards)
        if self._unsaved >= _SAVE_EVERY:
            self._unsaved = 0
            self._file.save(self.state())
        return bool(steps or rewards)

    def describe(self) -> Mapping[str, Any]:
        """For whoever looks: what is being looked into, and the lift of learning, of all time and of the live one."""
        return {
            "changes": {kind: self._counts[kind] for kind in KINDS},
            "looking_into": None if self._suspicion is None else asdict(self._suspicion),
            "lift": self._lift.describe(),
            "lift_of_live": self._lift_now.describe(),
        }

    def lift_of(self, adapter_id: AdapterId) -> float:
        """Lower bound of what an adapter is worth more than the frozen base in traffic, by every class of sources that
        rated both; -1 where it is not the one that is being compared."""
        rated = self._lift_now.describe() if adapter_id == self._live else {}
        return min((found["low"] for found in rated.values()), default=-1.0)

    # --------------------------------------------------------------------------------------------- requests

    def _ask(self, position: int, step: Step) -> list[Verdict]:
        first = self._first(step.episode_id)
        if first is None or first[0] != position or step.stage == "pinned":
            return []
        values = np.array([log_length(len(step.completion_ids)), *sketch(step.prompt_ids)])
        if step.finish_reason == "aborted":
            values[0] = math.nan
        shifts = self._requests.see(values, step.skill, step.created_at)
        return [self._verdict(Decision.PASS, telling.changed(s), self._numbers(s)) for s in shifts]

    def _first(self, episode_id: EpisodeId) -> tuple[int, Step] | None:
        """Its first request, and where it stands; looked up once where it is recent."""
        known = self._firsts.get(episode_id)
        if known is None:
            known = next(iter(self._store.read(Step, episode_id=episode_id, limit=1)), None)
        if known is not None:
            self._firsts[episode_id] = known
        while len(self._firsts) > _RECENT:
            self._firsts.popitem(last=False)
        return known

    # ------------------------------------------------------------------------------------------- judgements

    def _judge(self, position: int, reward: Reward) -> list[Verdict]:
        """The first that went by what was said of the episode."""
        told = (at for at, r in self._store.read(Reward, episode_id=reward.episode_id) if r.feedback_ids)
        first = self._first(reward.episode_id)
        if first is None or next(told, None) != position or first[1].stage == "pinned":
            return []
        said: dict[str, Feedback] = {}
        for at, feedback in self._store.read(Feedback, episode_id=reward.episode_id):
            if at <= reward.position:
                said[feedback.id] = feedback
        valid = [f for f in said.values() if not f.retracted]
        abstained = float(reward.value is None) if valid else math.nan
        return self.take(first[1], tuple(rewards_of(valid, self._config)), abstained)

    def take(self, step: Step, rewards: tuple[float, ...], abstained: float) -> list[Verdict]:
        """The next rated episode by its first step: what is to be told of it. ``abstained``: 1, 0, or NaN where nobody
        said anything."""
        arm = LIVE if step.stage == Stage.LIVE else CONTROL if step.coin and step.stage == Stage.RETIRED else ""
        unit = Rated(step.created_at, step.adapter_id, arm, step.skill, rewards)
        self._rated.append(unit)
        out = self._follow_live(unit)
        self._compare_with_base(step, arm, rewards)
        out += self._look(unit)
        for shift in self._judgements.see([*rewards, abstained], step.skill, step.created_at):
            out += self._shifted(shift)
        return out

    def _follow_live(self, unit: Rated) -> list[Verdict]:
        """Another one is live. Where an earlier one came back, the fall has been dealt with."""
        if unit.arm != LIVE or unit.adapter_id == self._live:
            return []
        before, self._live = self._live, unit.adapter_id
        self._lift_now = Lift()
        if self._suspicion is None or _step_of(unit.adapter_id) > _step_of(before):
            return []
        self._suspicion = None
        return [self._verdict(Decision.WAIT, telling.TAKEN_BACK, {"unknown": 1.0})]

    def _compare_with_base(self, step: Step, arm: str, rewards: Sequence[float]) -> None:
        base = AdapterId(f"{self._config.name}@0")
        learned = step.coin.get(self._live, 0.0)
        frozen = step.coin.get(base, 0.0)
        if self._live == base or min(learned, frozen) <= 0.0 or step.adapter_id not in (base, self._live):
            return
        for lift in (self._lift, self._lift_now):
            lift.update(step.adapter_id != base, rewards, learned / (learned + frozen))

    def _shifted(self, shift: Shift) -> list[Verdict]:
        source = telling.source_of(shift.family)
        if source is None or shift.rose:
            return [self._verdict(Decision.PASS, telling.changed(shift), self._numbers(shift))]
        if self._suspicion is not None:
            why = f"{telling.changed(shift)}; another fall is being looked into"
            return [self._verdict(Decision.WAIT, why, self._numbers(shift))]
        left = self._config.drift.confirm_episodes
        self._suspicion = Suspicion(source, shift.skill, shift.since, self._live, left)
        told = self._verdict(Decision.WAIT, telling.fell(shift), {**self._numbers(shift), "open": 1.0})
        return [told, *self._conclude()]

    def _look(self, unit: Rated) -> list[Verdict]:
        open_ = self._suspicion
        if open_ is None or math.isnan(unit.rewards[open_.source]) or open_.skill not in ("", unit.skill):
            return []
        open_.left -= 1
        return self._conclude() if open_.left % _LOOK_EVERY == 0 else []

    def _conclude(self) -> list[Verdict]:
        """What became of the fall, where that can be said by now."""
        open_ = self._suspicion
        assert open_ is not None
        found = compare(self._rated, open_.since, open_.source, open_.skill)
        alone = not found.controls and not self._has_control(open_.since)
        undecided = not (found.is_the_world or found.is_the_adapter)
        if undecided and open_.left > 0 and not alone:
            return []
        self._suspicion = None
        subject = telling.subject(telling.rewards_of(CLASSES[open_.source]), open_.skill, open_.since)
        return [self._verdict(*self._cause(found, open_.since), subject=subject)]

    def _cause(self, found: Comparison, since: float) -> tuple[Decision, str, dict[str, float]]:
        numbers = {"since": since, "p_world": found.world, "before": found.before.value, "after": found.after.value}
        for i, (was, now) in enumerate(found.controls.values(), start=1):
            numbers |= {f"control_{i}.before": was, f"control_{i}.after": now.value, f"control_{i}.rated": float(now.n)}
        numbers = {k: v for k, v in numbers.items() if not math.isnan(v)}
        reason = telling.cause(found)
        if found.is_the_world:
            adapts = self._config.drift.react == "adapt"
            return Decision.PASS, reason, {**numbers, "world": 1.0, "adapt": float(adapts)}
        if found.is_the_adapter:
            return Decision.FAIL, reason, {**numbers, "adapter": 1.0}
        return Decision.WAIT, reason, {**numbers, "unknown": 1.0}

    def _has_control(self, since: float) -> bool:
        """Somebody answers beside the live adapter, though perhaps too few have rated it yet."""
        release = self._config.release
        asked_for = release.holdback_share > 0.0 or release.base_share > 0.0
        return asked_for or any(u.arm == CONTROL and u.served_at >= since for u in self._rated)

    # ---------------------------------------------------------------------------------------------- telling

    def _numbers(self, shift: Shift) -> dict[str, float]:
        return {"changed": 1.0, "since": shift.since, "before": shift.before, "after": shift.after}

    def _verdict(self, decision: Decision, reason: str, numbers: Mapping[str, float], *, subject: str = "") -> Verdict:
        self._counts.update(kind for kind in KINDS if kind in numbers)
        return Verdict(
            adapter_id=self._live,
            created_at=self._clock(),
            gate=DRIFT,
            decision=decision,
            evidence={k: round(v, 6) for k, v in numbers.items()},
            reason=subject + reason,
        )

    def _tell(self, cursor: str, position: int, verdicts: Sequence[Verdict]) -> None:
        """Once, also where it is found again after a restart."""
        if not verdicts or position <= self._told[cursor]:
            return
        for verdict in verdicts:
            log.log(logging.INFO if verdict.decision is Decision.PASS else logging.WARNING, "%s", verdict.reason)
        self._store.append(*verdicts, cursors={cursor: position})
        self._told[cursor] = position

    # ------------------------------------------------------------------------------------------- the state

    def state(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "read": self._read,
            "requests": self._requests.state(),
            "judgements": self._judgements.state(),
            "rated": [[u.served_at, u.adapter_id, u.arm, u.skill, list(u.rewards)] for u in self._rated],
            "suspicion": None if self._suspicion is None else asdict(self._suspicion),
            "live": self._live,
            "counts": self._counts,
            "lift": self._lift.state(),
            "lift_now": self._lift_now.state(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        if state["version"] != _VERSION:
            raise ValueError("it is of another version")
        self._requests.restore(state["requests"])
        self._judgements.restore(state["judgements"])
        self._lift.restore(state["lift"])
        self._lift_now.restore(state["lift_now"])
        self._rated.extend(Rated(at, AdapterId(a), arm, skill, tuple(r)) for at, a, arm, skill, r in state["rated"])
        self._suspicion = None if state["suspicion"] is None else Suspicion(**state["suspicion"])
        self._live = AdapterId(state["live"])
        self._counts = Counter(state["counts"])
        self._read = {name: int(state["read"][name]) for name in (ASKED, RATED)}


def _step_of(adapter_id: AdapterId) -> int:
    return int(adapter_id.rpartition("@")[2])
