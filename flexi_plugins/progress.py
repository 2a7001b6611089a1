"""Progress bars on a terminal, one line a stage elsewhere; what is being done, how far it is, how long is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

Advance = Callable[..., None]
"""advance(n=1, note=""): so many steps more are done; the note is shown beside them until the next one."""
SECONDS_BETWEEN_LINES = 20


class Progress:
    """Shows stages. ``quiet`` shows nothing.

    A stage within another is shown below it while it lasts, and where there is no terminal by its lines now and then alone.
    """

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, quiet=quiet)
        self._shown: Any = None  # what shows the outermost stage while it lasts: bars, or its lines

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """Yield ``advance(n)`` for a stage of ``total`` steps; the time it took is printed when it ends.

        A stage in a generator ends where that is closed.
        """
        start, outer = time.monotonic(), self._shown
        try:
            with self._showing(title, total, outer) as advance:
                yield advance
        except GeneratorExit:
            self._took(title, start, outer)
            raise
        self._took(title, start, outer)

    @contextmanager
    def _showing(self, title: str, total: int | None, outer: Any) -> Iterator[Advance]:
        with ExitStack() as stack:
            stack.callback(setattr, self, "_shown", outer)
            if self.console.is_terminal:
                bars = self._shown = outer or stack.enter_context(self._bars())
                task: Any = bars.add_task(title, total=total)
                if outer is not None:  # else it goes with its bars
                    stack.callback(bars.remove_task, task)

                def advance(n: int = 1, note: str = "") -> None:
                    bars.update(task, advance=n, description=f"{title}: {note}" if note else title)

                yield advance
            else:
                if outer is None:
                    self.say(f"{title} ...")
                lines = self._shown = _Lines(self.say, title, total)
                yield lines

    def _took(self, title: str, start: float, outer: Any) -> None:
        if outer is None:
            self.say(f"{title}: {time.monotonic() - start:.1f} s")

    def _bars(self) -> Any:
        from rich.progress import (
            BarColumn,
            SpinnerColumn,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
        )
        return Bars(SpinnerColumn(), *columns, TimeRemainingColumn(), console=self.console, transient=True)


class _Lines:
    """Reports a stage where there is no terminal: a line now and then, with the time that is left."""

    def __init__(self, say: Callable[[str], None], title: str, total: int | None) -> None:
        self.say, self.title, self.total = say, title, total
        self.done = 0
        self.start = self.last = time.monotonic()

    def __call__(self, n: int = 1, note: str = "") -> None:
        self.done += n
        now = time.monotonic()
        if not self.total or now - self.last < SECONDS_BETWEEN_LINES or self.done >= self.total:
            return
        self.last = now
        left = (now - self.start) * (self.total - self.done) / self.done
        shown = f"{self.title}: {note}" if note else self.title
        self.say(f"{shown}: {self.done / self.total:.0%}, about {left:.0f} s left")
