"""The documents say what there is: every command, route, setting, error and metric stands in them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Mount, Route

from gradatim import errors, protocols
from gradatim.cli import app as cli
from gradatim.config import Config, flatten
from gradatim.server import Metrics, build_app
from gradatim.testing.fakes import FakeEngine, FakeRouter, FakeStore
from gradatim.types import Stage
from tests.server_kit import FakeAdmin

DOCS = Path(__file__).parent.parent / "docs"
TEXT = "\n".join(p.read_text() for p in sorted(DOCS.glob("[0-9]*.md")))


def commands() -> Iterator[str]:
    for command in cli.registered_commands:
        assert command.callback is not None
        yield command.name or command.callback.__name__
    for group in cli.registered_groups:
        assert group.typer_instance is not None
        for command in group.typer_instance.registered_commands:
            assert command.callback is not None
            yield f"{group.name} {command.name or command.callback.__name__}"


@pytest.mark.parametrize("command", sorted(commands()))
def test_every_command_is_documented(command: str) -> None:
    group, _, name = command.partition(" ")
    assert f"gradatim {group}" in TEXT
    assert not name or re.search(rf"gradatim {group}[^|\n]*\b{name}\b", TEXT)


def _app() -> Any:
    return build_app(engine=FakeEngine(), store=FakeStore(), router=FakeRouter(), config=Config(), admin=FakeAdmin())


def _routes(routes: Any, prefix: str = "") -> Iterator[str]:
    for route in routes:
        if isinstance(route, Mount):
            yield from _routes(route.routes, prefix + route.path) if "session_id" not in route.path else ()
        elif isinstance(route, Route):
            for method in (route.methods or set()) - {"HEAD"}:
                yield f"{method} {prefix}{route.path}".replace(":path", "")


@pytest.mark.parametrize("route", sorted(_routes(_app().routes)))
def test_every_route_is_documented(route: str) -> None:
    assert f"`{route}`" in TEXT


@pytest.mark.parametrize("key", sorted(flatten(Config())))
def test_every_setting_is_documented(key: str) -> None:
    assert f"`{key}`" in TEXT


@pytest.mark.parametrize(
    "name", [n for n, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, errors.GradatimError)]
)
def test_every_error_is_documented(name: str) -> None:
    assert f"`{name}`" in TEXT


@pytest.mark.parametrize(
    "name", [n for n, p in inspect.getmembers(protocols, inspect.isclass) if p.__module__ == protocols.__name__]
)
def test_every_protocol_is_documented(name: str) -> None:
    assert f"`{name}`" in TEXT


@pytest.mark.parametrize("stage", list(Stage))
def test_every_stage_is_documented(stage: Stage) -> None:
    assert stage.value in TEXT


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(gradatim_[a-z_]+)`", TEXT))))
def test_every_metric_in_the_documents_exists(name: str) -> None:
    source = "\n".join(p.read_text() for p in (DOCS.parent / "gradatim").rglob("*.py"))
    families = {family.name for family in Metrics().registry.collect()}
    assert name.removesuffix("_total") in families or f'"{name}"' in source


def test_links_between_the_documents_lead_somewhere() -> None:
    for page in [*DOCS.glob("*.md"), *DOCS.parent.glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
def test_code_in_the_documents_runs(code: str) -> None:
    exec(compile(code, "docs", "exec"), {})


def test_the_settings_file_of_the_documents_is_valid(tmp_path: Path) -> None:
    from gradatim.config import load

    for i, code in enumerate(re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)):
        path = tmp_path / f"{i}.toml"
        path.write_text(code)
        load(path, env={})
