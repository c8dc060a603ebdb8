"""How fast to learn after the world was seen to change. Knows no model: it is a function of the store's records."""

from __future__ import annotations

from gradatim.config import DriftConfig
from gradatim.protocols import Store
from gradatim.types import DRIFT, Update, Verdict, is_new_world

_LOOK_BACK = 20  # verdicts on drift


class Pace:
    """Times the configured learning rate: ``drift.haste`` for the first updates after such a verdict, then 1."""

    def __init__(self, store: Store, config: DriftConfig) -> None:
        self._store, self._config = store, config

    def __call__(self) -> float:
        if self._config.react != "adapt":
            return 1.0
        told = self._store.newest(Verdict, gate=DRIFT, limit=_LOOK_BACK)
        changed = next((position for position, verdict in told if is_new_world(verdict)), None)
        if changed is None:
            return 1.0
        made = self._store.read(Update, after=changed, limit=max(1, self._config.haste_updates))
        return self._config.haste if len(made) < self._config.haste_updates else 1.0
