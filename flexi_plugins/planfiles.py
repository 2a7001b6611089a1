"""Plans on disk, with their tensors; and what is kept beside an output until it is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from flexi_plugins.data import PruningPlan, digest
from flexi_plugins.errors import FlexiError
from flexi_plugins.execution.sweep import Planned
from flexi_plugins.files import alone, remove_leftovers, write_tensor_file, write_text
from flexi_plugins.machine import first_process
from flexi_plugins.pruner import Pruner, origin
from flexi_plugins.rewrite import read_attached
from flexi_plugins.store import Store

TENSORS = ".tensors"  # the tensors of NAME.json are in NAME.tensors, as those of a folder's plan.json are

Methods = tuple[Any, Any, float]
"""Metric, strategy and ratio."""


def tensors_file(path: Path) -> Path:
    """Return where the tensors of a plan file are."""
    return path.with_suffix(TENSORS) if path.suffix == ".json" else path.with_name(path.name + TENSORS)


def write_plan(path: Path, planned: Planned) -> None:
    """Write a plan as JSON, and its tensors, if it has any, in a file beside it."""
    write_text(path, json.dumps(planned.plan.to_json(), indent=1) + "\n")
    if planned.attached:
        write_tensor_file(tensors_file(path), planned.attached)


def read_plan(path: Path, pruner: Pruner) -> Planned:
    """Read a plan file, and its tensors from the file beside it; without that file its strategy makes them."""
    try:
        made = PruningPlan.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise FlexiError(f"plan file {str(path)!r}: {error}") from None
    if made.shape != pruner.checkpoint.shape:
        raise FlexiError(f"plan file {str(path)!r} was made for a model of another shape than {pruner.checkpoint.name}")
    elsewhere = made.origin.get("weights") not in (None, pruner.checkpoint.sample_digest())
    if made.tensors and tensors_file(path).is_file():
        if elsewhere:
            raise FlexiError(
                f"plan file {str(path)!r}: its tensors were made for another model of this shape than "
                f"{pruner.checkpoint.name}; take that one, or make the plan again"
            )
        return Planned(made, read_attached(made, tensors_file(path)))
    if elsewhere:
        pruner.progress.say(f"plan file {str(path)!r}: it was made for another model than {pruner.checkpoint.name}")
    return pruner.attach(made)


def make_plan(pruner: Pruner, asked: Path | Methods) -> Planned:
    """Return the plan of a file, or the one that a metric and a strategy make."""
    return read_plan(asked, pruner) if isinstance(asked, Path) else pruner.make(*asked, pruner.progress.say)


@contextmanager
def searching(output: Path | None) -> Iterator[Path | None]:
    """Yield OUTPUT.search, to keep what a search tries; it goes away with the end of the block, not with an error.

    Without an output there is none.
    """
    if output is None:
        yield None
        return
    with kept_beside(output, "search") as folder:
        yield folder


@contextmanager
def kept_beside(output: Path, kind: str) -> Iterator[Path]:
    """Yield OUTPUT.KIND, for what is kept until the output is there; it goes away with the end of the block, not with an error.

    One process at a time has it: another one raises a FlexiError.
    """
    folder = output.with_name(f"{output.name}.{kind}")
    with alone(folder):
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def training_beside(output: Path) -> Iterator[Path]:
    """Yield OUTPUT.training, for what is kept of a training; of several processes (torchrun) the first has its lock."""
    folder = output.with_name(f"{output.name}.training")
    with alone(folder) if first_process() else nullcontext():
        yield folder


def kept_plan(pruner: Pruner, asked: Path | Methods | None, folder: Path) -> tuple[Planned, tuple[Any, Any] | None]:
    """Return the plan of what is to be trained (None: the model itself), and by which metric and strategy it is made.

    A plan that is made is kept in the folder of the training, so that a run that was stopped does not make it again.
    """
    if asked is None:
        return Planned(PruningPlan.identity(pruner.checkpoint.shape)), None
    if isinstance(asked, Path):
        return read_plan(asked, pruner), None
    key = digest([pruner.checkpoint.fingerprint(), origin(*asked), pruner.texts[2], str(pruner.dtype), pruner.seed])

    def make() -> tuple[PruningPlan, Any]:
        made = make_plan(pruner, asked)
        return made.plan, made.attached

    return Planned(*Store(folder / "plan").plan(key, make)), asked[:2]


def write_trained(pruner: Pruner, trained: Planned, checkpoints: Path, of_method: Path, output: Path) -> None:
    """Write a trained model beside its checkpoints, with what its method (not one before) left, then move it in place."""
    unfinished = checkpoints / "model"
    shutil.rmtree(unfinished, ignore_errors=True)
    pruner.write(trained, unfinished)
    remove_leftovers(of_method)
    for file in of_method.glob("*"):
        if file.is_file():
            shutil.move(file, unfinished / file.name)
    unfinished.rename(output)
    shutil.rmtree(checkpoints, ignore_errors=True)
