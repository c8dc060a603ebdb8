"""Text for benchmarks that is there wherever this package is installed: of Python itself and of its dependencies.

Files are split into store, development and test as wholes, in an order that depends on their names alone.
"""

from __future__ import annotations

import ast
import doctest
import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import metadata
from pathlib import Path
from pydoc_data.topics import topics

Files = Mapping[str, str]  # name -> text


def python_documentation() -> Files:
    """The language reference, as ``help()`` shows it: one file a topic."""
    return dict(topics)


def command_examples() -> Files:
    """What one types into Python and what it prints, as docstrings of networkx (which comes with torch) show it: one
    file a module."""
    return _sessions("networkx")


def cloud_commands() -> Files:
    """Commands and the JSON that they print, one file a command: the examples of awscli (Apache-2.0), an optional
    download (``pip install --no-deps awscli``). Empty where it is not installed."""
    if importlib.util.find_spec("awscli") is None:
        return {}
    folder = root("awscli") / "examples"
    return {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in sorted(folder.rglob("*.rst"))}


def descriptions() -> Files:
    """What some packages say of themselves: this package's dependencies."""
    names = ("alembic", "httpx", "numpy", "pydantic", "rich", "safetensors", "scipy", "sqlalchemy", "typer", "uvicorn")
    return {name: str(metadata(name).get_payload()) for name in names}  # type: ignore[attr-defined]


def operator_tables() -> Files:
    """The declarations of torch's operators and of their derivatives: thousands of records of a few lines."""
    folder = root("torchgen") / "packaged"
    names = ("ATen/native/native_functions.yaml", "autograd/derivatives.yaml")
    return {name: (folder / name).read_text(encoding="utf-8") for name in names}


def modules(package: str) -> Files:
    """Source files."""
    return {str(p.relative_to(root(package).parent)): p.read_text(encoding="utf-8") for p in sources(package)}


def _sessions(package: str) -> Files:
    files = {}
    for path in sources(package):
        text = "".join(_episodes(path))
        if text:
            files[str(path.relative_to(root(package).parent))] = text
    return files


def root(package: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package} is not installed"
    return Path(spec.origin).parent


def sources(package: str) -> list[Path]:
    return sorted(p for p in root(package).rglob("*.py") if "tests" not in p.parts)


def _episodes(path: Path) -> Iterator[str]:
    """Per documented thing: its name, then each command with its output."""
    parser = doctest.DocTestParser()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        try:
            examples = parser.get_examples(ast.get_docstring(node) or "")
        except ValueError:  # an example whose indentation is not consistent
            continue
        if examples:
            lines = "".join(">>> " + e.source.replace("\n", "\n... ")[: -len("... ")] + e.want for e in examples)
            yield f"# {path.stem}.{node.name}\n{lines}\n"


def shuffled(files: Files) -> list[str]:
    """Names in an order that is the same everywhere."""
    return sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())


def named(files: Files) -> tuple[Files, Iterator[str]]:
    return files, iter(shuffled(files))


def take(files: Files, names: Iterator[str], tokens: int, encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Token ids of the next files, until that many are together; the last one is cut."""
    out: list[list[int]] = []
    left = tokens
    while left > 0:
        ids = encode(files[next(names)])[:left]
        out.append(ids)
        left -= len(ids)
    return out
