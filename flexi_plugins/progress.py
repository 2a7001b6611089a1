"""Progress bars on a terminal, one line a stage elsewhere; what is being done, how far it is, how long is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Advance = Callable[[int], None]


class Progress:
    """Shows stages. ``quiet`` shows nothing."""

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, quiet=quiet)

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """Yield ``advance(n)`` for a stage of ``total`` steps; the time it took is printed when it ends."""
        start = time.monotonic()
        bar = self._bar() if self.console.is_terminal else None
        if bar is None:
            self.say(f"{title} ...")
            yield lambda n=1: None
        else:
            with bar:
                task: Any = bar.add_task(title, total=total)
                yield lambda n=1: bar.advance(task, n)
        self.say(f"{title}: {time.monotonic() - start:.1f} s")

    def _bar(self) -> Any:
        from rich.progress import BarColumn, Progress as Bars, SpinnerColumn, TaskProgressColumn, TextColumn
        from rich.progress import TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
        )
        return Bars(SpinnerColumn(), *columns, TimeRemainingColumn(), console=self.console, transient=True)
