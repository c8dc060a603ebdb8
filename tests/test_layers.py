"""What may import what: the command line and the package start without the heavy libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "scipy", "peft")


def _loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "gradatim",
        "gradatim.cli",
        "gradatim.store",
        "gradatim.loop",
        "gradatim.app.home",
        "gradatim.server",
        "gradatim.client",
    ],
)
def test_importing_it_needs_no_torch(module: str) -> None:
    loaded = _loaded_after(f"import {module}")
    assert not loaded & set(HEAVY)


def test_help_needs_neither_torch_nor_a_database() -> None:
    loaded = _loaded_after(
        "sys.argv = ['gradatim', '--help']; import gradatim.cli as c\ntry: c.main()\nexcept SystemExit: pass"
    )
    assert not loaded & {*HEAVY, "sqlalchemy", "uvicorn"}


def test_the_contracts_between_the_layers_are_kept() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout
