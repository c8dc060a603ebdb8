"""``gradatim demo``: starts a server of its own and lets the demo's agent loose on it.

The demo itself is a client in ``gradatim.demo``; this is only where it runs and what it needs.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console

from gradatim.app.launch import launched
from gradatim.errors import ConfigError

_SETTINGS = """\
[engine]
dtype = "bfloat16"  # half the time of float32 on a CPU that has it; exactness is benchmarks/bench_exact.py's business
threads = 2  # the pages wait while the learner works, so both cores may serve
[learner]
threads = 2  # and learn, while no page is asked for
seed = {seed}
"""
_SEEDS_APART = 100_000  # so that two runs draw no page in common


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command(epilog="Example: gradatim demo --quick --browser-free")(demo)


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="About 10 minutes instead of 25.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Other pages, and other draws of the learner.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the report and the data go.")] = Path("demo-out"),
    browser_free: Annotated[bool, typer.Option("--browser-free", help="Pages in plain Python, no Chromium.")] = False,
    model: Annotated[str, typer.Option("--model", "-m", help="smollm2, a folder, or a hub id.")] = "smollm2",
) -> None:
    """An agent operates web pages and learns from corrections, through the product, over the wire."""
    tell, results = _story()
    if not browser_free:
        _require_pages()
    console, folder = Console(), _fresh(out)
    story = replace(
        results.StoryConfig.quick() if quick else results.StoryConfig.full(), first_seed=seed * _SEEDS_APART
    )
    with ExitStack() as stack:
        with console.status("Starting the server; a first start converts the model (about 20 s) ..."):
            options = ("--model", model, "--config", str(_settings(folder, seed)))
            server = stack.enter_context(launched(folder / "data", options))
        told = tell(
            story,
            base_url=f"{server.url}/v1",
            model="agent",
            out=folder,
            api_key=os.environ.get("GRADATIM_API_KEY", ""),
            browser_free=browser_free,
            console=console,
        )
    console.print(f"[bold]{folder / 'report.html'}[/bold] has the pictures; what was recorded is in {folder / 'data'}")
    raise typer.Exit(0 if told.complete else 1)


def _story() -> tuple[Any, ModuleType]:
    """The demo and its sizes. ConfigError where its packages are missing."""
    try:
        from gradatim.demo import results
        from gradatim.demo.run import demo as tell
    except ModuleNotFoundError as e:
        raise ConfigError(f"the demo needs {e.name}, which is not installed: pip install -e '.[demo]'") from e
    return tell, results


def _require_pages() -> None:
    from gradatim.demo.miniwob import ChromiumMissing, find_binaries, pages_dir

    try:
        find_binaries()
        pages_dir()
    except ChromiumMissing as e:
        raise ConfigError(str(e)) from e


def _fresh(out: Path) -> Path:
    """That folder, or the next free number of it: an earlier demo is never mixed with this one."""
    names = chain([out], (out.with_name(f"{out.name}-{n}") for n in count(2)))
    folder = next(name for name in names if not name.exists())
    folder.mkdir(parents=True)
    return folder


def _settings(folder: Path, seed: int) -> Path:
    path = folder / "gradatim.toml"
    path.write_text(_SETTINGS.format(seed=seed))
    return path
