"""The study file: which models, methods, ratios and measurements, checked whole before anything is loaded."""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from flexi_plugins.corpora.files import find_corpus
from flexi_plugins.errors import FlexiError, unknown
from flexi_plugins.families.known import check_name
from flexi_plugins.plugins import Plugins, named, own_knob


class Strict(BaseModel):
    """A table of the study file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Method(BaseModel):
    """A metric or strategy: its name, its options, and the ratios it is limited to, if it is."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    ratios: tuple[float, ...] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The plugin's options."""
        return dict(self.model_extra or {})


class Measure(BaseModel):
    """One evaluator and its options."""

    model_config = ConfigDict(extra="allow", frozen=True)

    evaluator: str

    @property
    def options(self) -> dict[str, Any]:
        """The evaluator's options."""
        return dict(self.model_extra or {})


class CalibrationTable(Strict):
    """The text that statistics are taken on."""

    corpus: str = "python-docs"
    windows: int = Field(16, ge=1)
    length: int = Field(256, ge=2)
    gradient_samples: int = Field(10, ge=1)
    gradient_length: int = Field(64, ge=2)


class TrainingTable(Strict):
    """The text that models are trained on, and how many tokens of it; the same for every recovery of a study."""

    corpus: str = "python-docs"
    length: int = Field(256, ge=2)
    tokens: int = Field(24_576, ge=1)
    held_out: int = Field(16, ge=1)  # windows that the loss is measured on meanwhile

    @model_validator(mode="after")
    def _holds_a_window(self) -> Self:
        if self.tokens < self.length:
            raise ValueError(f"tokens = {self.tokens}, expected a window of {self.length} at least")
        return self


Combination = tuple[Method, Method, tuple[float, ...]]


