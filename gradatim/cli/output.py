"""How answers look: tables for people, JSON for machines. Users' text is shown as it is, never as markup."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

STYLES = {
    "live": "bold green",
    "candidate": "cyan",
    "shadow": "cyan",
    "canary": "cyan",
    "rejected": "red",
    "rolled_back": "yellow",
    "good": "green",
    "info": "dim",
    "wait": "yellow",
    "bad": "bold red",
}


def show(value: Any, as_json: bool, draw: Callable[[Console], None]) -> None:
    """The value as one line of JSON, or whatever ``draw`` makes of it."""
    if as_json:
        typer.echo(json.dumps(value, default=str))
    else:
        draw(Console(highlight=False, markup=False))


def note(message: str) -> None:
    """For people, beside the answer: to stderr."""
    Console(stderr=True, highlight=False).print(Text(message), soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> Table:
    """Cells are plain text; those that are the name of a stage or level are coloured."""
    out = Table(title=title and f"\n{title}", title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in columns:
        out.add_column(column, overflow="fold")
    for row in rows:
        out.add_row(*(Text(cell(value), style=STYLES.get(str(value), "")) for value in row))
    return out


def facts(values: Mapping[str, Any], title: str = "") -> Table:
    """Two columns: name, value."""
    out = table(("", ""), [(key.replace("_", " "), value) for key, value in values.items()], title)
    out.show_header = False
    return out


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {cell(v)}" for k, v in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value)) or "-"
    return str(value)


def when(at: float) -> str:
    """How long ago, in one unit."""
    ago_s = max(0.0, time.time() - at)
    for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if ago_s >= seconds:
            return f"{ago_s / seconds:.0f} {unit} ago"
    return f"{ago_s:.0f} s ago"


def short(text: str, limit: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
