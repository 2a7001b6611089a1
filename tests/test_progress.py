"""What a stage says of itself: its note, and the time that is left, on a terminal and elsewhere."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import pytest
from rich.console import Console

from flexi_plugins import progress
from flexi_plugins.progress import Progress

NOTE = "1,024 of 2,048 tokens, loss 3.2100"


class Clock:
    """A clock that is set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def halfway(clock: Clock, terminal: bool, note: str, outer: bool = False) -> list[str]:
    """Return the lines of a stage, by itself or within another, that is halfway after 50 seconds of equal steps."""
    shown, text = Progress(), io.StringIO()
    shown.console = Console(file=text, force_terminal=terminal, width=150, get_time=clock, no_color=True)
    if outer:
        with shown.stage("study", 3):
            _half(shown, clock, note)
    else:
        _half(shown, clock, note)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue()).splitlines()


def _half(shown: Progress, clock: Clock, note: str) -> None:
    with shown.stage("lora: training 64 parameters", 2048) as advance:
        for _ in range(5):
            clock.now += 10
            advance(1024 / 5, note)


@pytest.mark.parametrize(("terminal", "outer"), [(True, False), (False, False), (False, True)])
def test_a_note_is_shown_beside_the_time_that_is_left(terminal: bool, outer: bool, clock: Clock) -> None:
    """Bars are drawn when the outermost stage ends, lines now and then, in stages within others too."""
    *_, line = [line for line in halfway(clock, terminal, NOTE, outer) if NOTE in line]
    assert f"lora: training 64 parameters: {NOTE}" in line
    left = r"50% .* left 0:00:50" if terminal else r": 40%, about 60 s left"
    assert re.search(left, line), line


def test_a_stage_in_a_generator_ends_where_that_is_closed(clock: Clock) -> None:
    shown, text = Progress(), io.StringIO()
    shown.console = Console(file=text, width=150, get_time=clock)

    def work() -> Iterator[int]:
        with shown.stage("judging", 2):
            yield 1
            yield 2

    working = work()
    assert next(working) == 1
    clock.now += 7
    working.close()
    assert text.getvalue().splitlines() == ["judging ...", "judging: 7.0 s"]


@pytest.mark.parametrize("terminal", [False, True])
def test_without_a_note_the_title_stands_by_itself(terminal: bool, clock: Clock) -> None:
    lines = halfway(clock, terminal, "")
    assert any("lora: training 64 parameters" in line for line in lines)
    assert not any("parameters: ," in line or NOTE in line for line in lines)
