"""A sentence encoder beside the model: one vector for a text, near to those of texts that mean the same.

The states of a small causal model tell words apart better than meanings. It knows no memory.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradatim.errors import ConfigError
from gradatim.types import Message


class SentenceEncoder:
    """``name``: the folder or hub id of a sentence-transformers model. It runs on the CPU and takes one text at a time,
    from any thread; of a long one it reads the beginning. ConfigError where there is none."""

    def __init__(self, name: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as e:
            raise ConfigError("memory.encoder needs sentence-transformers: pip install 'gradatim[encoder]'") from e
        try:
            self._model: Any = SentenceTransformer(name, device="cpu")
        except (OSError, ValueError) as e:
            said = str(e).splitlines()[0] if str(e) else type(e).__name__
            raise ConfigError(f"memory.encoder = {name!r} is no sentence-transformers model: {said}") from e
        self._lock = threading.Lock()
        self.sha256 = _digest(self._model.state_dict(), repr(self._model))

    def vector(self, text: str) -> NDArray[np.float32]:
        """(D,) of length 1."""
        with self._lock, torch.inference_mode():
            found: NDArray[np.float32] = self._model.encode(text, normalize_embeddings=True, show_progress_bar=False)
        return found


def asked_in(messages: Sequence[Message] | None, prompt: str) -> str:
    """The text of the last message that has any; of several parts, of all that are text. The prompt where there is
    none."""
    return next((text for message in reversed(messages or ()) if (text := _text(message.get("content")))), prompt)


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else ()
    return "".join(str(p["text"]) for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str))


def _digest(weights: dict[str, torch.Tensor], shape: str) -> str:
    """Of all that a vector depends on; ``shape``: its modules and their settings."""
    sha = hashlib.sha256(shape.encode())
    for name in sorted(weights):
        sha.update(name.encode())
        sha.update(weights[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
