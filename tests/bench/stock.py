"""The plain way that the engine is compared with: stock lm-eval's HFLM on an exported folder, in a process of its own.

Run as a script, this file is that process. It is a plain user's: it knows this package only where a folder needs it (a
FlexiForCausalLM), and it watches lm-eval's HFLM from outside, for where the seconds go.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

METRICS = ("acc", "acc_norm")
RESULT = "RESULT "  # heads the lines of the process that hold a result; lm-eval may print others

Document = Mapping[str, Any]
"""What became of a document: task, doc_id, logprobs (one a choice, in nats), acc and acc_norm where the task has them.

From stock also ``lengths``, the characters of each choice, by which acc_norm divides.
"""


# ------------------------------------------------------------------------------------------- asking for a run


def write_definitions(folder: Path, data: Path) -> Path:
    """Write a task file for each of the seven tasks, as a user would: lm-eval's own definition on a local file."""
    from lm_eval import tasks

    from flexi_plugins.errors import FlexiError
    from flexi_plugins.evaluators.harness import LOCAL, local_file

    root = Path(tasks.__file__).parent
    packaged: list[str | Path] = [root / place for place in sorted({task.folder for task in LOCAL.values()})]
    index = tasks.TaskManager(include_path=packaged, include_defaults=False).task_index
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in LOCAL.items():
        file = local_file(name, data)
        if not file.is_file():
            raise FlexiError(f"bench: found no file {file}; set FLEXI_DATA to the folder with tasks/*.jsonl")
        splits = {f"{split}_split": None for split in ("training", "validation", "test")}
        definition = {
            "include": str(index[name].yaml_path),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {task.split: str(file.resolve())}},
            **splits,
            f"{task.split}_split": task.split,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(definition, indent=1), encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Setting:
    """How stock lm-eval is run.

    softmax_dtype: HFLM's option; None is its default, the dtype of the model. whole_index: have lm-eval list all its
    tasks first, as its command line does, which takes some seconds.
    """

    definitions: Path
    dtype: str
    batch_size: int
    limit: int
    softmax_dtype: str | None = None
    whole_index: bool = True


def run(model: Path, setting: Setting) -> dict[str, Any]:
    """Run stock lm-eval on a checkpoint folder, as a user does; see ``run_each``, and seconds of the ``whole`` process."""
    began = time.monotonic()
    (result,) = run_each([model], setting)
    result["seconds"]["whole"] = time.monotonic() - began
    return result


def run_each(models: Sequence[Path], setting: Setting) -> Iterator[dict[str, Any]]:
    """Run stock lm-eval on checkpoint folders in one process; yield seconds, counts and documents of each as they come.

    seconds: ``start`` (until everything is imported) and ``index`` (listing the tasks there are), once a process;
    ``model`` (loading it), ``tasks`` (their data and requests), ``answers`` and ``judging``; within the answers
    ``likelihoods`` (without tokenising), within those ``forward`` (the model), within that ``head``. counts: ``rows`` and
    ``padded_tokens`` that the model was given.
    """
    from flexi_plugins.errors import FlexiError

    given = {**asdict(setting), "definitions": str(setting.definitions), "spawned": time.time()}
    command = [sys.executable, __file__, json.dumps(given), *map(str, models)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith(RESULT):
                    yield json.loads(line.removeprefix(RESULT))
            if process.wait():
                errors.seek(0)
                raise FlexiError(
                    f"stock lm-eval on {models[0]} ended with status {process.returncode}:\n{errors.read()[-3000:]}"
                )
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


# ------------------------------------------------------------------------------------------- comparing answers


def by_document(documents: Iterable[Document]) -> dict[tuple[str, int], Document]:
    """Return documents by task and number."""
    return {(row["task"], row["doc_id"]): row for row in documents}


def changed(documents: Iterable[Document], stock: Iterable[Document]) -> dict[str, list[tuple[str, int]]]:
    """Return, for acc and acc_norm, the documents whose chosen answer is another than stock's."""
    expected = by_document(stock)
    found: dict[str, list[tuple[str, int]]] = {metric: [] for metric in METRICS}
    for place, row in by_document(documents).items():
        lengths = expected[place]["lengths"]
        for metric in METRICS:
            if metric not in expected[place]:
                continue
            if _choice(metric, row["logprobs"], lengths) != _choice(metric, expected[place]["logprobs"], lengths):
                found[metric].append(place)
    return found


def _choice(metric: str, logprobs: list[float], lengths: list[int]) -> int:
    """Return the first of the most probable choices, per character for acc_norm, as lm-eval chooses."""
    scores = [p / n for p, n in zip(logprobs, lengths, strict=True)] if metric == "acc_norm" else logprobs
    return scores.index(max(scores))


def accuracies(documents: Iterable[Document]) -> dict[str, float]:
    """Return the accuracy of every task by ``TASK_METRIC``, in the order of the tasks' names."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in documents:
        for metric in METRICS:
            if metric in row:
                values[f"{row['task']}_{metric}"].append(float(row[metric]))
    return {name: statistics.fmean(values[name]) for name in sorted(values)}


# ------------------------------------------------------------------------------------------- the process itself


class Stopwatch:
    """Adds up seconds by name. ``began``: when each was last begun, on the monotonic clock."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.began: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the seconds that this takes."""
        self.began[name] = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] += time.monotonic() - self.began[name]

    def watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, with the seconds of every call added."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call


