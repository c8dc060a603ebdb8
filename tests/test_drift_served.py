"""Drift in the product: a real server and its loop process find that the world changed, say so, and turn to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from gradatim.app.home import Home
from gradatim.app.launch import launch
from gradatim.cli import app
from gradatim.loop import JUDGED, LEARNED
from gradatim.memory.decisions import CURSOR
from gradatim.store import open_store

from .test_drift import episodes, world

WITHIN_S = 240.0
SETTINGS = """
[memory]
decisions = true
[drift]
react = "adapt"
season_s = 0
alarm = 1e4
[release]
canary = true
holdback = 0.2
"""


def until(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.2)


@pytest.mark.timeout(900)
def test_a_world_that_changed_is_told_everywhere_and_begins_an_epoch_of_the_memory(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    data, settings = tmp_path / "data", tmp_path / "gradatim.toml"
    settings.write_text(SETTINGS)
    Home(data).prepare()
    with open_store(Home(data).store) as store:
        end = store.append(*episodes(700, world))
        store.append(cursors=dict.fromkeys((JUDGED, LEARNED, CURSOR), end))
    server = launch(data, "--model", str(tiny_model_dir), "--config", str(settings), within_s=WITHIN_S)
    try:

        def ask(path: str) -> Any:
            return httpx.get(server.url + path, timeout=60.0, trust_env=False)

        def told() -> list[str]:
            return [row["what"] for row in ask("/v1/status").json()["drift"]["told"]]

        until(lambda: told() == ["world", "changed"], "the status does not tell that the world changed")
        until(lambda: ask("/v1/memory").json()["epochs"] == 1, "no epoch has begun")
        until(lambda: 'gradatim_drift{what="world"} 1.0' in ask("/metrics").text, "it is not counted")
        assert "gradatim_lift" in ask("/metrics").text
    finally:
        server.kill()
    for command in ("status", "doctor"):
        shown = CliRunner().invoke(app, [command, "--data-dir", str(data), "--config", str(settings), "--json"])
        assert "the world changed, not the adapter" in shown.output
