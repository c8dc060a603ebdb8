"""From one adapter's folder to the next one's: what an update starts from and what it leaves.

All that the learner remembers is in these folders, so a restart, a refusal or a rollback needs nothing of it. It knows
no losses and no examples.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from gradatim.config import LearnerConfig
from gradatim.errors import AdapterError, DamagedAdapterError, LearnerError
from gradatim.nn.base import Base
from gradatim.nn.lora import (
    STATE_FILE,
    LoraWeights,
    digest,
    fresh_weights,
    read_adapter,
    read_fisher,
    read_state,
    write_adapter,
)
from gradatim.types import Adapter, AdapterId

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Beside:
    """What an adapter's folder holds besides its weights, for its children to go on from."""

    state: Mapping[str, Tensor] = field(default_factory=dict)  # the optimiser's
    fisher: Mapping[str, Tensor] = field(default_factory=dict)  # of elastic weight consolidation


def read_sound(adapter: Adapter, data_dir: Path) -> LoraWeights:
    """Its weights. DamagedAdapterError where its files are missing or not what they were; AdapterError where the disk
    does not give them now, as when the data directory is not mounted."""
    folder = data_dir / adapter.path
    try:
        return read_adapter(folder, adapter.sha256)
    except AdapterError as e:
        cause = e.__cause__
        away = isinstance(cause, OSError) and not (isinstance(cause, FileNotFoundError) and folder.parent.is_dir())
        if away:
            raise
        raise DamagedAdapterError(adapter.id, f"{adapter.id} is damaged: {e}") from e


def start(base: Base, config: LearnerConfig, data_dir: Path, parent: Adapter) -> tuple[LoraWeights, Beside]:
    """The parent's weights and what is beside them, less what is damaged; fresh ones for the base. LearnerError where
    it is of another base, DamagedAdapterError or AdapterError as ``read_sound``."""
    if parent.base_sha256 != base.sha256:
        raise LearnerError(f"{parent.id} was trained on another base model ({parent.base_sha256[:12]})")
    if parent.step == 0:
        return fresh_weights(base.model, config.rank, config.alpha, config.seed), Beside()
    folder = data_dir / parent.path
    weights = read_sound(parent, data_dir)
    if weights.rank != config.rank:
        log.warning("%s has rank %d, not %d: its children keep it", parent.id, weights.rank, config.rank)
    if not (folder / STATE_FILE).exists():
        log.warning("the optimiser starts afresh: there is no state of it beside %s", parent.id)
    return weights, beside(folder)


def beside(folder: Path) -> Beside:
    """What is beside the weights in a folder, less what is damaged."""
    state: Mapping[str, Tensor] = {}
    fisher: Mapping[str, Tensor] = {}
    try:
        state = read_state(folder)
    except AdapterError as e:
        log.error("the optimiser starts afresh: %s", e)
    try:
        fisher = read_fisher(folder)
    except AdapterError as e:
        log.error("the Fisher information starts afresh: %s", e)
    return Beside(state, fisher)


def save(
    base: Base,
    data_dir: Path,
    name: str,
    weights: LoraWeights,
    kept: Beside,
    parent: Adapter,
    step: int,
    update_id: str,
) -> Adapter:
    """A child of ``parent``, its folder written. AdapterError where the disk refuses."""
    sha = digest(weights)
    path = f"adapters/{name.replace('/', '_')}@{step}-{sha[:12]}"
    base_name = str(getattr(base.model.config, "_name_or_path", "")) or "base"
    alpha = weights.scaling * weights.rank
    write_adapter(data_dir / path, weights, alpha, base_name, kept.state, kept.fisher)
    return Adapter(
        id=AdapterId(f"{name}@{step}"),
        name=name,
        step=step,
        base_sha256=base.sha256,
        parent_id=parent.id,
        sha256=sha,
        path=path,
        created_at=time.time(),
        update_id=update_id,
    )
