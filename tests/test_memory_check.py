"""``gradatim memory check``: what was made with another model than is served is told, with both digests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from gradatim.app import compose
from gradatim.app.memory import build_memory, session_folder, token_folders
from gradatim.cli import app
from gradatim.config import Config
from gradatim.memory.key_space import EachToken, KeySpace
from gradatim.memory.session_file import write_session
from gradatim.memory.session_folder import About
from gradatim.memory.token_file import TRUTH_FILE
from gradatim.memory.token_store import TokenStore
from gradatim.nn.base import Base
from gradatim.nn.render import Renderer
from gradatim.nn.session import Session
from tests.test_memory_served import product, settings
from tests.test_token_memory_served import LAYER, settled

OTHER = "f" * 64


def checked(base: Base, config: Config) -> Sequence[str]:
    """What a server with this model says of what it finds."""
    with compose.build_store(config) as store:
        engine = compose.build_engine(config, base)
        try:
            found = build_memory(config, store, base, engine).admin.check()
        finally:
            engine.close()
    assert found["ok"] == (not found["unusable"])
    told: Sequence[str] = found["unusable"]
    return told


@pytest.fixture
def config(tiny_model_dir: Path, tmp_path: Path) -> Config:
    return settings(tiny_model_dir, tmp_path, decisions=True, tokens=True, sure=1.0)


async def remembered(base: Base, config: Config) -> None:
    """Decisions, tokens and their files."""
    async with product(base, config) as served:
        asked = await served.ask()
        await served.say(response_id=asked["id"], kind="correction", correction="left")
        await settled(served, 5)
        assert (await served.http.get("/v1/memory/check")).json()["unusable"] == []


async def test_of_another_base_model_everything_is_told_and_memory_stays_off(tiny_base: Base, config: Config) -> None:
    await remembered(tiny_base, config)
    assert checked(tiny_base, config) == []
    told = checked(replace(tiny_base, sha256=OTHER), config)
    assert len(told) == 2  # a key space on the shelf, and a file of tokens
    assert told[0].startswith("key space ") and TRUTH_FILE not in told[0]
    assert str(token_folders(config).path("", "")) in told[1]
    for one in told:
        assert f"another base model: {tiny_base.sha256}, and the one that is served is {OTHER}" in one
    off = replace(config, memory=replace(config.memory, decisions=False, tokens=False))
    assert checked(tiny_base, off) == []
    assert len(checked(replace(tiny_base, sha256=OTHER), off)) == 2


async def test_of_another_tokenizer_too(tiny_base: Base, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    await remembered(tiny_base, config)
    own = Renderer(tiny_base).digest()
    monkeypatch.setattr(Renderer, "digest", lambda _: OTHER)
    told = checked(tiny_base, config)
    assert len(told) == 2
    assert all(f"another tokenizer: {own}, and the one that is served is {OTHER}" in one for one in told)


def file_of(config: Config, base: Base, layer: int) -> Path:
    pooling = EachToken(torch.zeros(4).numpy(), torch.ones(4).numpy(), torch.eye(4).numpy())
    space = KeySpace(base.sha256, Renderer(base).digest(), (layer,), pooling)
    path = token_folders(config).path("somebody", space.id)
    TokenStore(space, 9).save(path)
    return path


def test_of_another_layer_too_and_what_is_damaged_is_gone(tiny_base: Base, config: Config) -> None:
    path = file_of(config, tiny_base, LAYER - 1)
    assert checked(tiny_base, config) == [
        f"{path} was made with another layer: {LAYER - 1}, and the one that is served is {LAYER}"
    ]
    (path / TRUTH_FILE).write_bytes(b"\x00" * 40)
    file_of(config, tiny_base, LAYER)
    assert checked(tiny_base, config) == [] and not path.exists()  # it is derived, and nobody knows what is in it


def session_of(config: Config, base_sha256: str, tokenizer_sha256: str) -> None:
    about = About(tenant="alice", id="trip", base_sha256=base_sha256, tokenizer_sha256=tokenizer_sha256)
    write_session(Session([], ids=(1, 2)), session_folder(config).path("alice", "trip"), "w", about.header())


def said(config: Config, *more: str) -> Any:
    return CliRunner().invoke(app, ["memory", "check", "--data-dir", str(config.data_dir), *more])


async def test_the_command_says_so_without_a_server_and_fails(tiny_base: Base, config: Config) -> None:
    await remembered(tiny_base, config)
    sound = await asyncio.to_thread(said, config, "--json")
    assert sound.exit_code == 0, sound.output
    session_of(config, tiny_base.sha256, "whichever: without a server it is not known")
    assert (await asyncio.to_thread(said, config)).exit_code == 0
    session_of(config, OTHER, "t")
    found = await asyncio.to_thread(said, config, "--json")
    assert found.exit_code == 1
    assert f"another base model: {OTHER}, and the one that is served is {tiny_base.sha256}" in found.output
    assert len(checked(tiny_base, config)) == 1
