"""Load lm-eval's tasks, from local files where they are given, with their requests built once."""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from flexi_plugins.corpora.files import from_the_hub
from flexi_plugins.corpora.hub import quick_hub
from flexi_plugins.errors import FlexiError, unknown
from flexi_plugins.evaluators import docs_cloze
from flexi_plugins.evaluators.quiet import quiet

FEWSHOT_SEED = 1234  # lm-eval's default


@dataclass(frozen=True)
class LocalTask:
    """Where lm-eval packages a task that can run on a local file, and the split which that file is."""

    folder: str
    split: str


LOCAL = {
    "boolq": LocalTask("super_glue/boolq", "validation"),
    "piqa": LocalTask("piqa", "validation"),
    "hellaswag": LocalTask("hellaswag", "validation"),
    "winogrande": LocalTask("winogrande", "validation"),
    "arc_easy": LocalTask("arc", "test"),
    "arc_challenge": LocalTask("arc", "test"),
    "openbookqa": LocalTask("openbookqa", "test"),
}


@dataclass(frozen=True)
class BuiltTask:
    """An lm-eval task whose requests are there already: building them again only forgets the last answers."""

    task: Any

    def __getattr__(self, name: str) -> Any:
        """Return what the task itself has of this name."""
        return getattr(self.task, name)

    def build_all_requests(self, **_: Any) -> None:
        """Make the requests fit to be answered for another model."""
        for instance in self.task.instances:
            instance.resps = []
            instance.filtered_resps = {}


@dataclass(frozen=True)
class Suite:
    """Tasks by name and the groups they were asked for by, as ``lm_eval.evaluate`` takes them."""

    tasks: Mapping[str, BuiltTask]
    groups: Mapping[str, Any]

    @property
    def instances(self) -> list[Any]:
        """The requests of all tasks."""
        return [instance for task in self.tasks.values() for instance in task.instances]


def known_tasks() -> list[str]:
    """Return the names of all tasks, groups and tags; reading lm-eval's index takes some seconds."""
    return sorted([docs_cloze.NAME, *_manager(whole=True).all_tasks])


def check_tasks(names: Iterable[str]) -> list[str]:
    """Return one message for each unknown task; quick if all are of those that need no index."""
    others = _beyond_local(names)
    return _unknown_tasks(others, known_tasks()) if others else []


def check_files(names: Iterable[str], data: Path | None) -> None:
    """Raise where there is a local file of a task that cannot be read from one: the hub's would be taken unsaid."""
    found = [str(local_file(name, data)) for name in _beyond_local(names) if data and local_file(name, data).exists()]
    if found:
        raise FlexiError(
            f"evaluator 'lm-eval': found {', '.join(found)}, and local files are read of {', '.join(LOCAL)} alone; move it "
            "away to take the hub's"
        )


def _beyond_local(names: Iterable[str]) -> list[str]:
    return [name for name in names if name not in LOCAL and name != docs_cloze.NAME]


def _unknown_tasks(names: Iterable[str], known: Sequence[str]) -> list[str]:
    messages = []
    for name in sorted(set(names) - set(known)):
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        listed = unknown("task", name, {docs_cloze.NAME, *LOCAL, *near})
        messages.append(f"{listed} and the rest of lm-eval's {len(known)} names")
    return messages


def load_suite(
    names: Sequence[str], data: Path | None, limit: int | None, num_fewshot: int | None, advance: Callable[[int], Any]
) -> Suite:
    """Load tasks and build their requests; ``advance(1)`` is called for each name."""
    others = _beyond_local(names)
    manager = _manager(whole=bool(others))
    if problems := _unknown_tasks(others, manager.all_tasks):
        raise FlexiError(f"evaluator 'lm-eval': {'; '.join(problems)}")
    tasks: dict[str, BuiltTask] = {}
    groups: dict[str, Any] = {}
    for name in names:
        with _seeded():
            loaded = _load(manager, name, data, num_fewshot)
            tasks |= {key: _build(task, limit, num_fewshot) for key, task in loaded["tasks"].items()}
        groups |= {key: group for key, group in loaded["groups"].items() if name not in LOCAL}
        advance(1)
    return Suite(tasks, groups)


