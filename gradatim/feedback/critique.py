"""Finished episodes -> the opinions of critics and of implicit signals, written as feedback.

An episode is finished when somebody gave its outcome, or when it has been quiet for a while; one that goes on later is
judged again, and the new opinion revises the old one. Two cursors in the store say what has been looked at: one over
steps, one over feedback. An opinion's id is made of who gives it and of what it is about, and it is written in one
transaction with the cursor, so a kill at any point loses nothing and doubles nothing. A critic that fails leaves an
unknown outcome, with its reason, and is counted. Knows nothing of rewards.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from gradatim.config import CriticConfig, CriticsConfig
from gradatim.feedback.critics import TOO_LONG, last_step
from gradatim.feedback.implicit import implicit
from gradatim.feedback.worker import Bench, Unknown
from gradatim.protocols import Store
from gradatim.types import OWN_IDS, Episode, EpisodeId, Feedback, Step

log = logging.getLogger(__name__)

STEPS = "critics.steps"  # cursor: every episode whose last step is not past it has been judged up to that step
OUTCOMES = "critics.outcomes"  # cursor: so has every episode with an outcome that is not past it
_PAGE = 64
_MOST_REMEMBERED = 100_000
_MOST_OPINIONS = 10_000  # on one episode, looked at for what critics said of it before


class Critique:
    """The driver of critics. Keeps nothing but counts; for one thread."""

    def __init__(
        self, store: Store, config: CriticsConfig, *, sources: Iterable[str], clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._config = config
        self._sources = frozenset(sources)  # kinds of sources that opinions may come from
        self._clock = clock
        self._bench = Bench(config.run)
        self._counts: Counter[tuple[str, str]] = Counter()  # (critic, judged | unknown)
        self._lock = threading.Lock()
        self._silent: set[tuple[int, str]] = set()  # (critic, last step) that had no opinion, and left no record of it

    def close(self) -> None:
        self._bench.close()

    def status(self) -> Mapping[str, Mapping[str, int]]:
        """Since this process began, by critic: how many episodes it ``judged``, and for how many it was ``unknown``."""
        with self._lock:
            names = sorted({name for name, _ in self._counts})
            return {n: {what: self._counts[n, what] for what in ("judged", "unknown")} for n in names}

    def turn(self, *, flush: bool = False) -> bool:
        """Judge what is finished. True if anything was written. ``flush`` takes every episode for finished."""
        told = self._after_outcomes()
        return self._after_steps(flush) or told

    def _after_outcomes(self) -> bool:
        worked = False
        while page := self._store.read(Feedback, after=self._store.cursor(OUTCOMES), limit=_PAGE):
            for position, feedback in page:
                ended = feedback.kind == "outcome" and not feedback.retracted and not _is_ours(feedback)
                records = self._judge(feedback.episode_id) if ended else []
                if records or position == page[-1][0]:
                    self._store.append(*records, cursors={OUTCOMES: position})
                    worked = worked or bool(records)
        return worked

    def _after_steps(self, flush: bool) -> bool:
        worked = False
        while page := self._store.read(Step, after=self._store.cursor(STEPS), limit=_PAGE):
            passed = 0
            for position, step in page:
                [(newest, _)] = self._store.newest(Step, episode_id=step.episode_id)
                last = newest == position  # an earlier step leaves its episode to the last one
                if last and not flush and self._clock() - step.created_at < self._config.quiet_s:
                    break
                records = self._judge(step.episode_id) if last else []
                if records:
                    self._store.append(*records, cursors={STEPS: position})
                    worked = True
                passed = position
            if passed > self._store.cursor(STEPS):
                self._store.append(cursors={STEPS: passed})
            if passed != page[-1][0]:
                break
        return worked

    # ------------------------------------------------------------------ one episode

    def _judge(self, episode_id: EpisodeId) -> list[Feedback]:
        """What is new or changed in the opinions on it, and retractions of what no longer holds."""
        episode = self._store.episode(episode_id)
        last = last_step(episode) if episode is not None else None
        if episode is None or last is None:
            return []
        own = f"through:{last.id}"
        rows = self._store.read(Feedback, episode_id=episode_id, limit=_MOST_OPINIONS)
        before = {f.id: f for _, f in rows if _is_ours(f)}  # the newest revision comes last
        out: list[Feedback] = []
        for number, critic in enumerate(self._config.run):
            tags = _tags(critic)
            earlier = [f for f in before.values() if tags[0] in f.tags]
            judged = any(own in f.tags and tags[1] in f.tags for f in earlier)
            silent = (number, last.id) in self._silent
            if not (judged or silent) and (not critic.skills or last.skill in critic.skills):
                said = self._ask(number, critic, episode)
                if not said:
                    self._remember((number, last.id))
                out += self._revised([self._signed(f, critic, (*tags, own)) for f in said], earlier)
        if self._config.implicit:
            signals = [self._as_record(f, (_IMPLICIT, own)) for f in implicit(episode, self._config.implicit)]
            earlier = [f for f in before.values() if _IMPLICIT in f.tags]
            known = {f.id: f for f in earlier}
            out += [f for f in self._revised(signals, earlier) if f.retracted or _is_news(f, known.get(f.id), own)]
        return out

    def _remember(self, silent: tuple[int, str]) -> None:
        """So that a flood of outcomes does not ask it again and again."""
        if len(self._silent) >= _MOST_REMEMBERED:
            self._silent.clear()
        self._silent.add(silent)

    def _ask(self, number: int, critic: CriticConfig, episode: Episode) -> list[Feedback]:
        said = self._bench.ask(number, episode)
        wrong = said.why if isinstance(said, Unknown) else _wrong(said, episode, self._sources)
        with self._lock:
            self._counts[critic.called, "unknown" if wrong else "judged"] += 1
        if wrong:
            log.warning("critic %s: unknown: %s", critic.called, wrong)
            return [_unknown(episode, wrong)]
        return [said] if isinstance(said, Feedback) else []

    def _signed(self, feedback: Feedback, critic: CriticConfig, tags: Sequence[str]) -> Feedback:
        named = feedback if feedback.source else replace(feedback, source=f"critic:{critic.called}")
        return self._as_record(named, tags)

    def _as_record(self, feedback: Feedback, tags: Sequence[str]) -> Feedback:
        about = (*tags[:-1], feedback.source, *feedback.target)  # not the step it was judged through: that is revised
        key = hashlib.sha256("\0".join(about).encode()).hexdigest()[:32]
        made = (*tags, *(t for t in feedback.tags if t not in tags))
        return replace(feedback, id=f"{OWN_IDS}{key}", created_at=self._clock(), tags=made, retracted=False)

    def _revised(self, now: Sequence[Feedback], earlier: Sequence[Feedback]) -> list[Feedback]:
        """What is said now, and what the same critic said before of something else, taken back."""
        ids = {f.id for f in now}
        stale = [f for f in earlier if f.id not in ids and not f.retracted]
        return [*now, *(replace(f, retracted=True, created_at=self._clock()) for f in stale)]


_IMPLICIT = "by:implicit"


def _tags(critic: CriticConfig) -> tuple[str, str]:
    return f"by:critic:{critic.called}", f"version:{critic.version}"


def _is_ours(feedback: Feedback) -> bool:
    """The wire takes no id of this form, so nobody else's is."""
    return feedback.id.startswith(OWN_IDS)


