"""Keep lm-eval quiet and quick while it is used, and leave it as it was."""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """Within: lm-eval logs errors only, prints and draws nothing, and compiles each of its templates once."""
    import datasets
    from lm_eval import utils
    from lm_eval.api import task

    templates = utils.env.overlay()
    with ExitStack() as stack:
        stack.enter_context(_replaced(templates, "from_string", functools.cache(templates.from_string)))
        stack.enter_context(_replaced(utils, "env", templates))
        stack.enter_context(_replaced(task, "tqdm", lambda rows, **_: rows))
        stack.enter_context(_log_level("lm_eval", logging.ERROR))
        stack.enter_context(redirect_stdout(io.StringIO()))  # where what a command gives goes, as JSON maybe
        if not datasets.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _log_level(name: str, level: int) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