class Pair(Strict):
    """One metric with one strategy, beside the grid: for methods that belong together."""

    metric: Method
    strategy: Method
    ratios: tuple[float, ...] | None = None

    @field_validator("metric", "strategy", mode="before")
    @classmethod
    def _name_is_a_method(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class StudyFile(Strict):
    """A whole study: every metric x strategy x ratio x recovery x seed, single pairs beside them, and the dense model."""

    name: str
    model: str
    metrics: tuple[Method, ...] = ()
    strategies: tuple[Method, ...] = ()
    pairs: tuple[Pair, ...] = ()
    ratios: tuple[float, ...] = ()  # none where an option of every strategy takes the place of the ratio
    evaluation: tuple[Measure, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    recovery: tuple[Method, ...] = Field((Method(name="none"),), min_length=1)
    dense: bool = True
    dense_recovery: bool = False  # train the dense model as well, by every recovery
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    calibration: CalibrationTable = Field(default_factory=lambda: CalibrationTable.model_validate({}))
    training: TrainingTable = Field(default_factory=lambda: TrainingTable.model_validate({}))

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError("it names a folder: expected letters, digits, '.', '_' and '-'")
        return value

    @model_validator(mode="after")
    def _something_is_compared(self) -> Self:
        complete = bool(self.metrics) == bool(self.strategies) and (self.metrics or self.pairs)
        if not complete and type(self) is StudyFile:
            raise ValueError("expected metrics and strategies, or pairs, or all of them")
        return self

    @property
    def combinations(self) -> list[Combination]:
        """Every metric with every strategy and their ratios, then the pairs."""
        crossed = [(m, s, _ratios_of(m, s, self.ratios)) for m in self.metrics for s in self.strategies]
        pairs = [(p.metric, p.strategy, p.ratios or _ratios_of(p.metric, p.strategy, self.ratios)) for p in self.pairs]
        return crossed + pairs

    @field_validator("metrics", "strategies", "recovery", mode="before")
    @classmethod
    def _names_are_methods(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [{"name": item} if isinstance(item, str) else item for item in value]
        return value


def _ratios_of(metric: Method, strategy: Method, ratios: tuple[float, ...]) -> tuple[float, ...]:
    """Return the ratios of a combination: the strategy's own, or the study's, those that the metric is not limited from."""
    return tuple(r for r in strategy.ratios or ratios if metric.ratios is None or r in metric.ratios)


class _Partial(StudyFile):
    """What is left of a study file without the parts that have not the right form."""

    name: str = "partial"
    model: str = "smollm2-135m"
    metrics: tuple[Method, ...] = ()
    strategies: tuple[Method, ...] = ()
    ratios: tuple[float, ...] = ()
    evaluation: tuple[Measure, ...] = ()


def read_study(path: Path | str, plugins: Plugins) -> StudyFile:
    """Read a study file; all its problems come in one error, each with the near names."""
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FlexiError(f"study file {str(path)!r} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FlexiError(f"study file {str(path)!r} is not TOML: {error}") from None
    except OSError as error:
        raise FlexiError(f"study file {str(path)!r} cannot be read: {error.strerror}") from None
    problems = [*_form_problems(values), *_name_problems(_well_formed(values), plugins)]
    if problems:
        lines = "".join(f"\n  - {p}" for p in dict.fromkeys(problems))
        raise FlexiError(f"study file {str(path)!r} has {len(problems)} problem{'s' * (len(problems) > 1)}:{lines}")
    return StudyFile(**values)


TABLES: dict[str, type[BaseModel]] = {
    "": StudyFile,
    "calibration": CalibrationTable,
    "training": TrainingTable,
    "pairs": Pair,
}


def _form_problems(values: dict[str, Any]) -> Iterator[str]:
    try:
        StudyFile(**values)
    except ValidationError as error:
        for item in error.errors():
            if item["type"] == "extra_forbidden":
                *tables, key = item["loc"]
                place = ".".join(map(str, tables))
                table = TABLES[str(tables[0]) if tables else ""]
                yield f"{place}: " * bool(place) + unknown("key", str(key), table.model_fields)
            else:
                place = ".".join(map(str, item["loc"]))
                found = "" if item["type"] == "missing" or not place else f", found {item['input']!r}"
                yield f"{place}: " * bool(place) + f"{_in_toml_words(item['msg'])}{found}"


def _in_toml_words(message: str) -> str:
    """Return pydantic's message with TOML's words for Python's."""
    message = re.sub(r"value error, | after validation| or instance of \w+", "", message[0].lower() + message[1:])
    return message.replace("valid dictionary", "table").replace("tuple", "list")


def _well_formed(values: dict[str, Any]) -> StudyFile:
    """Return the study without what has not the right form, so that the names in the rest are checked in the same go."""
    kept = copy.deepcopy(values)
    while True:
        try:
            return _Partial(**kept)
        except ValidationError as error:
            location: Any = error.errors()[0]["loc"]
            top, *inner = location
            if inner and isinstance(kept[top], dict | list):
                del kept[top][inner[0]]
            else:
                del kept[top]


def _name_problems(study: StudyFile, plugins: Plugins) -> Iterator[str]:
    yield from _caught(check_name, study.model)
    for method in (*study.metrics, *(p.metric for p in study.pairs)):
        yield from _method_problems("metric", method, plugins)
    for method in (*study.strategies, *(p.strategy for p in study.pairs)):
        yield from _method_problems("strategy", method, plugins)
    for measure in study.evaluation:
        yield from measure_problems(measure, plugins)
    yield from _measured_twice(study.evaluation, plugins)
    for recovery in study.recovery:
        yield from _caught(lambda r=recovery: _checked("recovery", plugins.get("recovery", r.name, r.options)))
        if recovery.ratios is not None:
            yield f"recovery {recovery.name!r}: ratios belong to metrics and strategies"
    for corpus in (study.calibration.corpus, study.training.corpus):
        yield from _corpus_problems(corpus, plugins)
    yield from _ratio_problems(study, plugins)
    for key in ("metrics", "strategies", "pairs", "recovery", "evaluation", "ratios", "seeds"):
        listed = getattr(study, key)
        for item in [i for n, i in enumerate(listed) if i in listed[:n]]:
            pair = f"{item.metric.name} with {item.strategy.name}" if isinstance(item, Pair) else item
            name = getattr(item, "evaluator", getattr(item, "name", pair))
            yield f"{key}: {name} is listed twice with the same options"


def _method_problems(kind: str, method: Method, plugins: Plugins) -> Iterator[str]:
    """Look for the plugin, its options, and the statistics that it needs."""
    try:
        found = plugins.get(kind, method.name, method.options)
    except FlexiError as error:
        yield str(error)
        return
    known = plugins.entries("statistic")
    for name in sorted(found.needs - known.keys()):
        yield f"{kind} {method.name!r}: it needs an {unknown('statistic', name, known)}"


def _ratio_problems(study: StudyFile, plugins: Plugins) -> Iterator[str]:
    for metric, strategy, ratios in study.combinations:
        try:
            replacement = plugins.get("strategy", strategy.name, strategy.options)
        except FlexiError:
            continue  # said already
        if not ratios and not own_knob(replacement) and metric.ratios is None:
            yield f"ratios: strategy {strategy.name!r} has none; give the study or the strategy ratios"
    limited: list[Method | Pair] = [*study.metrics, *study.strategies, *study.pairs]
    for ratio in sorted({*study.ratios, *(r for m in limited for r in m.ratios or ())}):
        if not 0 < ratio < 1:
            yield f"ratios: expected a share of the stored parameters between 0 and 1, found {ratio:g}"
    planned = {*study.ratios, *(r for m in study.strategies for r in m.ratios or ())}
    for method in study.metrics:
        for ratio in sorted(set(method.ratios or ()) - planned):
            yield f"metric {method.name!r}: its ratio {ratio:g} is none of the study's or of a strategy's"


def measure_problems(measure: Measure, plugins: Plugins) -> Iterator[str]:
    """Look for the evaluator, its options and the corpus it names, and ask it what it can tell itself."""
    try:
        evaluator = plugins.get("evaluator", measure.evaluator, measure.options)
    except FlexiError as error:
        yield str(error)
        return
    if isinstance(getattr(evaluator, "corpus", None), str):
        yield from _corpus_problems(evaluator.corpus, plugins)
    yield from _caught(_checked, "evaluator", evaluator)


def _measured_twice(measures: Sequence[Measure], plugins: Plugins) -> Iterator[str]:
    """Look for what two measures would give one name, of which the record had the first alone."""
    seen: dict[tuple[Any, ...], Measure] = {}
    for measure in measures:
        try:
            evaluator = plugins.get("evaluator", measure.evaluator, measure.options)
        except FlexiError:
            continue  # said already
        names: list[tuple[Any, ...]] = [(task,) for task in getattr(evaluator, "tasks", ())]
        if isinstance(getattr(evaluator, "corpus", None), str):
            names.append((evaluator.corpus, getattr(evaluator, "window", None)))
        for name in names:
            first = seen.setdefault((measure.evaluator, *name), measure)
            if first is not measure and first != measure:
                yield (
                    f"evaluation: {measure.evaluator} measures {name[0]} twice, with other options and by one name; put one of "
                    "them into a study of its own"
                )


def _corpus_problems(name: str, plugins: Plugins) -> Iterator[str]:
    yield from _caught(find_corpus, name, {n: e.object for n, e in plugins.entries("corpus").items()})


def _checked(kind: str, plugin: Any) -> None:
    """Have a plugin check its options; what it raises beside a FlexiError names it."""
    with named(kind, plugin.name):
        plugin.check()


def _caught(call: Any, *arguments: Any) -> Iterator[str]:
    try:
        call(*arguments)
    except FlexiError as error:
        yield str(error)
