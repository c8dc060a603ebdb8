"""The command ``eval``: the user's own cases against one version of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradatim.cli import output
from gradatim.cli.options import AsJson, ConfigFile, DataDir, Dtype, Model, Name, overrides, recorded, settings

_EXIT = {"pass": 0, "fail": 1, "repair": 1, "wait": 3}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("eval", epilog="Example: gradatim eval cases.jsonl --adapter agent@3")(evaluate)


def evaluate(
    suite: Annotated[Path, typer.Argument(exists=True, help="A JSONL file of cases, or a folder of them.")],
    adapter: Annotated[str, typer.Option(help="NAME@STEP.")],
    against: Annotated[str | None, typer.Option(help="NAME@STEP to compare with; left out: the live one.")] = None,
    file: ConfigFile = None,
    model: Model = None,
    data_dir: DataDir = None,
    name: Name = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Have a version answer your cases. Exit code 0: no worse; 1: worse, or a must is not met; 3: open."""
    from gradatim.app import compose, offline

    recorded(file, data_dir, name)
    config = settings(file, overrides(model=model, data_dir=data_dir, name=name, engine__dtype=dtype))
    compose.set_threads(compose.serving_threads(config))
    found = offline.evaluation(config, suite, adapter, against)
    output.show(found, as_json, lambda console: console.print(output.facts(found)))
    raise typer.Exit(_EXIT[found["decision"]])