def main() -> None:
    """Evaluate folders as ``lm_eval run --model hf --log_samples`` does; print a line of JSON for each."""
    setting, models = json.loads(sys.argv[1]), sys.argv[2:]
    if any(_is_ours(Path(model)) for model in models):
        import flexi_plugins  # noqa: F401  registers the model with transformers' Auto classes
    import lm_eval.models.huggingface  # noqa: F401  what takes long to import, so that it counts as starting
    from lm_eval.tasks import TaskManager

    watch = Stopwatch()
    watch.seconds["start"] = time.time() - setting["spawned"]
    with watch.part("index"):
        manager = TaskManager(include_path=setting["definitions"], include_defaults=setting["whole_index"])
    for model in models:
        print(RESULT + json.dumps(_evaluate(model, setting, manager, watch), allow_nan=False), flush=True)
        watch = Stopwatch()


def _is_ours(model: Path) -> bool:
    return json.loads((model / "config.json").read_text(encoding="utf-8"))["model_type"] == "flexi"


def _evaluate(folder: str, setting: Mapping[str, Any], manager: Any, watch: Stopwatch) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with watch.part("model"):
        options = {name: setting[name] for name in ("dtype", "softmax_dtype", "batch_size")}
        model: Any = HFLM(pretrained=folder, device="cpu", **options)
    counts = _watch(model, watch)
    tasks = sorted(path.stem for path in Path(setting["definitions"]).glob("*.yaml"))
    with watch.part("evaluation"):
        results: Any = lm_eval.simple_evaluate(
            model=model, tasks=tasks, limit=setting["limit"], task_manager=manager, log_samples=True
        )
    seconds = dict(watch.seconds)
    seconds["tasks"] = watch.began["answers"] - watch.began["evaluation"]
    seconds["judging"] = seconds.pop("evaluation") - seconds["tasks"] - seconds["answers"]
    return {"seconds": seconds, "counts": counts, "documents": list(_documents(results))}


def _watch(model: Any, watch: Stopwatch) -> dict[str, int]:
    """Have the steps of HFLM watched; return the counts of the rows that it will have given its model."""
    counts = {"rows": 0, "padded_tokens": 0}
    forward = watch.watched("forward", model._model_call)

    def counted(ids: Any, *args: Any, **kwargs: Any) -> Any:
        counts["rows"] += ids.shape[0]
        counts["padded_tokens"] += ids.numel()
        return forward(ids, *args, **kwargs)

    model._model_call = counted
    model.loglikelihood = watch.watched("answers", model.loglikelihood)
    model._loglikelihood_tokens = watch.watched("likelihoods", model._loglikelihood_tokens)
    head = model.model.get_output_embeddings()
    head.forward = watch.watched("head", head.forward)
    return counts


def _documents(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for task, samples in results["samples"].items():
        delimiter = results["configs"][task]["target_delimiter"]
        for sample in samples:
            yield {
                "task": task,
                "doc_id": sample["doc_id"],
                "logprobs": [float(logprob) for logprob, _ in sample["filtered_resps"]],
                "lengths": [len(continuation) - len(delimiter) for _, continuation in sample["arguments"]],
                **{metric: float(sample[metric]) for metric in METRICS if metric in sample},
            }


if __name__ == "__main__":
    main()
