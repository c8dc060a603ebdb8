"""The reward that audited labels anchor: the weighted rule until there are enough of them, then a calibrated model.

An episode with an audited label has that for its reward. Of the others, the model judges those of which it is sure
enough for the stated risk, and abstains on the rest. Its state is a function of the records up to the cursor
``reward.fitted``: whoever reads the same log up to there has the same model, so a kill loses nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gradatim.config import RewardConfig
from gradatim.protocols import Store
from gradatim.reward.abstain import FAULT, FAULT_VALUE, fault
from gradatim.reward.calibrate import Calibrated, calibrate, is_enough
from gradatim.reward.evidence import Judged, evidence
from gradatim.reward.figures import Reliability, by_family, by_source, realised, reliabilities
from gradatim.reward.hidden import SOURCE, Hidden
from gradatim.reward.ledger import MODEL, Ledger
from gradatim.reward.weighted import WeightedReward
from gradatim.types import Case, Reward

log = logging.getLogger(__name__)

FITTED = "reward.fitted"  # cursor: the model is the one fitted to the records up to here
_MORE_LABELS = 1.1  # refitted when the labels are this many times as many as last time,
_MORE_EPISODES = 1.5  # or the episodes
_AUDITED_SURE = 0.99


@dataclass(frozen=True, slots=True)
class _Fit:
    model: Calibrated
    labels: int
    episodes: int
    alarms: int
    sources: tuple[Reliability, ...]


class AuditedReward:
    """``protocols.RewardModel``. With ``reward.model = "weighted"`` it never becomes calibrated, with ``"calibrated"``
    it abstains until it can be. ``read_only``: follow the cursor that another process moves."""

    def __init__(
        self,
        store: Store,
        config: RewardConfig,
        *,
        clock: Callable[[], float] = time.time,
        read_only: bool = False,
        hidden: Hidden | None = None,
    ) -> None:
        self._store, self._config, self._clock, self._read_only = store, config, clock, read_only
        self._weighted = WeightedReward(config, clock=clock)
        self._ledger = Ledger(store, config)
        self._hidden = hidden
        self._fit: _Fit | None = None
        self._fitted_at = 0
        self._tried = 0  # labels there were when a first fit was last tried

    # ------------------------------------------------------------------------------------------ judging

    def score(self, case: Case) -> Reward:
        if self._hidden is not None and self._learns:
            self._hidden.note(case)
        self.follow(case.position)
        row = evidence(case.episode.id, case.episode.steps, case.feedback, self._config.audited)
        if self._hidden is not None:
            row = self._hidden.heard([row])[0]
        value, sure, reason = self._judge(case, row)
        return Reward(
            episode_id=case.episode.id,
            created_at=self._clock(),
            value=value,
            confidence=sure,
            reason=reason,
            feedback_ids=tuple(f.id for f in case.feedback),
            position=case.position,
        )

    def _judge(self, case: Case, row: Judged) -> tuple[float | None, float, str]:
        if row.label is not None:
            return 2.0 * row.label - 1.0, _AUDITED_SURE, f"audited: {'good' if row.label else 'bad'}"
        weighted = self._weighted.score(case)
        alone = all(o.rater == SOURCE for o in row.opinions)  # nobody gave an opinion on it
        if not row.opinions or not self.is_calibrated or (alone and weighted.value is not None):
            if weighted.value is None and case.feedback and self.is_calibrated:
                return self._unjudged(case, weighted.reason)
            return weighted.value, weighted.confidence, weighted.reason
        if self._fit is None or self._fit.model.threshold.value is None:
            return self._unjudged(case, f"too few audited labels ({self._ledger.labels}) to keep the risk")
        good, sure = (float(x[0]) for x in self._fit.model.judge([row]))
        least = self._fit.model.threshold.value
        if sure == 0.0:
            return self._unjudged(case, "no audited episode had just these kinds of sources")
        if sure < least:
            return self._unjudged(case, f"not sure enough (P(good) {good:.2f}; acts from {least:.2f})")
        said = f"{MODEL} {good:.2f}, by {len(row.opinions)} sources and {self._fit.model.labels} audited labels"
        return 2.0 * good - 1.0, sure, said

    def _unjudged(self, case: Case, why: str) -> tuple[float | None, float, str]:
        """An abstention, unless the agent made it one."""
        if blame := fault(case.episode):
            return FAULT_VALUE, 0.0, f"{FAULT}: {blame}"
        return None, 0.0, why if why.startswith("abstained") else f"abstained: {why}"

    # ------------------------------------------------------------------------------------------ fitting

    @property
    def is_calibrated(self) -> bool:
        """Or whether the weighted rule still speaks."""
        if self._config.model == "auto":
            return self._fit is not None
        return self._config.model == "calibrated"

    @property
    def _learns(self) -> bool:
        return self._config.model != "weighted" and bool(self._config.audited)

    def follow(self, position: int) -> None:
        """Take in the records up to a position; fit to them where there is enough that is new."""
        if not self._learns:
            return
        self._take_up()
        self._ledger.advance(position)
        if self._read_only or not self._is_due():
            return
        if self._fit is None and not self._can_be_fitted():
            return
        self._refit()
        self._fitted_at = self._ledger.cursor
        self._store.append(cursors={FITTED: self._fitted_at})

    def _can_be_fitted(self) -> bool:
        """Where nobody else spoke of the audited episodes, the states over their answers may."""
        rows = self._ledger.rows()
        enough = is_enough(rows, self._config)
        if enough or self._hidden is None:
            return enough
        if self._ledger.labels < self._tried * _MORE_LABELS:
            return False
        self._tried = self._ledger.labels
        self._hidden.fit(rows, self._ledger.cursor)
        return is_enough(self._hidden.heard(rows, self._ledger.cursor), self._config)

    def _take_up(self) -> None:
        """The fit that the cursor names, as another process made it, or this one before it was killed."""
        at = self._store.cursor(FITTED) if self._read_only or self._ledger.cursor == 0 else self._fitted_at
        if at == self._fitted_at:
            return
        if self._ledger.cursor > at:
            self._ledger = Ledger(self._store, self._config)
        self._ledger.advance(at)
        self._refit()
        self._fitted_at = at

    def _is_due(self) -> bool:
        ledger, fit = self._ledger, self._fit
        if fit is None:
            return ledger.labels >= self._config.min_labels
        if ledger.alarms != fit.alarms:
            return True
        more = max(fit.labels + 5, fit.labels * _MORE_LABELS)
        return ledger.labels >= more or ledger.episodes >= max(fit.episodes + 50, fit.episodes * _MORE_EPISODES)

    def _refit(self) -> None:
        rows, cursor = self._ledger.rows(), self._ledger.cursor
        if self._hidden is not None:
            self._hidden.fit(rows, cursor)
            self._hidden.prune(rows, cursor)
            rows = self._hidden.heard(rows, cursor)
        model = calibrate(rows, self._config, stale=self._ledger.stale())
        if self._fit is not None and self._ledger.alarms != self._fit.alarms:
            log.warning("rewards no longer kept the stated risk of %.0f %%: refitted", 100 * self._config.risk)
        sources = tuple(reliabilities(model.combiner, rows))
        self._fit = _Fit(model, self._ledger.labels, self._ledger.episodes, self._ledger.alarms, sources)

    # ------------------------------------------------------------------------------------------ looking

    def describe(self) -> dict[str, Any]:
        """How it judges, in plain values, for whoever looks at it. ``window_...``: of the newest audited labels, what
        had been said before they came; the others are of the held-out labels that the model was made with."""
        fit, config = self._fit, self._config
        told: dict[str, Any] = {
            "rule": "calibrated" if self.is_calibrated else "weighted",
            "why": self._why(),
            "position": self._ledger.cursor,
            "audited_labels": self._ledger.labels,
            "labels_wanted": config.min_labels,
            "risk": config.risk,
            "confidence": config.confidence,
            "risk_alarms": self._ledger.alarms,
            **realised(self._ledger.audits),
        }
        if self._hidden is not None:
            told |= {"hidden_speaks": self._hidden.speaks, "hidden_refused": self._hidden.refused}
        if fit is None:
            return told
        held = fit.model.threshold
        return told | {
            "held_out_labels": held.labels,
            "acts_from": held.value,
            "coverage": fit.model.coverage,
            "ece": fit.model.ece,
            "selective_risk": held.errors / held.kept if held.kept else None,
            "families": by_family(fit.sources),
            "sources": by_source(fit.sources),
        }

    def _why(self) -> str:
        """Why this rule speaks, and not the other."""
        labels, wanted = self._ledger.labels, self._config.min_labels
        if self._config.model != "auto":
            return f'reward.model = "{self._config.model}"'
        if self._fit is not None:
            return f"fitted to {self._fit.labels} audited labels"
        if labels < wanted:
            return f"{labels} audited labels of the {wanted} that calibration takes"
        return f"of {labels} audited labels too few are on episodes that others judged too, or are of one kind"

    @property
    def model(self) -> Calibrated | None:
        return self._fit.model if self._fit else None

    def rows(self) -> list[Judged]:
        """What it knows of the newest episodes, with all that speaks of them."""
        rows = self._ledger.rows()
        return rows if self._hidden is None else self._hidden.heard(rows)

    @property
    def ledger(self) -> Ledger:
        return self._ledger
