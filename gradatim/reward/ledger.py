"""All feedback up to a position of the log, folded into what the learned reward is fitted to.

The same records always give the same ledger, in however many pieces they were read: it may be thrown away at any
time and made again. It keeps the newest labelled and the newest unlabelled episodes, and of one rater no more opinions
than ``source_cap``, so that nobody floods the rest out. Knows nothing of reliabilities.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, replace

from gradatim.config import RewardConfig
from gradatim.opinions import is_held_out
from gradatim.protocols import Store
from gradatim.reward.abstain import Watch
from gradatim.reward.evidence import Judged, evidence, is_audited, label_of
from gradatim.reward.figures import Audit
from gradatim.types import DRIFT, EpisodeId, Feedback, Reward, Step, Verdict, is_new_world

MODEL = "P(good)"  # the first word of the reason of a reward that the learned model gave
LABELLED = 2000  # episodes kept
UNLABELLED = 20_000  # episodes kept,
FITTED = 3000  # and how many of them are fitted to
AUDITS = 200  # audited labels, the newest, that what was said before them is compared with
_PAGE = 1000


@dataclass(slots=True)
class _Entry:
    position: int  # of its newest feedback
    feedback: dict[str, Feedback] = field(default_factory=dict)
    row: Judged | None = None
    stale: bool = False  # labelled before the world changed


class Ledger:
    """``cursor``: the newest feedback that is in it. ``alarms``: how often the stated risk was found not to be kept, or
    the world to have changed. ``audits``: the newest labels of episodes that had been judged, or abstained on, by
    whichever rule spoke."""

    def __init__(self, store: Store, config: RewardConfig) -> None:
        self._store, self._config = store, config
        self._labelled: dict[EpisodeId, _Entry] = {}  # each in the order of their newest feedback
        self._open: dict[EpisodeId, _Entry] = {}
        self.cursor = 0
        self.watch = Watch(config.risk)
        self.alarms = 0
        self._turned = 0  # position of the newest verdict on the world that was looked at
        self.audits: deque[Audit] = deque(maxlen=AUDITS)

    def advance(self, upto: int) -> None:
        """Read on to a position, and not beyond."""
        while self.cursor < upto:
            limit = min(_PAGE, upto - self.cursor)  # no more can stand there
            page = [row for row in self._store.read(Feedback, after=self.cursor, limit=limit) if row[0] <= upto]
            changes = self._changes(page[-1][0]) if page else deque()
            for position, record in page:
                while changes and changes[0][0] < position:
                    self._grow_stale(*changes.popleft())
                self._take(position, record)
                self.cursor = position
            if len(page) < limit:
                return

    def _changes(self, upto: int) -> deque[tuple[int, float]]:
        """(position, since when) of each new world before a position. What stands behind the newest feedback takes
        effect with the next."""
        found: deque[tuple[int, float]] = deque()
        for at, verdict in self._store.read(Verdict, after=self._turned, gate=DRIFT):
            if at < upto and is_new_world(verdict):
                found.append((at, verdict.evidence.get("since", verdict.created_at)))
            elif at < upto and not found:
                self._turned = at
        return found

    def _grow_stale(self, position: int, since: float) -> None:
        """Labels from before then are of another world."""
        self._turned = position
        self.alarms += 1
        for entry in self._labelled.values():
            told = [f.created_at for f in entry.feedback.values() if is_audited(f, self._config.audited)]
            entry.stale = entry.stale or max(told, default=0.0) < since

    def _take(self, position: int, record: Feedback) -> None:
        if is_held_out(record, self._config):
            return
        key = record.episode_id
        before = self._labelled.pop(key, None)
        entry = before or self._open.pop(key, None) or _Entry(position)
        entry.position, entry.row = position, None
        if record.retracted:
            entry.feedback.pop(record.id, None)
        else:
            entry.feedback[record.id] = record
        label = label_of(entry.feedback.values(), self._config.audited)
        kept, most = (self._open, UNLABELLED) if label is None else (self._labelled, LABELLED)
        if label is not None and before is None:
            entry.stale = False
            self._check(position, key, label)
        if entry.feedback:
            kept[key] = entry
        if len(kept) > most:
            del kept[next(iter(kept))]

    def _check(self, position: int, episode_id: EpisodeId, label: int) -> None:
        """What had been said before the label came; of the model's rewards, whether they keep the risk."""
        said = self._store.newest(Reward, before=position, episode_id=episode_id)
        if not said:
            return
        value = said[0][1].value
        self.audits.append(Audit(None if value is None else (1.0 + value) / 2.0, label))
        if value is None or not said[0][1].reason.startswith(MODEL):
            return
        if self.watch.see((value > 0.0) != bool(label)):
            self.alarms += 1
            for entry in self._labelled.values():
                entry.stale = True

    @property
    def labels(self) -> int:
        return len(self._labelled)

    @property
    def episodes(self) -> int:
        return len(self._labelled) + len(self._open)

    def stale(self) -> frozenset[str]:
        return frozenset(key for key, entry in self._labelled.items() if entry.stale)

    def rows(self) -> list[Judged]:
        """All labelled episodes and the newest others; the oldest opinions of whoever has more than the cap are out."""
        spoken: Counter[str] = Counter()
        out = [self._capped(self._row(key, entry), spoken) for key, entry in reversed(self._labelled.items())]
        spoken.clear()
        left = FITTED
        for key, entry in reversed(self._open.items()):
            row = self._capped(self._row(key, entry), spoken)
            if row.opinions:
                out.append(row)
                left -= 1
            if left == 0:
                break
        return out

    def _capped(self, row: Judged, spoken: Counter[str]) -> Judged:
        spoken.update(o.rater for o in row.opinions)
        kept = tuple(o for o in row.opinions if spoken[o.rater] <= self._config.source_cap)
        return row if len(kept) == len(row.opinions) else replace(row, opinions=kept)

    def row(self, episode_id: EpisodeId) -> Judged | None:
        entry = self._labelled.get(episode_id) or self._open.get(episode_id)
        return self._row(episode_id, entry) if entry else None

    def _row(self, key: EpisodeId, entry: _Entry) -> Judged:
        if entry.row is None:
            steps = [s for at, s in self._store.read(Step, episode_id=key) if at <= entry.position]
            entry.row = evidence(key, steps, tuple(entry.feedback.values()), self._config.audited)
        return entry.row
