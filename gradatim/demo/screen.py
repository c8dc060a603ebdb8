"""The story on a terminal: phases, a table of success, the learning curve, all redrawn in place with rich.

On something that is no terminal (a log, a pipe) only the notes and the last picture are printed. It shows what is in
`Results` and knows nothing of how it came about.
"""

from __future__ import annotations

import threading
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from gradatim.demo.results import Evaluation, Results
from gradatim.demo.tasks import TASKS

_BARS = " ▁▂▃▄▅▆▇█"
_HEIGHT = 8


class TerminalScreen:
    """A `Screen` on a rich console; use it as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._lock = threading.Lock()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
        )
        self._row = self._bar.add_task("", total=None)
        self._phase = ""
        self._picture: RenderableType = Text("")
        self._display = Live(self._draw(), console=self.console, refresh_per_second=4, transient=False)

    def __enter__(self) -> TerminalScreen:
        if self.console.is_terminal:
            self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._display.stop()
        else:
            self.console.print(self._picture)

    def phase(self, title: str) -> None:
        with self._lock:
            self._phase = title
            self.console.print(Text(title, style="bold"))
            self._update()

    def progress(self, what: str, done: int, total: int) -> None:
        with self._lock:
            self._bar.reset(self._row, description=what, total=total, completed=done) if done == 1 else None
            self._bar.update(self._row, description=what, total=total, completed=done)
            self._update()

    def refresh(self, results: Results, live: str) -> None:
        with self._lock:
            self._picture = picture(results, live)
            self._update()

    def note(self, text: str) -> None:
        with self._lock:
            self.console.print(Text(f"  {text}"))

    def _update(self) -> None:
        if self.console.is_terminal:
            self._display.update(self._draw())

    def _draw(self) -> RenderableType:
        return Group(self._picture, self._bar)


class QuietScreen:
    """A `Screen` that shows nothing, for scripts and tests."""

    def phase(self, title: str) -> None: ...
    def progress(self, what: str, done: int, total: int) -> None: ...
    def refresh(self, results: Results, live: str) -> None: ...
    def note(self, text: str) -> None: ...


def picture(results: Results, live: str) -> RenderableType:
    """The table of success per task, and under it the curve of the corrected task."""
    footer = (
        f"live: {live}   episodes {len(results.episodes)}   corrected {results.corrected_episodes}   "
        f"corrections {sum(e.corrections for e in results.episodes)}"
    )
    return Group(success_table(results), curve(results), Text(footer, style="dim"))


def success_table(results: Results) -> Table:
    """Held-out success per task: the floor, the frozen model, retrieval, and the live adapter over time."""
    table = Table(title="held-out success, greedy", title_justify="left", expand=False)
    table.add_column("task")
    for column in ("random", "frozen", "retrieval", "live", "n"):
        table.add_column(column, justify="right")
    table.add_column("live over time")
    for task in TASKS:
        rows = [e for e in results.evaluations if e.task == task]
        if not rows:
            continue
        live = [e for e in rows if e.agent == "live"]
        floor = results.random_floor.get(task)
        table.add_row(
            task,
            "" if floor is None else f"{floor:.2f}",
            _last([e for e in rows if e.agent == "frozen"]),
            _last([e for e in rows if e.agent == "retrieval"]),
            _last(live),
            str((live or rows)[-1].n),
            sparkline([e.rate for e in live]),
        )
    return table


def _last(evaluations: list[Evaluation]) -> str:
    return f"{evaluations[-1].rate:.2f}" if evaluations else ""


def sparkline(rates: list[float]) -> str:
    """One block character per rate in [0, 1]."""
    return "".join(_BARS[1 + round(rate * (len(_BARS) - 2))] for rate in rates)


def curve(results: Results, task: str = "login-user") -> RenderableType:
    """Success of the live adapter on one task over the corrected episodes, as a small bar chart."""
    points = [e for e in results.evaluations if e.task == task and e.agent == "live"]
    if not points:
        return Text("")
    frozen = [e.rate for e in results.evaluations if e.task == task and e.agent == "frozen"]
    lines = []
    for row in range(_HEIGHT, 0, -1):
        axis = "1.0" if row == _HEIGHT else "0.5" if row == _HEIGHT // 2 else "   "
        cells = "".join(_cell(e.rate, row) * 3 + " " for e in points)
        control = " ─ frozen" if frozen and round(frozen[-1] * _HEIGHT) == row else ""
        lines.append(f"{axis} │{cells}{control}")
    ticks = "".join(f"{e.corrected_episodes:<4d}" for e in points)
    lines.append(
        "0.0 └" + "─" * (4 * len(points)) + (" ─ frozen" if frozen and round(frozen[-1] * _HEIGHT) == 0 else "")
    )
    lines.append("     " + ticks)
    title = f"{task}, live adapter, held-out, by corrected episodes"
    return Panel(Text("\n".join(lines)), title=title, title_align="left", expand=False)


def _cell(rate: float, row: int) -> str:
    filled = min(1.0, max(0.0, rate * _HEIGHT - (row - 1)))
    return _BARS[round(filled * (len(_BARS) - 1))]
