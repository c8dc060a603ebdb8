"""Which adapters keep the optimiser's state beside their weights: those that an update may start from.

That is the live one, what is on its way up and its parents, and the last ones that were live, which a rollback may
bring back. Of all others the weights stay and the state goes: it is twice their size. After a rollback to one of
those the optimiser starts afresh, which the learner says. Knows no tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from gradatim.config import Config
from gradatim.store import SqlStore
from gradatim.types import ON_THE_WAY, Adapter, AdapterId, Move, Stage

log = logging.getLogger(__name__)

FILES = ("optimizer.safetensors", "optimizer.sha256")
LAST_LIVE = 8
_LOOK_BACK = 400  # changes of stage among which the last live ones are looked for


class OptimiserStates:
    """Call it after anything changed. The first call looks at all folders, later ones at those that are new."""

    def __init__(self, store: SqlStore, config: Config) -> None:
        self._store = store
        self._name = config.name
        self._folders = Path(config.data_dir) / "adapters"
        self._known: set[Path] | None = None  # folders that may hold a state
        self._seen = 0  # store position of the newest adapter
        self._generation = -1  # of the stages when it was called last

    def __call__(self) -> list[Path]:
        """The folders that lost their state. A file that cannot be removed is left, and tried again."""
        generation = self._store.generation()
        if generation == self._generation:
            return []
        kept = {self._folder(adapter_id) for adapter_id in set(self._needed())}
        removed = [folder for folder in sorted(self._found() - kept) if self._remove(folder)]
        self._known = self._found() - set(removed)
        self._generation = generation
        return removed

    def _needed(self) -> Iterator[AdapterId]:
        for adapter_id, stage in self._store.stages(self._name, Stage.LIVE, *ON_THE_WAY).items():
            yield adapter_id
            if stage is not Stage.LIVE:
                yield from (a.parent_id for _, a in self._store.newest(Adapter, id=adapter_id) if a.parent_id)
        moves = (move for _, move in self._store.newest(Move, limit=_LOOK_BACK))
        live = [m.adapter_id for m in moves if m.after is Stage.LIVE and m.adapter_id.rpartition("@")[0] == self._name]
        yield from list(dict.fromkeys(live))[:LAST_LIVE]

    def _found(self) -> set[Path]:
        if self._known is None:
            self._seen = max((position for position, _ in self._store.newest(Adapter)), default=0)
            own = f"{self._name.replace('/', '_')}@"
            found = {path.parent for name in FILES for path in self._folders.glob(f"*/{name}")}
            self._known = {folder for folder in found if folder.name.startswith(own)}
        while page := self._store.read(Adapter, after=self._seen):
            self._seen = page[-1][0]
            self._known |= {self._folders / Path(a.path).name for _, a in page if a.path and a.name == self._name}
        return self._known

    def _folder(self, adapter_id: AdapterId) -> Path:
        paths = [a.path for _, a in self._store.newest(Adapter, id=adapter_id)]
        return self._folders / Path(paths[0] if paths else "").name

    def _remove(self, folder: Path) -> bool:
        try:
            for name in FILES:
                (folder / name).unlink(missing_ok=True)
        except OSError as e:
            log.warning("the optimiser's state in %s cannot be removed: %s", folder, e.strerror)
            return False
        return True
