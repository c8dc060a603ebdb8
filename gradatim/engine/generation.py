"""One request on its way through the engine, and the choices it is to bring back.

What is worked on by the engine's thread: the exact tokens, the text they make and where they stop. It knows nothing
of batches, caches or models.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from gradatim.engine.sampling import Drawn, Draws, new_draws
from gradatim.engine.text import StopFilter
from gradatim.nn.render import Renderer
from gradatim.protocols import Reading, Recollection
from gradatim.types import AdapterId, Delta, Sampling, Started, Token

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)
Event = Started | Delta | Exception


@dataclass(slots=True, eq=False)
class Generation:
    """One request: its prompt, its adapter, and the queue its caller reads."""

    prompt_ids: tuple[int, ...]  # (P,)
    sampling: Sampling
    limit: int  # tokens each choice may have
    adapter_id: AdapterId
    lora_slot: int
    prefix_key: str  # under which its keys and values are cached
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    cancelled: bool = False  # the caller has left
    recollection: Recollection | None = None
    turn: tuple[int, int] | None = None  # prompt tokens [a, b) over which a memory's key is averaged; None: it has none
    reread_from: int = sys.maxsize  # prompt tokens from here on are read though they may be cached
    reading: Reading | None = None  # of a request that may outgrow the window
    reserved: int = 0  # bytes, for what leaves the window
    seen: Tensor | None = None  # (H,) sum of the states of those that were read
    memory_failed: bool = False

    def look(self, states: Tensor, start: int) -> None:
        """``states`` (T, H) of the prompt's tokens from position ``start`` on."""
        if self.recollection is None or self.turn is None:
            return
        first, last = (min(max(at - start, 0), len(states)) for at in self.turn)
        if first >= last:
            return
        seen = states[first:last].float().sum(0)
        self.seen = seen if self.seen is None else self.seen + seen

    def situate(self) -> None:
        """The prompt is read: tell the memory where we are."""
        if self.recollection is None or self.turn is None:
            return
        try:
            if self.seen is None:
                raise ValueError("no token of the task's turn was read")
            self.recollection.situate((self.seen / (self.turn[1] - self.turn[0])).cpu().numpy())
        except Exception:  # noqa: BLE001 - the boundary to the memory: an answer without it is better than none
            self.forget()

    def lean(self, choice: Choice, logits: Tensor) -> None:
        """Ask the memory about the next token of a choice; ``logits`` (V,) are the model's own."""
        if self.recollection is None:
            return

        def logprobs(ids: Sequence[int]) -> Sequence[float]:
            wanted: list[float] = (logits[list(ids)] - logits.logsumexp(-1)).tolist()
            return wanted

        try:
            choice.draws.memory = self.recollection.lean(choice.ids, choice.path_logprob, logprobs)
        except Exception:  # noqa: BLE001 - as above
            self.forget()

    def forget(self) -> None:
        """Called where the memory has just failed."""
        logger.exception("the memory failed; the answer goes on without it")
        self.recollection = None
        self.memory_failed = True


@dataclass(slots=True)
class KeyReader:
    """A recollection that only keeps where it was asked; implements ``protocols.Recollection``."""

    key: NDArray[np.float32] | None = None

    def situate(self, key: NDArray[np.float32]) -> None:
        self.key = key

    def lean(
        self, drawn: Sequence[int], path_logprob: float, logprobs: Callable[[Sequence[int]], Sequence[float]]
    ) -> Mapping[int, float]:
        return {}

    def trace(self, tokens: Sequence[int]) -> Mapping[str, Any]:
        return {}


@dataclass(slots=True)
class StateReader(KeyReader):
    """Keeps what went into the token layer from position ``start`` of a prompt on."""

    start: int = 0
    states: list[Tensor] = field(default_factory=list)  # (T, H) each

    def read(self, states: Tensor, start: int) -> None:
        """``states`` (T, H) of the prompt's tokens from position ``start`` on."""
        self.states.append(states[max(0, self.start - start) :].clone())


class Choice:
    """One of the n answers: draws, text and end."""

    def __init__(self, generation: Generation, index: int, renderer: Renderer, eos_ids: frozenset[int]) -> None:
        self.generation = generation
        self.index = index
        self.ids: list[int] = []  # drawn so far
        self.path_logprob = 0.0  # of those, under the model and its token memory
        self.draws: Draws = new_draws(generation.sampling, index)
        self._eos_ids = eos_ids
        self._token_text = renderer.token_text
        self._text = renderer.stream()
        self._stop = StopFilter(generation.sampling.stop)

    def take(self, drawn: Drawn, model_logprob: float | None = None) -> Delta:
        """Add one token; the delta has a finish reason where it was the last one. ``model_logprob``: see ``Token``."""
        self.ids.append(drawn.id)
        self.path_logprob += drawn.logprob
        top = tuple((i, self._token_text(i), logprob) for i, logprob in drawn.top)
        token = Token(
            id=drawn.id,
            text=self._token_text(drawn.id),
            logprob=drawn.logprob,
            top=top,
            drawn_logprob=None if drawn.shift is None else drawn.logprob + drawn.shift,
            model_logprob=model_logprob,
        )
        ended = drawn.id in self._eos_ids
        text = self._stop.push("" if ended else self._text.push(drawn.id))
        reason: Literal["stop", "length"] | None = None
        if ended or self._stop.stopped:
            reason = "stop"
        elif len(self.ids) >= self.generation.limit:
            reason = "length"
        if reason and not self._stop.stopped:
            text += self._stop.push(self._text.flush())
            reason = "stop" if self._stop.stopped else reason
            text += self._stop.flush()
        return Delta(index=self.index, text=text, tokens=(token,), finish_reason=reason)


def make_choices(generation: Generation, renderer: Renderer, eos_ids: frozenset[int]) -> Sequence[Choice]:
    return [Choice(generation, i, renderer, eos_ids) for i in range(generation.sampling.n)]
