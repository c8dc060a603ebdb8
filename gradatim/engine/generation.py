"""One request on its way through the engine, and the choices it is to bring back.

What is worked on by the engine's thread: the exact tokens, the text they make and where they stop. It knows nothing
of batches, caches or models.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from gradatim.engine.sampling import Drawn, Draws, new_draws
from gradatim.engine.text import StopFilter
from gradatim.nn.render import Renderer
from gradatim.types import AdapterId, Delta, Sampling, Started, Token

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


class Choice:
    """One of the n answers: draws, text and end."""

    def __init__(self, generation: Generation, index: int, renderer: Renderer, eos_ids: frozenset[int]) -> None:
        self.generation = generation
        self.index = index
        self.ids: list[int] = []  # drawn so far
        self.draws: Draws = new_draws(generation.sampling, index)
        self._eos_ids = eos_ids
        self._token_text = renderer.token_text
        self._text = renderer.stream()
        self._stop = StopFilter(generation.sampling.stop)

    def take(self, drawn: Drawn) -> Delta:
        """Add one token; the delta has a finish reason where it was the last one."""
        self.ids.append(drawn.id)
        top = tuple((i, self._token_text(i), logprob) for i, logprob in drawn.top)
        token = Token(id=drawn.id, text=self._token_text(drawn.id), logprob=drawn.logprob, top=top)
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
