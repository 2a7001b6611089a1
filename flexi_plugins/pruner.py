"""From a model's name, a metric, a strategy and a ratio to a plan, a model, or a checkpoint folder."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexi_plugins.budget import check_reach
from flexi_plugins.calibration import Calibrator
from flexi_plugins.checkpoint import Checkpoint
from flexi_plugins.corpora.files import data_folder, find_corpus
from flexi_plugins.corpora.training import training_text
from flexi_plugins.corpora.windows import overlapping, token_windows
from flexi_plugins.data import ModelShape, PruningPlan, Scores, Statistics, digest
from flexi_plugins.errors import FlexiError, unknown
from flexi_plugins.execution.blocks import Blocks
from flexi_plugins.execution.likelihoods import AnswerJournal
from flexi_plugins.execution.packing import BATCH_TOKENS
from flexi_plugins.execution.readout import Batch
from flexi_plugins.execution.sweep import Planned, Sweeper
from flexi_plugins.generation import chrf
from flexi_plugins.hookspecs import (
    Budget,
    ImportanceMetric,
    PruningRequest,
    RecoveryMethod,
    RecoveryRequest,
    ReplacementStrategy,
    TensorRequest,
    TrainingText,
)
from flexi_plugins.machine import FREE_SHARE, Machine, free_memory
from flexi_plugins.models import open_model
from flexi_plugins.numerics import all_finite
from flexi_plugins.plugins import Plugins, check_compatible, named, options_json, options_of, own_knob
from flexi_plugins.precision import products
from flexi_plugins.progress import Progress
from flexi_plugins.recovered import planned_of
from flexi_plugins.recovery.copies import seed_of
from flexi_plugins.recovery.monitor import Trained, together
from flexi_plugins.recovery.options import TrainingOptions, unfit
from flexi_plugins.recovery.refusal import refusal
from flexi_plugins.rewrite import PlanWeights, build_model, needed_tensors, with_digests, write_checkpoint
from flexi_plugins.trials import Trials


@dataclass(frozen=True)
class Calibration:
    """The text that statistics are taken on: windows for activations, samples for gradients (LLM-Pruner's 10 x 64)."""

    corpus: str = "python-docs"
    windows: int = 16
    length: int = 256
    gradient_samples: int = 10
    gradient_length: int = 64


@dataclass(frozen=True)
class Training:
    """The text that a model is trained on: windows of a corpus, others that the loss is measured on meanwhile."""

    corpus: str = "python-docs"
    length: int = 256
    tokens: int = 24_576  # python-docs has some more
    held_out: int = 16

    def __post_init__(self) -> None:
        """Raise a FlexiError for numbers that cannot be."""
        for name, least in (("length", 2), ("tokens", self.length if self.tokens > 0 else 0), ("held_out", 1)):
            if getattr(self, name) < least:
                raise FlexiError(f"training: {name} = {getattr(self, name)}, expected {least} or more")


class Pruner:
    """Everything about pruning one model: calibrated once, it makes any number of plans and the models of plans.

    dtype, device: what it computes in and on (see ``Machine``). memory: bytes that the process may take; a model that
    does not fit is streamed from its files, block by block. The whole model is in memory only in what ``model`` returns.
    journal: keeps what the models are worth that a search tries, for another process that goes on with it.
    """

    def __init__(
        self,
        model: str | Checkpoint,
        calibration: Calibration | None = None,
        *,
        seed: int = 0,
        data: Path | str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        memory: int | None = None,
        plugins: Plugins | None = None,
        progress: Progress | None = None,
        journal: AnswerJournal | None = None,
    ) -> None:
        self.plugins = plugins or Plugins.load()
        self.machine = Machine(device, memory)
        opened = open_model(model, self.plugins.family) if isinstance(model, str) else model
        self.checkpoint = resident(opened, self.machine)
        self.calibration = calibration or Calibration()
        self.seed = seed
        self.data = data_folder(data)
        self.dtype = self.machine.dtype(dtype)
        self.progress = progress or Progress(quiet=True)
        self.trials = Trials(journal, lambda: [self.checkpoint.fingerprint(), self.texts[2], str(self.dtype)])
        self._texts: dict[Training, tuple[TrainingText, TrainingText, str]] = {}
        self._blocks_of: Pruner | None = None

    @property
    def dtype_name(self) -> str:
        """The compute dtype as options name it, such as ``bfloat16``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def _original(self) -> Planned:
        return Planned(PruningPlan.identity(self.checkpoint.shape))

    # -- calibration

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.checkpoint.tokenizer()

    @cached_property
    def texts(self) -> tuple[Tensor, Tensor, str]:
        """Calibration windows (windows, length), gradient samples (samples, length), and the hash of both."""
        c = self.calibration
        self._say_if_too_long("calibration", max(c.length, c.gradient_length))
        corpora = {n: e.object for n, e in self.plugins.entries("corpus").items()}
        corpus = find_corpus(c.corpus, corpora)
        windows, first = token_windows(corpus, "calibration", self.data, self.tokenizer, c.length, c.windows, self.seed)
        samples, second = token_windows(
            corpus, "calibration", self.data, self.tokenizer, c.gradient_length, c.gradient_samples, self.seed
        )
        return torch.tensor(windows), torch.tensor(samples), f"{first[:32]}{second[:32]}"

    def _say_if_too_long(self, what: str, length: int) -> None:
        if length > (most := self.checkpoint.config.max_position_embeddings):
            self.progress.say(f"{what}: windows of {length:,} tokens, but the model has positions for {most:,}")

    def calibrated(self, calibration: Calibration, seed: int) -> Pruner:
        """Return a pruner of the same model on other calibration text; the blocks in memory are those of both."""
        other = Pruner(
            self.checkpoint,
            calibration,
            seed=seed,
            data=self.data,
            dtype=self.dtype_name,
            device=self.machine.device,
            memory=self.machine.memory,
            plugins=self.plugins,
            progress=self.progress,
            journal=self.trials.journal,
        )
        other._blocks_of = self
        return other

    @cached_property
    def blocks(self) -> Blocks:
        """The blocks of this model's plans."""
        if self._blocks_of is not None:
            return self._blocks_of.blocks
        return Blocks(self.checkpoint, self.dtype, self.machine.torch_device, *self.machine.budget())

    @cached_property
    def calibrator(self) -> Calibrator:
        """Statistics of this model's plans."""
        windows, samples, _ = self.texts
        known = {n: e.object for n, e in self.plugins.entries("statistic").items()}
        return Calibrator(self.blocks, windows, samples, known, say=self.progress.say, trials=self.trials)

    def calibrate(self, needs: Iterable[str]) -> Statistics:
        """Take these statistics of the dense model together: one forward and one backward pass for all."""
        plan = PruningPlan.identity(self.checkpoint.shape)
        wanted = sorted(set(needs))
        if not wanted:
            return Statistics({})
        total = len(plan.blocks) * self.calibrator.passes(wanted)
        with self.progress.stage(f"calibrating the dense model: {', '.join(wanted)}", total) as advance:
            return self.calibrator.statistics(Planned(plan), wanted, advance)

    # -- plans

    def score(self, metric: str | ImportanceMetric, planned: Planned | None = None) -> Scores:
        """Return a metric's scores of the dense model, or of a plan's model."""
        chosen = self._plugin("metric", metric)
        planned = planned or self._original
        request = self._request(planned, Budget(self.checkpoint.shape.parameters, 0.5), chosen.needs)
        return self._scores(chosen, request)

    def plan(
        self,
        metric: str | ImportanceMetric,
        strategy: str | ReplacementStrategy,
        ratio: float,
        say: Callable[[str], None] = lambda text: None,
    ) -> PruningPlan:
        """Return the plan of a metric and a strategy at a ratio; no weight is changed and no new tensor made."""
        return self.steps(metric, strategy, ratio, say).plan

    def make(
        self,
        metric: str | ImportanceMetric,
        strategy: str | ReplacementStrategy,
        ratio: float,
        say: Callable[[str], None] = lambda text: None,
    ) -> Planned:
        """Return the plan of a metric and a strategy at a ratio with its new tensors."""
        planned = self.steps(metric, strategy, ratio, say)
        return self._attached(planned, self._plugin("strategy", strategy), self._original)

    def steps(
        self,
        metric: Any,
        strategy: Any,
        ratio: float,
        say: Callable[[str], None],
        then: Callable[[Planned, int], Planned] = lambda planned, step: planned,
    ) -> Planned:
        """Plan step by step; new tensors are made where the next step looks at them, so of progressive strategies only.

        then(planned, step): what becomes of the model behind each step of a progressive strategy, counted from 1.
        """
        chosen, replacement = self._plugin("metric", metric), self._plugin("strategy", strategy)
        check_compatible(chosen, replacement)
        planned = self._original
        shape = planned.plan.shape
        budget = Budget(shape.parameters, ratio)
        if not own_knob(replacement):
            check_reach(replacement.name, budget, replacement.reach(shape))
        self.calibrator.forget([planned.plan])  # what a search left that failed
        steps = 0
        while True:
            request = self._request(
                planned, budget, chosen.needs | replacement.needs, searching=replacement.progressive
            )
            request = replace(request, scores=self._scores(chosen, request))
            before = planned
            planned = _carried(before.plan.compose(replacement.plan(request)), before)
            steps += 1
            say(f"step {steps}: {len(planned.plan.blocks)} blocks, ratio {planned.plan.ratio:.4f}")
            if replacement.progressive:
                _check_progress(replacement, before.plan, planned.plan)
                planned = then(self._attached(planned, replacement, before), steps)
            if not replacement.progressive or replacement.finished(planned.plan, budget):
                break
        self.calibrator.forget([self._original.plan])
        if not own_knob(replacement) and not budget.met(planned.plan):
            raise FlexiError(
                f"strategy {replacement.name!r} at ratio {ratio:g}: expected at most {budget.target:,} stored parameters, "
                f"found {planned.plan.stored_parameters:,}"
            )
        made_by = {
            **origin(chosen, replacement, ratio),
            "weights": self.checkpoint.sample_digest(),
            "calibration": self._calibrated_on,
            "steps": steps,
            **planned.plan.origin,
        }
        return replace(planned, plan=replace(planned.plan, origin=made_by))

    @property
    def _calibrated_on(self) -> dict[str, Any]:
        """What a plan says of the text that it was made by."""
        return {**asdict(self.calibration), "seed": self.seed, "text": self.texts[2][:16]}

    def attach(self, plan: PruningPlan) -> Planned:
        """Make the new tensors of a plan, where it has any: by the strategy and on the text that its origin names."""
        missing = needed_tensors(plan)
        if not missing:
            return Planned(plan)
        if "recovery" in plan.origin:
            raise FlexiError(
                f"plan: it was trained, and its {len(missing)} tensors ({missing[0]}, ...) are missing; they lie in the file "
                "beside the plan, of the same name and ending in .tensors, or recover the model again"
            )
        made_by = plan.origin.get("strategy")
        if not made_by:
            raise FlexiError(
                "plan: it needs new tensors, and neither has them attached nor says which strategy makes them"
            )
        strategy = self.plugins.get("strategy", made_by, plan.origin.get("strategy_options"))
        if strategy.progressive:
            raise FlexiError(
                f"plan: {len(missing)} tensors ({missing[0]}, ...) are missing that {made_by} made step by step; they lie "
                "beside the plan, or make the plan again"
            )
        maker, text = self._maker(plan)
        try:
            return maker._attached(Planned(plan), strategy, self._original, text)
        finally:
            if maker is not self and "calibrator" in vars(maker):
                maker.calibrator.forget([])  # the states that it keeps are among the blocks that both have

    def _maker(self, plan: PruningPlan) -> tuple[Pruner, str | None]:
        """Return a pruner on the text that a plan was made by, and the digest that this text has to have."""
        if "calibration" not in plan.origin:
            return self, None
        setting = dict(plan.origin["calibration"])
        text = setting.pop("text")
        if setting == {**asdict(self.calibration), "seed": self.seed}:
            return self, text
        seed = setting.pop("seed")
        return self.calibrated(Calibration(**setting), seed), text

    def _attached(
        self, planned: Planned, strategy: ReplacementStrategy, before: Planned, text: str | None = None
    ) -> Planned:
        """Return the plan with its missing tensors made; ``before`` is what the step that brought them saw.

        text: the digest that the calibration text has to have where it is used.
        """

        def on_text(ask: Callable[..., Any]) -> Callable[..., Any]:
            def asked(*given: Any, **options: Any) -> Any:
                if text not in (None, self.texts[2][:16]):
                    raise FlexiError(
                        f"plan: its new tensors are to be made on {self.calibration.corpus!r}, seed {self.seed}, as the plan "
                        f"was, and that text is another now ({self.texts[2][:16]}, expected {text}); make the plan again"
                    )
                return ask(*given, **options)

            return asked

        plan = planned.plan
        if set(needed_tensors(plan)) <= set(planned.attached):
            return planned
        request = TensorRequest(
            plan=plan,
            before=before.plan,
            weights=self.checkpoint,
            attached=planned.attached,
            seed=self.seed,
            statistics=on_text(lambda names: self.calibrator.statistics(before, names)),
            quality=on_text(partial(self._quality, planned)),
            traces=on_text(lambda at, to: self.calibrator.traces(before, at, _carried(to[0], before), to[1])),
        )
        made = strategy.tensors(request)
        for name, tensor in made.items():
            if not all_finite(tensor):
                raise FlexiError(f"strategy {strategy.name!r}: its tensor {name!r} is not finite (NaN or infinity)")
        attached = {**planned.attached, **{name: tensor.cpu() for name, tensor in made.items()}}
        return Planned(with_digests(plan, attached), attached)

    # -- recovery

    def training_texts(self, setting: Training) -> tuple[TrainingText, TrainingText, str]:
        """Return what a model is trained on, what its loss is measured on meanwhile, and the digest of both.

        Both are of the part of the corpus that is for calibration, and share no window: which state is kept depends on the
        second, so that nothing which is measured afterwards may be in it, nor a window of calibration, to which the pruned
        model may have been fitted: of the windows drawn, the first that are none make it up. Where there are too few, it says
        so.
        """
        if setting not in self._texts:
            self._say_if_too_long("training", setting.length)
            corpus = find_corpus(setting.corpus, {n: e.object for n, e in self.plugins.entries("corpus").items()})
            count = setting.held_out + setting.tokens // setting.length
            text, found = training_text(
                corpus, "calibration", self.data, self.tokenizer, setting.length, count, seed_of(self.seed, "training")
            )
            seen = self._calibrated(setting, text, getattr(corpus, "response", None) is None)
            order = sorted(range(count), key=seen.__contains__)  # in their order otherwise
            shared = seen.intersection(order[: setting.held_out])
            if shared:
                self.progress.say(
                    f"training: {len(shared)} of {setting.held_out} windows that decide which state is kept are windows of "
                    "calibration, since too few others were drawn; take a longer text or another length"
                )
            held_out, rest = (
                TrainingText(text.ids[part], text.labels[part])
                for part in (order[: setting.held_out], order[setting.held_out :])
            )
            self._texts[setting] = rest, held_out, digest([found, setting.held_out, *sorted(seen)])
        return self._texts[setting]

    def _calibrated(self, setting: Training, text: TrainingText, plain: bool) -> set[int]:
        """Return which windows of a text to train on share tokens with windows of calibration (those of activations).

        plain: both are cut from one stream of tokens, which instructions are not."""
        if setting.corpus != self.calibration.corpus:
            return set()
        found = overlapping(text.ids, self.texts[0]) if plain else None
        if found is None:
            self.progress.say(
                f"training: which windows of {setting.length} tokens share some with those of calibration, of "
                f"{self.calibration.length}, cannot be told, and some may decide which state is kept"
            )
        return found or set()

    def check_recovery(self, method: RecoveryMethod) -> None:
        """Raise a FlexiError for options of a method that cannot work, and where nothing can be trained here."""
        with named("recovery", method.name):
            method.check()
        problems = (
            list(unfit(str(self.machine.torch_device), self.dtype_name)) if isinstance(method, TrainingOptions) else []
        )
        if problems:
            raise FlexiError(f"{method.name}: {'; '.join(problems)}")

    def recover(
        self,
        plan: PruningPlan | Planned,
        method: str | RecoveryMethod,
        setting: Training,
        folder: Path | str,
        made_by: tuple[ImportanceMetric, ReplacementStrategy] | None = None,
    ) -> Planned:
        """Train a plan's model; return the plan of what came out, whose origin says what was done and its loss curve.

        folder: for checkpoints of the training; where one lies there, of the same training, that is taken up. made_by: the
        metric and the strategy of the plan; methods that are ``interleaved`` make it again with them, step by step.
        """
        chosen = self._plugin("recovery", method)
        self.check_recovery(chosen)
        planned = self.attach(plan) if isinstance(plan, PruningPlan) else plan
        reason = refusal(chosen, planned.plan, made_by[1] if made_by else None)
        if reason:
            raise FlexiError(reason)
        self._warn_of_another_calibration(planned.plan, setting)
        if chosen.interleaved:
            assert made_by is not None
            trained, courses = self._trained_stepwise(planned.plan, *made_by, chosen, setting, Path(folder))
            self.calibrator.forget([])
        else:
            text, held_out, _ = self.training_texts(setting)
            trained, course = self._trained(planned, chosen, text, held_out, setting.tokens, Path(folder))
            courses = [course]
        return self._with_history(trained, chosen, setting, courses)

    def _warn_of_another_calibration(self, plan: PruningPlan, setting: Training) -> None:
        """Say where windows that a plan was fitted to may decide which state is kept: only this pruner's own are known."""
        found = plan.origin.get("calibration")
        if found and found["corpus"] == setting.corpus and found != self._calibrated_on:
            self.progress.say(
                f"training: the plan was calibrated on {found['windows']} windows of {found['length']} tokens of "
                f"{found['corpus']} (seed {found['seed']}), so that windows which decide what state is kept may be among them; "
                "those of a plan that is made and trained in one go, by a metric and a strategy, are not"
            )

    def _trained_stepwise(
        self,
        made: PruningPlan,
        metric: ImportanceMetric,
        strategy: ReplacementStrategy,
        method: RecoveryMethod,
        setting: Training,
        folder: Path,
    ) -> tuple[Planned, list[Trained]]:
        """Make a plan again, and train its model behind every step on the next of equal shares of the text.

        Each step is chosen by the scores of the model as it is trained by then. made: the plan without training, which says
        how many steps there are. Checkpoints are in a subfolder a step, so that a run that was stopped trains no step twice.
        """
        text, held_out, _ = self.training_texts(setting)
        steps = made.origin["steps"]
        windows = setting.tokens // setting.length
        if windows < steps:
            raise FlexiError(
                f"{method.name}: {setting.tokens:,} tokens in windows of {setting.length} are less than one window for each of "
                f"{steps} steps; expected at least {steps * setting.length:,} tokens"
            )
        courses: list[Trained] = []

        def then(planned: Planned, step: int) -> Planned:
            if step > steps:
                note = f"step {step} is not trained: without training there were {steps}, which have shared the text"
                courses.append(Trained(notes=(note,)))
                return planned
            reason = method.refuses(planned.plan)
            if reason:
                courses.append(Trained(notes=(f"step {step} is not trained: {reason}",)))
                return planned
            share = slice((step - 1) * windows // steps, step * windows // steps)
            part, place = TrainingText(text.ids[share], text.labels[share]), folder / f"step-{step}"
            trained, course = self._trained(planned, method, part, held_out, part.ids.numel(), place)
            courses.append(course)
            return trained

        planned = self.steps(metric, strategy, made.origin["ratio"], self.progress.say, then)
        for file in (folder / f"step-{min(steps, len(courses))}").glob("*"):  # what the last training leaves is kept
            if file.is_file():
                shutil.move(file, folder / file.name)
        if len(courses) < steps:
            note = f"{len(courses)} of {steps} shares of the text were used: training made the steps fewer"
            courses.append(Trained(notes=(note,)))
        return planned, courses

    def _trained(
        self,
        planned: Planned,
        method: RecoveryMethod,
        text: TrainingText,
        held_out: TrainingText,
        tokens: int,
        folder: Path,
    ) -> tuple[Planned, Trained]:
        """Train a plan's model on a text; return the plan of what came out, and what the method says of it."""
        if "blocks" in vars(self) and self.blocks.memory is not None:
            self.blocks.forget()  # what calibration left there: training takes memory of its own
        model: Any = build_model(planned.plan, self.checkpoint.mapped(), planned.attached)
        before = model.state_dict()
        recovered = method.recover(
            RecoveryRequest(
                model=model,
                plan=planned.plan,
                text=text,
                held_out=held_out,
                tokens=tokens,
                seed=self.seed,
                folder=folder,
                teacher=self.teacher,
                progress=self.progress.stage,
                say=self.progress.say,
                device=str(self.machine.torch_device),
                dtype=self.dtype_name,
            )
        )
        trained = planned_of(recovered.model, planned, before, self.checkpoint)
        return trained, Trained(recovered.curve, recovered.facts, recovered.notes)

    def _with_history(
        self, trained: Planned, method: RecoveryMethod, setting: Training, courses: Sequence[Trained]
    ) -> Planned:
        """Return a trained plan whose origin says how it was trained: once, or several times one behind the other."""
        curve, facts = together(courses)
        said = {
            "method": method.name,
            "options": options_json(method),
            "training": {**asdict(setting), "text": self.training_texts(setting)[2][:16]},
            "curve": curve,
            "facts": facts,
            "notes": [note for course in courses for note in course.notes],
        }
        origin = {"weights": self.checkpoint.sample_digest(), **trained.plan.origin}
        if "recovery" in origin:
            said["earlier"] = origin["recovery"]
        return replace(trained, plan=replace(trained.plan, origin={**origin, "recovery": said}))

    def teacher(self, ids: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
        """Return the original's residual stream (rows, tokens, hidden) behind some of its blocks; -1: in front of all.

        One sweep, in which each weight is read once, however many rows there are.
        """
        identity = self._original.plan
        found: dict[int, list[Tensor]] = {block: [] for block in blocks}
        batches = [Batch(part) for part in ids.split(max(1, BATCH_TOKENS // ids.shape[1]))]
        if -1 in found:
            found[-1] = [self.blocks.embed(batch.ids) for batch in batches]

        def noting(batch: int, position: int, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
            states = self.blocks.run(identity, position, {}, hidden, arguments)
            if position in found:
                found[position].append(states)
            return states

        if max(blocks) >= 0:
            shorter = Planned(replace(identity, blocks=identity.blocks[: max(blocks) + 1]))
            sweeper = Sweeper(self.blocks)
            for _ in sweeper.sweep([shorter], batches, hook=noting):
                pass
            sweeper.check_finite(identity)
            if sweeper.laid is not None and sweeper.laid.streamed:
                self.blocks.forget()  # the room is for what is trained on these states
        return {block: torch.cat(parts) for block, parts in found.items()}

    # -- models

    def model(self, plan: PruningPlan | Planned, dtype: str | None = None) -> nn.Module:
        """Return a plan's model in memory, a transformers model; unchanged weights are shared with the original."""
        planned = self.attach(plan) if isinstance(plan, PruningPlan) else plan
        stored = None if dtype is None else self.machine.dtype(dtype)
        return build_model(planned.plan, self.checkpoint, planned.attached, stored)

    def write(self, plan: PruningPlan | Planned, folder: Path | str) -> None:
        """Write a plan's model as a checkpoint folder."""
        planned = self.attach(plan) if isinstance(plan, PruningPlan) else plan
        write_checkpoint(planned.plan, self.checkpoint, planned.attached, Path(folder))

    def _plugin(self, kind: str, given: Any) -> Any:
        return self.plugins.get(kind, given) if isinstance(given, str) else given

    def _request(
        self, planned: Planned, budget: Budget, needs: Iterable[str], searching: bool = False
    ) -> PruningRequest:
        """Return what a metric and a strategy see of a plan's model. searching: those of further steps come after it."""
        needs = frozenset(needs)
        statistics = self.calibrator.statistics(planned, needs) if needs else Statistics({})
        self.calibrator.forget([PruningPlan.identity(self.checkpoint.shape), planned.plan], searching)
        return PruningRequest(
            shape=planned.plan.new_shape,
            plan=planned.plan,
            budget=budget,
            statistics=statistics,
            weights=PlanWeights(planned.plan, self.checkpoint, planned.attached),
            seed=self.seed,
            quality=partial(self._quality, planned, searching=searching),
            progress=self.progress.stage,
        )

    def _quality(
        self,
        current: Planned,
        plans: Sequence[PruningPlan],
        measure: str = "loss",
        tensors: Sequence[Mapping[str, Tensor]] | None = None,
        searching: bool = False,
    ) -> list[float]:
        """Return a number for each plan, lower is better; see ``PruningRequest``. current: whose tensors are known.

        searching: models like these will be tried in a further step (see ``Calibrator.losses``).
        A model that breaks down, with states that are not finite, is infinitely bad.
        """
        measures: dict[str, Callable[[list[Planned]], list[float]]] = {
            "loss": lambda found: self.calibrator.losses(found, self.progress.stage, searching),
            "turn": lambda found: self.calibrator.turns(found, self.progress.stage),
            "chrf": lambda found: self.trials.of("chrf", found, self._chrf),
        }
        if measure not in measures:
            raise FlexiError(unknown("quality measure", measure, measures))
        candidates = []
        for plan, new in zip(plans, tensors or [{}] * len(plans), strict=True):
            planned = _carried(plan, current)
            if new:
                attached = {**planned.attached, **new}
                planned = Planned(with_digests(plan, attached), attached)
            complete = set(needed_tensors(plan)) <= set(planned.attached)
            candidates.append(planned if complete else self.attach(plan))
        found = measures[measure](candidates) if candidates else []
        return [math.inf if math.isnan(value) else value for value in found]

    def _chrf(self, candidates: list[Planned]) -> list[float]:
        make = partial(self.model, dtype=self.dtype_name)
        with products(self.dtype, torch.device("cpu")):
            return chrf(candidates, make, self.texts[0], self.tokenizer, self.progress)

    def _scores(self, metric: ImportanceMetric, request: PruningRequest) -> Scores:
        return metric.score(request).check(f"metric {metric.name!r}", request.shape)


def _carried(plan: PruningPlan, before: Planned) -> Planned:
    """Return a plan with those of its tensors that an earlier plan has, known by their digests."""
    known = {digest: before.attached[name] for name, digest in before.plan.tensors}
    return Planned(plan, {name: known[digest] for name, digest in plan.tensors if digest in known})


def resident(checkpoint: Checkpoint, machine: Machine) -> Checkpoint:
    """Return the checkpoint with what it has read kept in the computer's memory, if that leaves half of it free."""
    room = machine.budget()[0] if machine.torch_device.type == "cpu" else int(free_memory() * FREE_SHARE)
    fits = 2 * checkpoint.bytes_of(checkpoint.tensor_names()) <= room
    return checkpoint.resident() if fits else checkpoint


def origin(metric: ImportanceMetric, strategy: ReplacementStrategy, ratio: float) -> dict[str, Any]:
    """Return what a plan says of how it was made."""
    return {
        "metric": metric.name,
        "metric_options": options_of(metric),
        "strategy": strategy.name,
        "strategy_options": options_of(strategy),
        "ratio": ratio,
    }


def count_only(shape: ModelShape, strategy: ReplacementStrategy, ratio: float) -> PruningPlan:
    """Return a plan of the right size from a shape alone: no weights, and units chosen without meaning."""
    plan = PruningPlan.identity(shape)
    budget = Budget(shape.parameters, ratio)
    if not own_knob(strategy):
        check_reach(strategy.name, budget, strategy.reach(shape))
    while True:
        current = plan.new_shape
        flat = Scores(
            block=torch.ones(len(current.blocks)),
            attention=tuple(torch.ones(b.kv_heads) for b in current.blocks),
            mlp=tuple(torch.ones(b.channels) for b in current.blocks),
            comparable=True,
        )
        step = strategy.plan(PruningRequest(shape=current, plan=plan, budget=budget, scores=flat))
        before, plan = plan, plan.compose(step)
        if not strategy.progressive or strategy.finished(plan, budget):
            return plan
        _check_progress(strategy, before, plan)


def _check_progress(strategy: ReplacementStrategy, before: PruningPlan, after: PruningPlan) -> None:
    """Raise if a step of a progressive strategy changed nothing: it would go on for ever."""
    if after == before:
        raise FlexiError(
            f"strategy {strategy.name!r}: a step at ratio {after.ratio:.4f} changed nothing, and it says it is not finished"
        )