@contextmanager
def _seeded() -> Iterator[None]:
    """Within: the random numbers that ``lm_eval.simple_evaluate`` sets; some tasks shuffle their choices with them."""
    import numpy as np

    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(1234)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@cache
def _manager(whole: bool) -> Any:
    """Return lm-eval's task manager, read once; not the whole index if the tasks that run on local files are enough."""
    from lm_eval import tasks

    with quiet():
        if whole:
            return tasks.TaskManager()
        root = Path(tasks.__file__).parent
        folders: list[str | Path] = [root / folder for folder in sorted({task.folder for task in LOCAL.values()})]
        return tasks.TaskManager(include_path=folders, include_defaults=False)


def _load(manager: Any, name: str, data: Path | None, num_fewshot: int | None) -> Any:
    """Return what lm-eval's manager makes of a name: from the local file if there is one, else from the hub."""
    if name == docs_cloze.NAME:
        return manager.load([docs_cloze.configuration()])
    path = local_file(name, data)
    if path.is_file() and name in LOCAL:
        return _load_local(manager, name, path, num_fewshot)
    if data:
        from_the_hub(f"task {name!r}", path)
    try:
        with quick_hub():
            return manager.load([name])
    except Exception as error:  # whatever the hub's client raises, the next step is the same
        raise FlexiError(_missing(manager, name, path, error)) from error


def local_file(name: str, data: Path | None) -> Path:
    """Return where the local file of a task would be."""
    return (data or Path("FLEXI_DATA")) / "tasks" / f"{name}.jsonl"


def _load_local(manager: Any, name: str, path: Path, num_fewshot: int | None) -> Any:
    """Load the packaged definition of a task with its evaluation split read from a file."""
    if num_fewshot:
        raise FlexiError(
            f"task {name!r}: num_fewshot {num_fewshot} needs the training split, found only {path}, which is the "
            f"{LOCAL[name].split} split; leave num_fewshot out, or evaluate without --data"
        )
    splits: dict[str, str | None] = {f"{split}_split": None for split in ("training", "validation", "test")}
    splits[f"{LOCAL[name].split}_split"] = LOCAL[name].split
    kwargs = {"data_files": {LOCAL[name].split: str(path)}}
    own = {"task": name, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": kwargs, **splits}
    try:
        return manager.load([{"group": f"{name} from a file", "task": [own]}])
    except Exception as error:  # of many kinds, for a file that is no JSON lines or lacks a column
        raise FlexiError(
            f"task {name!r}: expected {path} to have the fields of the hub data set {_dataset(manager, name)}, one "
            f"JSON object a line, found {type(error).__name__}: {error}"
        ) from error


def _dataset(manager: Any, name: str) -> str:
    entry = manager.task_index.get(name)
    return (entry.cfg or {}).get("dataset_path", "of its tasks") if entry else "of its tasks"


def _missing(manager: Any, name: str, path: Path, error: Exception) -> str:
    cause = f"hub data set {_dataset(manager, name)} ({type(error).__name__}: {error}); connect to the network, or"
    if name in LOCAL:
        return (
            f"task {name!r}: found neither the file {path} nor the {cause} provide that file (FLEXI_DATA is the folder "
            "that --data DIR or the variable FLEXI_DATA names)"
        )
    return f"task {name!r}: could not load the {cause} take the tasks that local files can give: {', '.join(LOCAL)}"


def _build(task: Any, limit: int | None, num_fewshot: int | None) -> BuiltTask:
    """Set the number of examples as ``lm_eval.simple_evaluate`` does, and build the requests."""
    default = task.get_config("num_fewshot")
    if num_fewshot is not None and default != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif default is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    task.build_all_requests(limit=limit)
    return BuiltTask(task)
