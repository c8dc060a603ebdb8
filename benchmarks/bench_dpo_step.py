"""One DPO step against TRL's DPOTrainer, on the same batch of token ids: CPU time, peak memory, and equality.

SmolLM2-135M, LoRA of rank 16 on all linear layers, AdamW and clipping on both sides, one thread. TRL's own
``training_step`` is called on our batch, in the mode that is fastest for it: its model in the dtype of the run, bf16
autocast in bf16, no gradient checkpointing. Both sides alternate in one process and are timed in process CPU seconds;
still, run it on an idle machine: beside other work the ratios came out a fifth lower. Peaks are of one process each,
less what it held before its first step. A batch of 16 pairs does not fit TRL's memory here in one pass: TRL
accumulates the gradients of 4 passes of 4; and behind the long system prompt it takes two passes of 2 pairs. Each part
runs in a process of its own.

Besides: the steps of KTO, APO-zero and SFT; a batch of agent steps behind one system prompt of 1024 tokens; the shape
of this project's own updates, hand-written layers against the model-agnostic path; and the matrix products alone, as
the floor. ``trl_sides`` is TRL's side, ``step_workload`` ours.

Needs the extra ``bench``: pip install 'gradatim[bench]'.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness

harness.threads()

import torch
from step_workload import (
    LONG_SYSTEM_TOKENS,
    MICRO,
    RANK,
    SYSTEM_TOKENS,
    Ours,
    Pair,
    Thumb,
    load,
    make_pairs,
    relative,
    text_ids,
    thumbs_of,
)
from torch import Tensor

from gradatim.nn.attend import plan
from gradatim.nn.base import Base
from gradatim.nn.pack import Answer, pack, packed_tokens

if TYPE_CHECKING:
    from trl_sides import TrlDpo

LONG_AT_ONCE = 2  # pairs behind the long system prompt in a pass of TRL's: with 4 it takes 18 GB

# -------------------------------------------------------------------------------------------- measuring


def cpu_s(step: Callable[[], Any]) -> float:
    started = time.process_time()
    step()
    return time.process_time() - started


def alternate(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """CPU seconds of each, the best of the rounds."""
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds):
        for name, step in sides.items():
            spent = cpu_s(step)
            print(f"  {name}: {spent:.2f} CPU s", file=sys.stderr, flush=True)
            best[name] = min(best[name], spent)
    return best


def floor_s(base: Base, pairs: Sequence[Pair]) -> float:
    """The matrix products of one step with a cached reference, alone: layers, LoRA, attention and head, forward and
    backward."""
    answers = [a for p in pairs for a in p.answers]
    tokens = packed_tokens(answers)
    predicted = sum(len(a.completion_ids) for a in answers)
    head = base.model.get_output_embeddings()
    linears = [m for m in base.model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    shapes = {tuple(m.weight.shape): m.weight for m in linears}
    x = {shape: torch.randn(tokens, shape[1]).to(base.dtype) for shape in shapes}
    g = {shape: torch.randn(tokens, shape[0]).to(base.dtype) for shape in shapes}
    branch = {s: (torch.randn(RANK, s[1]).to(base.dtype), torch.randn(s[0], RANK).to(base.dtype)) for s in shapes}
    hidden = torch.randn(predicted, head.weight.shape[1]).to(base.dtype)
    logits = torch.randn(128, head.weight.shape[0]).to(base.dtype)
    attention = attention_products(base, answers)

    def products() -> None:
        attention()
        for linear in linears:
            shape = tuple(linear.weight.shape)
            a, b = branch[shape]
            _ = x[shape] @ linear.weight.t(), g[shape] @ linear.weight
            h = x[shape] @ a.t()
            t = g[shape] @ b
            _ = h @ b.t(), t @ a, h.t() @ g[shape], t.t() @ x[shape]
        for start in range(0, predicted, 128):
            rows = hidden[start : start + 128]
            _ = rows @ head.weight.t(), logits[: len(rows)] @ head.weight

    with torch.no_grad():
        return min(cpu_s(products) for _ in range(2))


def attention_products(base: Base, answers: Sequence[Answer]) -> Callable[[], None]:
    """Those of attention in all layers: scores in fp32 and mixed values, then the gradients of values, probabilities,
    queries and keys."""
    config = base.model.config
    groups, size = config.num_attention_heads // config.num_key_value_heads, config.head_dim
    parts = plan(pack(answers).blocks, groups, base.device, torch.float32).parts
    shapes = [(groups * (p.end - p.start), sum(end - start for start, end in p.keys)) for p in parts]

    def rows(count: int) -> Tensor:
        return torch.randn(config.num_key_value_heads, count, size)

    given = [(rows(m), rows(n), rows(m).to(base.dtype), rows(n).to(base.dtype)) for m, n in shapes]

    def products() -> None:
        for _ in range(config.num_hidden_layers):
            for q, k, q_low, k_low in given:
                p = (q @ k.transpose(1, 2)).to(base.dtype)
                _ = p @ k_low, p.transpose(1, 2) @ q_low, q_low @ k_low.transpose(1, 2)
                _ = p @ k_low, p.transpose(1, 2) @ q_low

    return products


# ------------------------------------------------------------------------------------------------ parts


def trl_dpo(base: Base, folder: Path, side: str = "trl", at_once: int = MICRO) -> TrlDpo:
    from trl_sides import TrlDpo  # an optional dependency

    return TrlDpo(base, folder, checkpointing=side == "trl-checkpointing", at_once=at_once)


def peak_bytes(side: str, args: argparse.Namespace) -> None:
    """In a process of its own: print by how much two steps raise the peak of resident memory."""
    base = load(args.data_dir, args.dtype, quick=args.quick)
    pairs = make_pairs(text_ids(base.tokenizer), args.pairs, SYSTEM_TOKENS, (162, 210), (48, 96))
    with tempfile.TemporaryDirectory() as folder:
        side_of: Ours | TrlDpo = Ours(base) if side == "ours" else trl_dpo(base, Path(folder), side)
        for parameter in base.model.parameters():
            parameter.max()  # mapped pages count once they were read
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        before = _status_bytes("VmRSS")
        for _ in range(2):
            side_of.step(pairs)
        print(json.dumps({"peak_bytes": _status_bytes("VmHWM") - before}))


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key + ":")))


def measured_peak(side: str, dtype: str, count: int, bench: argparse.Namespace, data_dir: Path) -> float:
    command = [sys.executable, __file__, "--peak", side, "--dtype", dtype, "--data-dir", str(data_dir)]
    command += ["--pairs", str(count), *(["--quick"] if bench.quick else [])]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = float(json.loads(run.stdout.strip().splitlines()[-1])["peak_bytes"])
    print(f"  peak of {side}, {dtype}, {count} pairs: {found / 1e6:.0f} MB", file=sys.stderr, flush=True)
    return found


class Bench:
    """What is measured, for one dtype at a time; goals and details accumulate."""

    def __init__(self, args: argparse.Namespace, data_dir: Path, folder: Path) -> None:
        self.args = args
        self.data_dir = data_dir
        self.folder = folder
        self.goals: list[harness.Goal] = []
        self.details: dict[str, Any] = {}
        self._fp32_gradient: dict[str, Tensor] = {}

    def goal(self, name: str, value: float, target: str = "reported") -> None:
        self.goals.append(harness.Goal(name, value, target))
        print(f"{name}: {value:.4g} ({target})", file=sys.stderr, flush=True)

    def run(self, dtype: str) -> None:
        ours_base, trl_base = (load(self.data_dir, dtype, quick=self.args.quick) for _ in range(2))
        ids = text_ids(ours_base.tokenizer)
        pairs = make_pairs(ids, MICRO, SYSTEM_TOKENS, (162, 210), (48, 96))
        trl = trl_dpo(trl_base, self.folder)
        ours = Ours(ours_base)
        self.equality(dtype, ours, trl, pairs)
        self.speed(dtype, ours, trl, pairs, ours_base)
        if dtype == "float32" and not self.args.all:
            return
        many = make_pairs(ids, 16, SYSTEM_TOKENS, (162, 210), (48, 96))
        self.against(f"{dtype}, 16 pairs", ours, trl, many, 1)

    def agents(self, dtype: str) -> None:
        """Steps behind one long system prompt."""
        if dtype == "float32" and not self.args.all:
            return
        ours_base, trl_base = (load(self.data_dir, dtype, quick=self.args.quick) for _ in range(2))
        trl, ours = trl_dpo(trl_base, self.folder, at_once=LONG_AT_ONCE), Ours(ours_base)
        agents = make_pairs(text_ids(ours_base.tokenizer), MICRO, LONG_SYSTEM_TOKENS, (230, 280), (48, 96))
        spent = alternate({"trl": lambda: trl.step(agents), "ours": lambda: ours.step(agents)}, 1)
        self.details[f"{dtype}, agent steps"] = spent
        name = f"{dtype}: 4 pairs behind a 1024-token system prompt, TRL / ours"
        self.goal(name, spent["trl"] / spent["ours"], ">= 5")

    def equality(self, dtype: str, ours: Ours, trl: TrlDpo, pairs: Sequence[Pair]) -> None:
        expected_loss, found_loss = trl.gradient(pairs), ours.gradient(pairs)
        expected, found = trl.gradients(), ours.gradients()
        if dtype == "float32":
            self._fp32_gradient = expected
            worst = max(relative({n: found[n]}, {n: expected[n]}) for n in expected)
            self.goal("float32: loss, relative difference", abs(found_loss - expected_loss) / expected_loss, "<= 1e-5")
            self.goal("float32: gradient, relative difference", relative(found, expected), "<= 1e-4")
            self.goal("float32: gradient of the worst tensor, relative difference", worst)
            return
        if not self._fp32_gradient:
            return
        theirs = relative(expected, self._fp32_gradient)
        mine = relative(found, self._fp32_gradient)
        self.goal("bfloat16: error of TRL's gradient against float32", theirs)
        self.goal("bfloat16: error of our gradient against float32", mine)
        self.goal("bfloat16: our error / TRL's", mine / theirs, "<= 1")

    def speed(self, dtype: str, ours: Ours, trl: TrlDpo, pairs: Sequence[Pair], base: Base) -> None:
        spent = self.against(f"{dtype}, 4 pairs", ours, trl, pairs, 2)
        self.goal(
            f"{dtype}, 4 pairs: matrix products alone / our cached step",
            floor_s(base, pairs) / spent["ours, cached"],
            ">= 0.65",
        )

    def against(self, name: str, ours: Ours, trl: TrlDpo, pairs: Sequence[Pair], rounds: int) -> dict[str, float]:
        mine, theirs = ours.reference(pairs), trl.reference(pairs)
        sides = {
            "trl": lambda: trl.step(pairs),
            "ours": lambda: ours.step(pairs),
            "trl, cached": lambda: trl.step(pairs, theirs),
            "ours, cached": lambda: ours.step(pairs, mine),
        }
        spent = alternate(sides, rounds)
        self.details[name] = spent | {
            "tokens": sum(len(a.fed) for p in pairs for a in p.answers),
            "packed_tokens": packed_tokens([a for p in pairs for a in p.answers]),
        }
        self.goal(f"{name}: reference in the step, TRL / ours", spent["trl"] / spent["ours"], ">= 4")
        self.goal(f"{name}: cached reference, TRL / ours", spent["trl, cached"] / spent["ours, cached"], ">= 4")
        self.goal(
            f"{name}: TRL's default / ours with a cached reference", spent["trl"] / spent["ours, cached"], ">= 5.5"
        )
        return spent

    def streaming(self, dtype: str) -> None:
        """The steps that thumbs and corrections make: one answer to a prompt each."""
        ids: Sequence[int] = ()
        for name in ("kto", "apo_zero_unpaired", "sft"):
            ours_base, trl_base = (load(self.data_dir, dtype, quick=self.args.quick) for _ in range(2))
            ids = ids or text_ids(ours_base.tokenizer)
            thumbs = thumbs_of(make_pairs(ids, MICRO, SYSTEM_TOKENS, (162, 210), (48, 96)))
            self._stream(f"{dtype}, 4 answers, {name}", name, (Ours(ours_base), trl_base), thumbs)

    def _stream(self, label: str, name: str, sides: tuple[Ours, Base], thumbs: Sequence[Thumb]) -> None:
        from trl_sides import TrlSft, TrlThumbs  # an optional dependency

        ours = sides[0]
        sft = name == "sft"
        trl = TrlSft(sides[1], self.folder) if sft else TrlThumbs(sides[1], self.folder, name)
        found: dict[str, float] = {}

        def mine() -> None:
            found["ours"] = ours.sft_gradient(thumbs) if sft else ours.thumbs_gradient(thumbs, kto=name == "kto")

        def theirs() -> None:
            found["trl"] = trl.gradient(thumbs)

        spent = alternate({"trl": theirs, "ours": mine}, 1)
        self.details[label] = spent | {f"loss, {side}": value for side, value in found.items()}
        self.goal(f"{label}: TRL / ours", spent["trl"] / spent["ours"])
        if label.startswith("float32"):
            self.goal(f"{label}: loss, relative difference", abs(found["ours"] / found["trl"] - 1), "<= 1e-5")
            self.goal(f"{label}: gradient, relative difference", relative(ours.gradients(), trl.gradients()), "<= 1e-4")

    def product(self, dtype: str) -> None:
        """24 pairs of an agent's steps, as in this project's updates: long shared prompts, answers of a few tokens."""
        bases = [load(self.data_dir, dtype, quick=self.args.quick) for _ in range(2)]
        pairs = make_pairs(text_ids(bases[0].tokenizer), 24, 200, (30, 70), (5, 10))
        usual = make_pairs(text_ids(bases[0].tokenizer), MICRO, SYSTEM_TOKENS, (162, 210), (48, 96))
        ours, generic = Ours(bases[0]), Ours(bases[1], generic=True)
        for name, batch in (("24 pairs of short agent steps", pairs), ("4 pairs", usual)):
            cached = ours.reference(batch)
            sides = {
                "generic": lambda batch=batch, cached=cached: generic.step(batch, cached),
                "ours": lambda batch=batch, cached=cached: ours.step(batch, cached),
            }
            spent = alternate(sides, 2)
            self.details[f"{dtype}, {name}, paths"] = spent
            self.goal(
                f"{dtype}, {name}: model-agnostic path / hand-written layers", spent["generic"] / spent["ours"], ">= 1"
            )

    def memory(self, dtype: str) -> None:
        found = {
            s: measured_peak(s, dtype, MICRO, self.args, self.data_dir) for s in ("trl", "trl-checkpointing", "ours")
        }
        found["ours, 16 pairs"] = measured_peak("ours", dtype, 16, self.args, self.data_dir)
        self.details[f"{dtype}, peak bytes above the weights"] = found
        self.goal(f"{dtype}: peak memory above the weights, ours / TRL", found["ours"] / found["trl"], "<= 0.25")
        name = f"{dtype}: the same against TRL with gradient checkpointing, which costs it a pass more"
        self.goal(name, found["ours"] / found["trl-checkpointing"])
        self.goal(f"{dtype}: our peak, 16 pairs / 4", found["ours, 16 pairs"] / found["ours"])


PARTS = ("trl", "agents", "streaming", "paths", "memory")


def run_part(part: str, dtypes: Sequence[str], args: argparse.Namespace, data_dir: Path) -> Bench:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, data_dir, Path(folder))
        measure: Mapping[str, Callable[[str], None]] = {
            "trl": bench.run,
            "agents": bench.agents,
            "streaming": bench.streaming,
            "paths": bench.product,
            "memory": bench.memory,
        }
        for dtype in dtypes:
            measure[part](dtype)
    return bench


def measured_part(part: str, args: argparse.Namespace, data_dir: Path, results: Path) -> Mapping[str, Any]:
    """In a process of its own, which gives its memory back. One that lies in ``results`` is not measured again."""
    kept_in = results / f"{part}.json"
    if not kept_in.exists():
        command = [sys.executable, __file__, "--only", part, "--data-dir", str(data_dir), "--kept-in", str(kept_in)]
        command += ["--quick"] * args.quick + ["--all"] * args.all
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    found: Mapping[str, Any] = json.loads(kept_in.read_text())
    return found


def parsed() -> argparse.Namespace:
    parser = harness.options(__doc__)
    parser.add_argument("--data-dir", type=Path, help="keeps the converted model between runs")
    parser.add_argument("--results", type=Path, help="where finished parts are kept (default: a temporary folder)")
    parser.add_argument("--only", choices=PARTS, help="one part of it, printed and not kept")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="with --only: one of them")
    parser.add_argument("--all", action="store_true", help="16 pairs and long prompts in float32 too: 15 minutes more")
    parser.add_argument("--kept-in", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peak", choices=["ours", "trl", "trl-checkpointing"], help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=int, default=MICRO, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dtype and not (args.only or args.peak):
        parser.error("--dtype goes with --only")
    return args


def main() -> None:
    args = parsed()
    torch.set_num_threads(1)
    if args.peak:
        peak_bytes(args.peak, args)
        return
    if args.only != "paths":
        try:
            import trl  # noqa: F401
        except ImportError as e:
            raise SystemExit(f"{e.name} is missing: pip install 'gradatim[bench]', or --only paths") from e
    with tempfile.TemporaryDirectory() as folder:
        data_dir: Path = args.data_dir or Path(folder) / "data"
        if args.only:  # float32 first: it is what bfloat16 is compared with
            bench = run_part(args.only, [args.dtype] if args.dtype else ["float32", "bfloat16"], args, data_dir)
            goals, details = bench.goals, bench.details
        else:
            results: Path = args.results or Path(folder) / "results"
            results.mkdir(parents=True, exist_ok=True)
            parts = [measured_part(part, args, data_dir, results) for part in PARTS]
            goals = [harness.Goal(**goal) for part in parts for goal in part["goals"]]
            details = {name: value for part in parts for name, value in part["details"].items()}
    if args.kept_in:
        args.kept_in.write_text(json.dumps({"goals": [asdict(g) for g in goals], "details": details}))
    args.quick = args.quick or bool(args.only)  # a part is no result to keep
    harness.report("bench_dpo_step", goals, details, args)


if __name__ == "__main__":
    main()
