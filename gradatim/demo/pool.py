"""A few environments shared by many episodes, so that a server has several requests at once to batch.

Page sources (a Chromium each, or browser-free pages) are made when first needed, at most ``size`` of them, and lent
to one episode at a time. It does not know what an episode is.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from gradatim.demo.tasks import PageEnv, PageSource

Item = TypeVar("Item")
Result = TypeVar("Result")


class EnvPool:
    """Lends environments; `map` runs a function over items with as many threads as there are environments."""

    def __init__(self, make_source: Callable[[], PageSource], size: int) -> None:
        self.size = size
        self._make_source = make_source
        self._idle: queue.LifoQueue[PageSource] = queue.LifoQueue()
        self._slots = threading.Semaphore(size)
        self._sources: list[PageSource] = []
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="episode")

    @contextmanager
    def env(self, task: str) -> Iterator[PageEnv]:
        with self._slots:
            try:
                source = self._idle.get_nowait()
            except queue.Empty:
                source = self._make_source()
                self._sources.append(source)
            try:
                yield PageEnv(task, source)
            finally:
                self._idle.put(source)

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Results in the order of the items; the first exception is raised."""
        return self._threads.map(function, items)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for source in self._sources:
            source.close()
        self._sources.clear()

    def __enter__(self) -> EnvPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
