"""The study file: which models, methods, ratios and measurements, checked whole before anything is loaded."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from flexi_plugins.errors import FlexiError, unknown
from flexi_plugins.plugins import Plugins


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


class StudyFile(Strict):
    """A whole study: every metric x strategy x ratio x recovery x seed, and the dense model."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: str
    metrics: tuple[Method, ...] = Field(min_length=1)
    strategies: tuple[Method, ...] = Field(min_length=1)
    ratios: tuple[float, ...] = Field(min_length=1)
    evaluation: tuple[Measure, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = (0,)
    recovery: tuple[str, ...] = ("none",)
    dense: bool = True
    dtype: str = Field("auto", pattern="^(auto|float32|bfloat16|float16)$")
    calibration: CalibrationTable = Field(default_factory=lambda: CalibrationTable.model_validate({}))

    @field_validator("metrics", "strategies", mode="before")
    @classmethod
    def _names_are_methods(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [{"name": item} if isinstance(item, str) else item for item in value]
        return value


def read_study(path: Path | str, plugins: Plugins) -> StudyFile:
    """Read a study file; all its problems come in one error, each with the near names."""
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FlexiError(f"study file {str(path)!r} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FlexiError(f"study file {str(path)!r} is not TOML: {error}") from None
    problems = list(_form_problems(values))
    study = None
    if not problems:
        study = StudyFile(**values)
        problems = list(_name_problems(study, plugins))
    if problems or study is None:
        lines = "".join(f"\n  - {p}" for p in problems)
        raise FlexiError(f"study file {str(path)!r} has {len(problems)} problem{'s' * (len(problems) > 1)}:{lines}")
    return study


def _form_problems(values: dict[str, Any]) -> Iterator[str]:
    try:
        StudyFile(**values)
    except ValidationError as error:
        for item in error.errors():
            place = ".".join(str(p) for p in item["loc"])
            if item["type"] == "extra_forbidden":
                table = CalibrationTable if item["loc"][0] == "calibration" else StudyFile
                yield unknown("key", place, table.model_fields)
            else:
                found = "" if item["type"] == "missing" else f", found {item['input']!r}"
                yield f"{place}: {item['msg'].lower()}{found}"


def _name_problems(study: StudyFile, plugins: Plugins) -> Iterator[str]:
    from flexi_plugins.models import check_name

    yield from _caught(check_name, study.model)
    for kind, methods in (("metric", study.metrics), ("strategy", study.strategies)):
        for method in methods:
            yield from _caught(plugins.get, kind, method.name, method.options)
    for measure in study.evaluation:
        yield from _caught(plugins.get, "evaluator", measure.evaluator, measure.options)
        yield from _measure_problems(measure, plugins)
    for recovery in study.recovery:
        yield from _caught(plugins.get, "recovery", recovery)
        if recovery != "none" and recovery in plugins.entries("recovery"):
            yield f"recovery {recovery!r}: studies run recovery 'none' only"
    yield from _corpus_problems(study.calibration.corpus, plugins)
    for ratio in sorted({*study.ratios, *(r for m in (*study.metrics, *study.strategies) for r in m.ratios or ())}):
        if not 0 < ratio < 1:
            yield f"ratios: expected a share of the stored parameters between 0 and 1, found {ratio:g}"


def _measure_problems(measure: Measure, plugins: Plugins) -> Iterator[str]:
    """Ask the evaluator itself, where it can tell, and check the corpus it names."""
    try:
        evaluator = plugins.get("evaluator", measure.evaluator, measure.options)
    except FlexiError:
        return
    if isinstance(getattr(evaluator, "corpus", None), str):
        yield from _corpus_problems(evaluator.corpus, plugins)
    yield from _caught(evaluator.check)


def _corpus_problems(name: str, plugins: Plugins) -> Iterator[str]:
    from flexi_plugins.corpora.files import find_corpus

    yield from _caught(find_corpus, name, {n: e.object for n, e in plugins.entries("corpus").items()})


def _caught(call: Any, *arguments: Any) -> Iterator[str]:
    try:
        call(*arguments)
    except FlexiError as error:
        yield str(error)
