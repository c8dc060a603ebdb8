"""Options that many commands share, and the configuration they add up to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from gradatim import config as configuration
from gradatim.config import Config
from gradatim.errors import ConfigError

DEFAULT_FILE = Path("gradatim.toml")

ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="A gradatim.toml; the one in this folder is found by itself.")
]
DataDir = Annotated[Path | None, typer.Option("--data-dir", "-d", help="Where everything is kept.")]
Name = Annotated[str | None, typer.Option("--name", help="The model name that clients ask for.")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="smollm2, a folder, or a hub id.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or auto.")]
AsJson = Annotated[bool, typer.Option("--json", help="For machines: one JSON value on stdout.")]
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, help="How many, newest first.")]


def overrides(**given: Any) -> dict[str, Any]:
    """``server__port=1`` -> ``{"server": {"port": 1}}``; what was not given on the command line is left out."""
    out: dict[str, Any] = {}
    for key, value in given.items():
        if value is None:
            continue
        *sections, leaf = key.split("__")
        inner = out
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[leaf] = value
    return out


def config_file(given: Path | None) -> Path | None:
    """The file that was named, or the one in this folder, or none."""
    return given or (DEFAULT_FILE if DEFAULT_FILE.exists() else None)


def settings(file: Path | None, flags: Mapping[str, Any]) -> Config:
    """The effective configuration. ConfigError."""
    return configuration.load(config_file(file), flags)


def recorded(file: Path | None, data_dir: Path | None, name: str | None = None) -> Config:
    """The configuration of a data directory that must exist already. ConfigError."""
    config = settings(file, overrides(data_dir=data_dir, name=name))
    if not config.data_dir.is_dir():
        raise ConfigError(
            f"there is no data directory {config.data_dir}: name one with --data-dir, or make it with `gradatim serve`"
        )
    return config
