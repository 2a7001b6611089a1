"""From lm-eval's results to what became of each document and to measurements."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from flexi_plugins.data import Measurement
from flexi_plugins.evaluators.perplexity import standard_error

SEVEN = {  # LLM-Pruner's seven tasks and the accuracy of each that its average takes
    "boolq": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
}


def documents_of(task: Any, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what became of each document of a task, one flat mapping each."""
    return [_document(task, sample) for sample in samples]


def _document(task: Any, sample: Mapping[str, Any]) -> dict[str, Any]:
    row = {"task": task.task_name, "version": str(task.VERSION), "doc_id": sample["doc_id"]}
    row["target"] = _plain(sample["target"])
    if sample["filter"] != "none":
        row["filter"] = sample["filter"]
    row |= {metric: _plain(sample[metric]) for metric in sample["metrics"]}
    if task.OUTPUT_TYPE == "multiple_choice":
        row |= _choices(task, sample)
    elif task.OUTPUT_TYPE == "generate_until":
        row["response"] = str(sample["filtered_resps"][0])
    return row


def _choices(task: Any, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summed log-probability of each choice, and of the right ones among them, by chance too.

    Nothing of a task with a judgement of its own (truthfulqa_mc2's targets say of every choice whether it is true).
    """
    if callable(getattr(task.config, "process_results", None)):
        return {}
    choices = task.doc_to_choice(sample["doc"])
    target = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    right = _right(choices, target if _several(target) else [target])
    if not right:
        return {}
    logprobs = [float(answer[0]) for answer in sample["filtered_resps"][: len(choices)]]
    return {
        "target": right[0],
        "logprobs": logprobs,
        "choice_logprob": _log_sum([logprobs[i] for i in right]) - _log_sum(logprobs),
        "chance": len(set(right)) / len(choices),
    }


def _right(choices: Sequence[str], targets: Sequence[Any]) -> list[int]:
    """Return the indices of the right choices; a data set may have a label that is none of them."""
    indices = [choices.index(t) if t in choices else t for t in targets]
    return [i for i in indices if isinstance(i, int) and 0 <= i < len(choices)]


def _several(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _log_sum(values: Sequence[float]) -> float:
    """Return the logarithm of the sum of the exponentials."""
    largest = max(values)
    return largest + math.log(sum(math.exp(value - largest) for value in values))


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: numpy's numbers as Python's, tuples as lists, anything else as text."""
    if _several(value):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, bool | int | float | str) else str(value)


# ------------------------------------------------------------------------------------------- measurements


def measurements(results: Mapping[str, Any], documents: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Measurement]:
    """Return lm-eval's metrics of each task and group, choice_logprob, and the average over the seven tasks."""
    found: list[Measurement] = []
    for name, metrics in results["results"].items():
        rows = [row for row in documents.get(name, ()) if "choice_logprob" in row]
        chances = [row["chance"] for row in rows]
        found += _metrics(name, metrics, results["higher_is_better"].get(name, {}), chances)
        if rows:
            found.append(_choice_logprob(name, [row["choice_logprob"] for row in rows], chances))
    return [*found, *_average(found)]


def _metrics(
    name: str, metrics: Mapping[str, Any], higher: Mapping[str, Any], chances: Sequence[float]
) -> list[Measurement]:
    """Return the measurements that lm-eval's ``metric,filter`` entries are; chances: of guessing each document right."""
    found = []
    for key, value in metrics.items():
        metric, comma, rule = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = metrics.get(f"{metric}_stderr,{rule}")
            found.append(
                Measurement(
                    name=f"{name}_{metric}" if rule == "none" else f"{name}_{metric}_{rule}",
                    value=float(value),
                    higher_is_better=higher.get(metric) is not False,
                    standard_error=float(error) if isinstance(error, int | float) else None,
                    chance=statistics.fmean(chances) if chances and metric.startswith("acc") else None,
                )
            )
    return found


def _choice_logprob(name: str, values: Sequence[float], chances: Sequence[float]) -> Measurement:
    error = standard_error(values) if len(values) > 1 else None
    chance = statistics.fmean(map(math.log, chances))
    return Measurement(f"{name}_choice_logprob", statistics.fmean(values), True, error, chance)


def _average(found: Sequence[Measurement]) -> list[Measurement]:
    """Return LLM-Pruner's average if all seven tasks were measured."""
    by_name = {measurement.name: measurement for measurement in found}
    seven = [by_name[f"{task}_{metric}"] for task, metric in SEVEN.items() if f"{task}_{metric}" in by_name]
    if len(seven) < len(SEVEN):
        return []
    errors = [m.standard_error for m in seven if m.standard_error is not None]
    chances = [m.chance for m in seven if m.chance is not None]
    return [
        Measurement(
            name="average_acc",
            value=statistics.fmean(m.value for m in seven),
            higher_is_better=True,
            standard_error=math.hypot(*errors) / len(seven) if len(errors) == len(seven) else None,
            chance=statistics.fmean(chances) if len(chances) == len(seven) else None,
        )
    ]
