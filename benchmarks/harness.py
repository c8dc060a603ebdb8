"""What every benchmark script shares: its options, its goals, how both are printed, and where full runs are kept."""

from __future__ import annotations

import argparse
import json
import operator
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results"  # the last full run of each; docs/benchmarks.md is made of them
_COMPARE: Mapping[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le, "==": operator.eq}


@dataclass(frozen=True, slots=True)
class Goal:
    """One figure beside its target, such as ``>= 4`` or ``reported`` where there is none."""

    goal: str
    value: float
    target: str = "reported"

    @property
    def met(self) -> bool | None:
        sign, _, bound = self.target.partition(" ")
        return _COMPARE[sign](self.value, float(bound)) if sign in _COMPARE else None


def threads(count: int = 1) -> None:
    """Set the thread pools up as the server does; call it before torch is imported."""
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "OMP_NUM_THREADS": str(count)}


def options(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run; its figures are not to be quoted")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def report(name: str, goals: Sequence[Goal], details: Mapping[str, Any], args: argparse.Namespace) -> None:
    table = Table("goal", "value", "target", "met", title=name + (" (quick: not to be quoted)" if args.quick else ""))
    for goal in goals:
        met = {True: "yes", False: "NO", None: ""}[goal.met]
        table.add_row(goal.goal, f"{goal.value:.4g}", goal.target, met)
    Console().print(table)
    rows = [asdict(g) | {"met": g.met} for g in goals]
    result = {"name": name, "quick": args.quick, "at": time.time(), "goals": rows, "details": details}
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))


def percentile(values: Sequence[float], q: float) -> float:
    return float(np.percentile(values, q)) if values else float("nan")
