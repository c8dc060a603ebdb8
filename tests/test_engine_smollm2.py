"""The embedded engine on the real model, against ``transformers.generate``."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from gradatim.config import EngineConfig
from gradatim.engine.transformers import TransformersEngine
from gradatim.nn.base import Base
from gradatim.nn.render import Renderer
from gradatim.testing.engine import collect
from gradatim.types import AdapterId, Delta, Request, Sampling, Started

QUESTIONS = ("What is the capital of France?", "Count to five.", "Say hello in Spanish, with an emoji.")


def test_greedy_answers_in_a_batch_are_those_of_generate(smollm2_base: Base, tmp_path: Path) -> None:
    renderer = Renderer(smollm2_base)
    engine = TransformersEngine(smollm2_base, renderer, EngineConfig(threads=1), tmp_path)
    sampling = Sampling(max_tokens=16, temperature=0)
    requests = [Request(messages=({"role": "user", "content": q},), sampling=sampling) for q in QUESTIONS]

    async def ask_all() -> list[tuple[Started, list[list[Delta]]]]:
        return await asyncio.gather(*[collect(engine, r, AdapterId("agent@0")) for r in requests])

    try:
        results = asyncio.run(ask_all())
    finally:
        engine.close()
    for started, (deltas,) in results:
        want, logprobs = reference(smollm2_base, started.prompt_ids)
        got = [token for delta in deltas for token in delta.tokens]
        assert [t.id for t in got] == want
        assert "".join(d.text for d in deltas) == renderer.decode(want)
        assert [t.logprob for t in got] == pytest.approx(logprobs, abs=1e-4)


@torch.inference_mode()
def reference(base: Base, prompt_ids: tuple[int, ...]) -> tuple[list[int], list[float]]:
    prompt = torch.tensor([prompt_ids])
    out = base.model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=16)
    answer = out[0, len(prompt_ids) :]
    logits = base.model(out).logits[0, len(prompt_ids) - 1 : -1].float()
    return answer.tolist(), logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0].tolist()