def _is_news(now: Feedback, before: Feedback | None, own: str) -> bool:
    """Not what stands already, and not what a person retracted since the episode last went on."""
    if before is None:
        return True
    return own not in before.tags and (before.retracted or before.confidence != now.confidence)


def _unknown(episode: Episode, why: str) -> Feedback:
    return Feedback(
        id="",
        created_at=0.0,
        kind="outcome",
        source="",
        episode_id=episode.id,
        value=None,
        comment=f"unknown: {why}"[:TOO_LONG],
        tags=("unknown",),
    )


def _wrong(said: Feedback | None, episode: Episode, sources: frozenset[str]) -> str:
    """Why what a critic gave cannot be recorded; empty where it can."""
    if said is None:
        return ""
    steps = {step.id for step in episode.steps}
    if said.episode_id != episode.id or not {said.step_id, said.rejected_id} <= {*steps, None}:
        return "its opinion is on another episode"
    if not all(isinstance(text, str) for text in (said.source, said.comment, said.correction, *said.tags)):
        return "a text of its opinion is no text"
    if said.source and (said.source.partition(":")[0] not in sources or not said.source.isprintable()):
        return "its source is not of a kind in reward.weights"
    if not (_within(said.value, -1.0) and _within(said.confidence, 0.0) and said.confidence != 0.0):
        return "its value is not in [-1, 1], or its confidence not in (0, 1]"
    return "" if _whole(said) else f"it is not a whole {said.kind}"


def _within(number: object, least: float) -> bool:
    return number is None or (isinstance(number, int | float) and math.isfinite(number) and least <= number <= 1.0)


def _whole(said: Feedback) -> bool:
    match said.kind:
        case "score":
            return said.value is not None
        case "outcome":
            return said.value in (None, -1.0, 1.0)
        case "preference":
            return said.step_id is not None and said.rejected_id not in (None, said.step_id)
        case "correction":
            return said.step_id is not None and bool(said.correction.strip())
        case "comment":
            return bool(said.comment.strip())
    return False
