"""One DPO step against TRL's DPOTrainer on a CUDA GPU: a model of 1.5 billion weights, drawn at random, in bfloat16.

A step costs what its shapes cost, whatever the weights say, so that no weights need to be fetched. Both sides train
LoRA of rank 16 on all linear layers of models with equal weights, with AdamW and clipping, on the same token ids; TRL
takes all pairs in one pass, without gradient checkpointing, under bf16 autocast. Sides alternate in one process after a
warm-up, and are timed on the wall between two synchronisations; the figure is the median's. Peaks are what torch
allocated above what it held before the step. Loss and gradient of both are compared before anything is timed.

``--quick`` is a smoke run on a tiny model, on the CPU where there is no GPU. Needs the extra ``bench``:
pip install 'gradatim[bench]'.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

harness.threads(4)

import torch
from step_workload import SYSTEM_TOKENS, Ours, Pair, make_pairs, relative, text_ids
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gradatim.nn.base import Base, bundled_folder
from gradatim.nn.pack import packed_tokens

BILLIONS = 1.5
LAYERS, WIDTH, MLP_WIDTH, HEADS, KV_HEADS, VOCABULARY = 28, 1536, 8960, 12, 2, 151_936  # as Qwen2.5-1.5B's
PASS_TOKENS = 16_384  # packed tokens in one of our passes: all pairs at once, as TRL's
PAIRS = (4, 16)
WARM_UP, ROUNDS = 2, 12


def random_base(tokenizer: Any, device: torch.device, *, quick: bool) -> Base:
    """Equal weights in every call."""
    shape = (2, 64, 128, 4, 2, len(tokenizer)) if quick else (LAYERS, WIDTH, MLP_WIDTH, HEADS, KV_HEADS, VOCABULARY)
    layers, width, mlp_width, heads, kv_heads, vocabulary = shape
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    return Base(
        model=model,
        tokenizer=tokenizer,
        sha256="random",
        context_tokens=config.max_position_embeddings,
        eos_ids=frozenset({tokenizer.eos_token_id}),
        device=device,
        dtype=torch.bfloat16,
    )


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def wall_s(step: Callable[[], Any]) -> float:
    synchronize()
    started_s = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - started_s


def peak_bytes(step: Callable[[], Any]) -> int:
    """Above what was held before; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def alternate(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, after some that do not count."""
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(WARM_UP + rounds):
        for name, step in sides.items():
            taken = wall_s(step)
            if number >= WARM_UP:
                spent[name].append(taken)
    return spent


def compare(ours: Ours, trl: Any, pairs: Sequence[Pair], rounds: int) -> tuple[list[harness.Goal], dict[str, Any]]:
    name = f"{len(pairs)} pairs"
    expected_loss, found_loss = trl.gradient(pairs), ours.gradient(pairs)
    goals = [
        harness.Goal(f"{name}: loss, relative difference", abs(found_loss - expected_loss) / expected_loss),
        harness.Goal(f"{name}: gradient, relative difference", relative(ours.gradients(), trl.gradients())),
    ]
    mine, theirs = ours.reference(pairs), trl.reference(pairs)
    sides: Mapping[str, Callable[[], Any]] = {
        "trl": lambda: trl.step(pairs),
        "ours": lambda: ours.step(pairs),
        "trl, cached": lambda: trl.step(pairs, theirs),
        "ours, cached": lambda: ours.step(pairs, mine),
    }
    spent_s = alternate(sides, rounds)
    middle = {side: statistics.median(times) for side, times in spent_s.items()}
    peaks = {side: peak_bytes(step) for side, step in sides.items()}
    goals += [
        harness.Goal(f"{name}: reference in the step, TRL / ours", middle["trl"] / middle["ours"], ">= 2.5"),
        harness.Goal(f"{name}: cached reference, TRL / ours", middle["trl, cached"] / middle["ours, cached"], ">= 2.5"),
        harness.Goal(f"{name}: TRL's default / ours with a cached reference", middle["trl"] / middle["ours, cached"]),
    ]
    if peaks["trl"]:
        goals.append(harness.Goal(f"{name}: peak memory of a step, ours / TRL", peaks["ours"] / peaks["trl"]))
    answers = [a for p in pairs for a in p.answers]
    tokens = {"tokens": sum(len(a.fed) for a in answers), "packed_tokens": packed_tokens(answers)}
    return goals, {name: {"seconds": spent_s, "peak_bytes": peaks} | tokens}


def device_of(*, quick: bool) -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if quick:
        return torch.device("cpu")
    raise SystemExit("torch sees no CUDA GPU here: run it on one, or --quick for a smoke run on the CPU")


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--data-dir", type=Path, help="keeps the bundled model, whose tokenizer is used, between runs")
    args = parser.parse_args()
    device = device_of(quick=args.quick)
    try:
        from trl_sides import TrlDpo
    except ImportError as e:
        raise SystemExit(f"{e.name} is missing: pip install 'gradatim[bench]'") from e
    goals: list[harness.Goal] = []
    details: dict[str, Any] = {"torch": torch.__version__}
    if device.type == "cuda":
        details["device"] = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(bundled_folder(args.data_dir or Path(folder), torch.bfloat16))
        ids = text_ids(tokenizer)
        ours_base, trl_base = (random_base(tokenizer, device, quick=args.quick) for _ in range(2))
        weights = sum(p.numel() for p in ours_base.model.parameters()) / 1e9
        details["billion_weights"] = weights
        assert args.quick or abs(weights - BILLIONS) < 0.1, weights
        ours = Ours(ours_base, pass_tokens=PASS_TOKENS)
        trl = TrlDpo(trl_base, Path(folder), at_once=max(PAIRS))
        rounds, counts = (1, (2,)) if args.quick else (ROUNDS, PAIRS)
        for count in counts:
            prompt, answer = ((10, 20), (4, 8)) if args.quick else ((162, 210), (48, 96))
            pairs = make_pairs(ids, count, SYSTEM_TOKENS, prompt, answer)
            print(f"{count} pairs: {rounds} rounds of 4 sides, after {WARM_UP}", file=sys.stderr, flush=True)
            found, told = compare(ours, trl, pairs, rounds)
            goals += found
            details |= told
    harness.report("bench_dpo_cuda", goals, details, args)


if __name__ == "__main__":
    main()
