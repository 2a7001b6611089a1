"""What the tests share: a tiny model with a tokenizer in a folder, a text, and a catalogue without flexi-baselines.

The second distribution is installed here, and need not be elsewhere: its own tests name its modules.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from studies import make_model, make_text


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files with tests of real models first: a process that began one of them last would keep all others waiting."""
    slow = {item.path for item in items if item.get_closest_marker("real")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session", autouse=True)
def threads() -> Iterator[None]:
    """Share the cores among the processes of pytest-xdist, and with what is started from here."""
    count = max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    torch.set_num_threads(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", str(count))
        yield


@pytest.fixture(scope="session", autouse=True)
def frozen() -> None:
    """Keep what was imported out of garbage collection: a training ends with two whole ones, which took longer than it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let SIGINT interrupt, here and in what is started from here: a shell starts what it runs in the background without."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def built_in_methods() -> Iterator[None]:
    """Let installed entry points be those of other distributions than flexi-baselines."""
    every = importlib.metadata.entry_points

    def entry_points(**chosen: Any) -> Any:
        found = every(**chosen)
        if chosen.get("group") != "flexi_plugins":
            return found
        return [point for point in found if point.dist is None or point.dist.name != "flexi-baselines"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "entry_points", entry_points)
        yield
