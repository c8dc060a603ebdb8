"""The key space of a model, standardised by public text: what one tenant wrote would leave a trace in all keys.

The text is the reference of the Python language, which comes with every Python. The space is made once for a model and
kept; another text would make another space, whose keys are made anew.

Shapes: n states, D size of the hidden state.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gradatim.memory.key_space import EachToken, KeySpace, standardised_by
from gradatim.memory.token_file import replace
from gradatim.nn.base import Base
from gradatim.nn.render import Renderer
from gradatim.nn.states import states

log = logging.getLogger(__name__)
_TEXTS, _TOKENS = 32, 64  # of each text: 2048 states, some seconds of one core for the bundled model


def public_space(base: Base, layer: int, folder: Path) -> KeySpace[EachToken]:
    """Read from ``folder``, or made and kept there; a file that is damaged or of another model is made anew."""
    path = folder / f"space-{base.sha256[:16]}-{layer}.safetensors"
    tokenizer_sha256 = Renderer(base).digest()
    found = _read(path)
    if found is not None:
        pooling, said = found
        space = KeySpace(base.sha256, tokenizer_sha256, (layer,), pooling)
        if space.id == said:
            return space
    hidden = torch.cat([states(base.model, ids, layer) for ids in _windows(base)])  # (n, D)
    pooling = standardised_by(hidden.double().cpu().numpy())
    made = KeySpace(base.sha256, tokenizer_sha256, (layer,), pooling)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        axes = np.asarray(pooling.axes, np.float16)
        replace(path, save({"mean": pooling.mean, "scale": pooling.scale, "axes": axes}, {"space": made.id}))
    except OSError as e:
        log.warning("the key space is not kept, and is made anew at the next start: %s", e.strerror)
    return made


def _windows(base: Base) -> Iterator[list[int]]:
    step = max(1, len(topics) // _TEXTS)
    for name in sorted(topics)[::step][:_TEXTS]:
        ids: list[int] = base.tokenizer.encode(topics[name][: 16 * _TOKENS], add_special_tokens=False)
        yield ids[: min(_TOKENS, base.context_tokens)]


def _read(path: Path) -> tuple[EachToken, str] | None:
    """And the id of the space that it was made for."""
    if not os.path.exists(path):
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            said = (file.metadata() or {})["space"]
            mean, scale, axes = (file.get_tensor(name).astype(np.float32) for name in ("mean", "scale", "axes"))
            return EachToken(mean, scale, axes), said
    except (OSError, SafetensorError, KeyError) as e:
        log.warning("%s is damaged and made anew: %s", path, e)
        return None
