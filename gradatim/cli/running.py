"""Commands that run something: serve and learn."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from gradatim.cli import output
from gradatim.cli.options import AsJson, ConfigFile, DataDir, Dtype, Model, Name, overrides, recorded, settings
from gradatim.config import Config


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(epilog="Example: gradatim serve --model smollm2 --port 8080")(serve)
    app.command(epilog="Example: gradatim learn --once --json")(learn)


def serve(
    file: ConfigFile = None,
    model: Model = None,
    data_dir: DataDir = None,
    host: Annotated[str | None, typer.Option(help="Anything but loopback needs GRADATIM_API_KEY.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0: any free one.")] = None,
    name: Name = None,
    dtype: Dtype = None,
    caution: Annotated[str | None, typer.Option(help="low, normal or high: speed of learning against safety.")] = None,
    mode: Annotated[str | None, typer.Option(help="observe, propose (a person promotes) or auto.")] = None,
) -> None:
    """Serve the model behind OpenAI's API, and learn from the feedback in a second process."""
    from gradatim.app import serving

    given = overrides(
        model=model,
        data_dir=data_dir,
        name=name,
        caution=caution,
        server__host=host,
        server__port=port,
        engine__dtype=dtype,
        mode=mode,
    )
    config = settings(file, given)
    _log_to_stderr()
    serving.serve(config, lambda url: _announce(config, url))


def _announce(config: Config, url: str) -> None:
    learns = "in a second process (gradatim status)" if config.learn else "no: it serves and records only"
    if config.mode == "propose":
        learns += "; what passes the gates waits for `gradatim adapters promote`"
    lines = {
        "base_url": f"{url}/v1",
        "model": f"{config.name}   ({config.model}; {config.name}@0 is the frozen one)",
        "data": str(config.data_dir.resolve()),
        "learns": learns,
        "feedback": f"curl {url}/v1/feedback -H 'content-type: application/json' "
        '-d \'{"response_id": "ID", "kind": "score", "value": 1}\'',
    }
    text = Text("\n".join(f"{key:<9} {value}" for key, value in lines.items()))
    Console(stderr=True).print(Panel(text, title="gradatim", title_align="left", expand=False))


def _log_to_stderr() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("httpx", "alembic", "uvicorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def learn(
    once: Annotated[bool, typer.Option("--once", help="One update from what the store holds.")] = False,
    follow: Annotated[
        bool, typer.Option("--follow", hidden=True, help="The loop process of `gradatim serve`.")
    ] = False,
    file: ConfigFile = None,
    model: Model = None,
    data_dir: DataDir = None,
    name: Name = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Judge what is new, make one update, and let the gates decide on it. Exit code 3: nothing to learn from."""
    from gradatim.app import compose, learning

    if once == follow:
        raise typer.BadParameter("say --once: while a server runs it learns by itself")
    if follow:
        _log_to_stderr()
        return learning.follow(learning.take_over())
    recorded(file, data_dir, name)
    config = settings(file, overrides(model=model, data_dir=data_dir, name=name, engine__dtype=dtype))
    compose.set_threads(config.learner.threads)
    made = learning.once(config)
    output.show(made, as_json, lambda console: _draw(console, made))
    raise typer.Exit(_exit_code(made))


def _exit_code(made: Mapping[str, Any]) -> int:
    if made["update"] is None or made["stage"] in ("candidate", "shadow", "canary"):
        return 3
    return 0 if made["stage"] == "live" else 1


def _draw(console: Console, made: Mapping[str, Any]) -> None:
    if made["update"] is None:
        return console.print("There is nothing to learn from: `gradatim doctor` says why.")
    console.print(output.facts({k: v for k, v in made["update"].items() if k != "at"}, "update"))
    rows = [(v["gate"], v["decision"], v["reason"]) for v in made["verdicts"]]
    console.print(output.table(("gate", "decision", "because"), rows, "gates"))
    console.print(Text(f"\nstage: {made['stage'] or 'none: the learner refused'}"))
