"""``gradatim doctor``: is it learning, from what, and why not when it is not. Exit code 1 when something is broken."""

from __future__ import annotations

import shutil
from dataclasses import asdict

import typer
from rich.console import Console
from rich.text import Text

from gradatim.app.diagnosis import Facts, findings, summary
from gradatim.app.home import Home
from gradatim.cli import output
from gradatim.cli.options import AsJson, ConfigFile, DataDir, Name, recorded
from gradatim.cli.remote import routes
from gradatim.config import Config


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command(epilog="Example: gradatim doctor")(doctor)


def doctor(file: ConfigFile = None, data_dir: DataDir = None, name: Name = None, as_json: AsJson = False) -> None:
    """Whether it is learning, from what, and why not when it is not."""
    facts = look(recorded(file, data_dir, name))
    found = findings(facts)
    sentence = summary(facts, found)

    def draw(console: Console) -> None:
        console.print(Text(sentence, style="bold"))
        rows = [(f.about, f.level, f.detail, f.way_out) for f in found]
        console.print(output.table(("about", "", "", "way out"), rows))

    value = {"summary": sentence, "findings": [asdict(f) for f in found]}
    output.show(value, as_json, draw)
    raise typer.Exit(1 if any(f.level == "bad" for f in found) else 0)


def look(config: Config) -> Facts:
    """Everything that the diagnosis rests on."""
    home = Home(config.data_dir)
    has_store = bool(config.database) or home.exists()
    asked = routes(config)
    said = asked.readiness()
    status = asked.get("/v1/status") if has_store and (said is not None or asked.url is None) else {}
    troubles = [f"{part}: {words}" for part, words in (said or {}).items() if part != "status" and words != "ok"]
    return Facts(
        config=config,
        has_store=has_store,
        free_bytes=shutil.disk_usage(config.data_dir).free,
        server_pid=home.holder("server"),
        server_url=asked.url,
        answers=said is not None,
        trouble="; ".join(troubles),
        loop=status.get("loop") if said is not None else None,
        learning=status or None,
        chromium=bool(shutil.which("chromium") and shutil.which("chromedriver")),
    )
