"""The training core of recovery methods: some parameters of a model, on given text, for a budget of tokens.

transformers' Trainer does the work: gradient accumulation, mixed precision, several processes (``torchrun ... -m
flexi_plugins.cli recover``, one a GPU), checkpoints and resuming. Ours are the arithmetic of the budget, the order of the
text, the loss curve, when to stop, and which state is kept. A method trains a copy and puts what came of it beside what
stays:

    model = working_copy(request.model, names, request.dtype)
    trained = train(request, model, options, "name")
    return trained.recovered(request.model, trainable(model))
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flexi_plugins.data import PruningPlan, digest
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import Recovered, RecoveryRequest, TrainingText

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

IGNORED = -100  # the label of a token that is no target
STATE = "trained.safetensors"  # the trained parameters, in a checkpoint
START = "start.safetensors"  # the same before the first step
NOISE = 1e-4  # nats: a loss that is lower than that cannot diverge from itself
DEVICES = ("cpu", "cuda", "cuda:0")

Schedule = Literal["cosine", "linear", "constant"]
"""How the learning rate goes on behind its rise (see ``rate``)."""
Loss = Callable[["nn.Module", Mapping[str, "Tensor"]], "Tensor"]
"""(model, batch) -> mean over the batch's targets, (); the batch has input_ids and labels, both (rows, tokens).

Only the model's ``forward`` runs in the compute dtype; what the loss makes of its outputs is computed as written.
"""


# ------------------------------------------------------------------------------------ how, and for how long


@dataclass(frozen=True)
class TrainingOptions:
    """How to train: options that all training methods have, as fields that they inherit.

    learning_rate: AdamW's, at its peak. warm_up: share of the steps in which it rises. batch_tokens: tokens of a step, on
    all devices together; papers' batches are made for budgets of 10^7 tokens and more, of small ones they leave a handful
    of steps. micro_batch_tokens: most tokens that pass a device at once; a step accumulates the gradients of several.
    gradient_clip: the largest norm of a gradient; 0: any. evaluate_every: tokens between two points of the curve, where
    the held-out loss is measured and a checkpoint written; None: a tenth of the budget. keep: the state with the lowest
    held-out loss, the start included, or the last one. divergence: training stops where the held-out loss is more than so
    many times its lowest value so far.
    """

    learning_rate: float = 1e-4
    schedule: Schedule = "cosine"
    warm_up: float = 0.0
    batch_tokens: int = 2048
    micro_batch_tokens: int = 2048
    gradient_clip: float = 1.0
    weight_decay: float = 0.0
    evaluate_every: int | None = None
    keep: Literal["best", "last"] = "best"
    divergence: float = 1.5

    name: ClassVar[str] = "training"

    @property
    def interleaved(self) -> bool:
        """Whether it trains behind every step of a progressive strategy (see ``RecoveryMethod``)."""
        return False

    def check(self) -> None:
        """Raise one FlexiError for all options that cannot work."""
        problems = list(self.problems())
        if problems:
            raise FlexiError(f"{self.name}: {'; '.join(problems)}")

    def refuses(self, plan: PruningPlan) -> str | None:
        """Return why there is nothing to train in a plan's model; None where there is."""
        return None

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with each option."""
        positive = ("learning_rate", "batch_tokens", "micro_batch_tokens")
        least = {**dict.fromkeys(positive, 0.0), "evaluate_every": 0.0, "divergence": 1.0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value > bound:
                yield f"{name} = {value}, expected more than {bound:g}"
        for name in ("gradient_clip", "weight_decay"):
            if not getattr(self, name) >= 0:
                yield f"{name} = {getattr(self, name)}, expected 0 or more"
        if not 0 <= self.warm_up < 1:
            yield f"warm_up = {self.warm_up}, expected a share of the steps, 0 <= warm_up < 1"


@dataclass(frozen=True)
class Steps:
    """A budget as steps. windows: of ``length`` tokens each, seen once. micro: windows that pass a device at once.

    A step is ``accumulation`` such micro-batches on each of ``processes`` devices; the last may be shorter. every: steps
    between two points of the curve. warm_up: steps in which the learning rate rises.
    """

    windows: int
    length: int
    micro: int
    accumulation: int
    processes: int
    every: int
    warm_up: int

    @classmethod
    def of(cls, tokens: int, length: int, options: TrainingOptions, processes: int) -> Steps:
        """Return the steps of a budget of tokens: as many whole windows as fit into it."""
        windows = tokens // length
        share = max(1, round(options.batch_tokens / (length * processes)))  # windows of a step on one device
        most = max(1, options.micro_batch_tokens // length)
        micro = max(n for n in range(1, min(share, most) + 1) if share % n == 0)
        step = share * processes * length
        every = max(1, round((options.evaluate_every or tokens / 10) / step))
        warm_up = int(options.warm_up * math.ceil(windows * length / step))
        return cls(windows, length, micro, share // micro, processes, every, warm_up)

    @property
    def total(self) -> int:
        """Number of steps."""
        return math.ceil(self.windows / (self.micro * self.accumulation * self.processes))

    def tokens(self, step: int) -> int:
        """Return the tokens that have passed after so many steps."""
        return min(step * self.micro * self.accumulation * self.processes, self.windows) * self.length


def rate(step: int, schedule: str, warm_up: int, total: int) -> float:
    """Return what the peak learning rate is multiplied with in a step, counted from 0.

    It rises as (step + 1) / (warm_up + 1), and falls to 0 behind the last step as half a cosine, or as a line.
    transformers' schedules begin at 0, which would be one lost step of a short training.
    """
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    done = min(1.0, (step - warm_up) / (total - warm_up))
    return {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[schedule]


# --------------------------------------------------------------------------------------- models and tensors


def working_copy(model: nn.Module, trained: Collection[str], dtype: str) -> nn.Module:
    """Return a copy of a model to train in a compute dtype: nothing that is done to it reaches the model.

    Parameters named in ``trained`` are cloned in float32 and require gradients. All others are frozen, in the compute
    dtype; those that have it already share the model's storage.
    """
    import torch

    compute = getattr(torch, dtype)

    def parameter(name: str, old: Tensor) -> Tensor:
        return old.to(torch.float32, copy=True) if name in trained else old.to(compute)

    return _copied(model, parameter, trained)


def replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a model with other parameters, in their stored dtype and device; all the rest is the same tensor.

    A parameter that its new value equals stays the same tensor too.
    """
    import torch

    def parameter(name: str, old: Tensor) -> Tensor:
        if name not in tensors:
            return old
        new = tensors[name].detach().to(old.device, old.dtype).contiguous()
        return old if torch.equal(new, old) else new

    return _copied(model, parameter)


def _copied(model: nn.Module, parameter: Callable[[str, Tensor], Tensor], trained: Collection[str] = ()) -> nn.Module:
    """Copy a model's modules around new parameters; tied ones stay tied, and buffers are the same tensors."""
    from torch import nn

    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for name, old in model.named_parameters():
        memo[id(old)] = nn.Parameter(parameter(name, old.detach()), requires_grad=name in trained)
    return deepcopy(model, memo)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that require gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def next_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy of the next token over the labels that are not ``IGNORED``, nats; 0 without any."""
    from torch.nn import functional as F

    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / labels.ne(IGNORED).sum().clamp(min=1)


@contextmanager
def seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """Seed the random numbers of Python, NumPy and torch; put their states back afterwards."""
    import numpy as np
    import torch

    python, array = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices, device_type="cuda"):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


# --------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Trained:
    """What a training says of itself (see ``Recovered``); the parameters were trained in place."""

    curve: tuple[Mapping[str, float], ...]
    facts: Mapping[str, float]
    notes: tuple[str, ...]

    def recovered(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Recovered:
        """Return what a method gives back: the request's model with these parameters in the place of its own."""
        return Recovered(replaced(model, tensors), self.curve, self.facts, self.notes)


def train(
    request: RecoveryRequest,
    model: nn.Module,
    options: TrainingOptions,
    who: str,
    loss: Loss = next_token_loss,
    measure: Loss = next_token_loss,
) -> Trained:
    """Train the parameters of ``model`` that require gradients, float32, in place, on the request's text in its order.

    loss is minimised: the mean over all targets of a step, however it is cut into micro-batches (each weighs as many
    targets as it has). measure gives the held-out loss. who: the method, for messages. Checkpoints are in a subfolder of
    the request's that a digest of the call names, so that those of other calls are not taken. Where the loss is not
    finite, or diverges, training stops and the last good state is restored, or the best one (``keep``); notes say so.
    """
    _check(request, model, options, who)
    length = request.text.ids.shape[1]
    steps = Steps.of(request.tokens, length, options, int(os.environ.get("WORLD_SIZE", "1")))
    folder = request.folder / f"{who}-{_call(request, model, options, steps)}"
    with seeded(request.seed, request.device), _quiet():
        run = _Run(request, options, who, steps, loss, measure)
        trainer = _trainer(model, run, folder)
        if trainer.args.should_save and not (folder / START).is_file():
            _write_state(model, folder / START)
        trainer.accelerator.wait_for_everyone()
        title = f"{who}: training {sum(p.numel() for p in trainable(model).values()):,} parameters"
        with request.progress(title, steps.tokens(steps.total)) as run.advance:
            trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
        kept = run.kept(trainer.state.log_history)
        if run.stopped or kept["step"] != trainer.state.global_step:
            _read_state(model, folder / (f"checkpoint-{kept['step']}/{STATE}" if kept["step"] else START))
        trainer.accelerator.wait_for_everyone()
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):  # accelerate's, for mixed precision
        model.__dict__.pop(name, None)
    return run.trained(trainer.state, kept, model)


def _check(request: RecoveryRequest, model: nn.Module, options: TrainingOptions, who: str) -> None:
    """Raise one FlexiError for all that is wrong with a call."""
    problems = list(options.problems())
    text, held_out, windows = request.text, request.held_out, 0
    for name, given in (("text", text), ("held-out text", held_out)):
        if given.ids.dim() != 2 or given.ids.shape != given.labels.shape:
            problems.append(
                f"{name}: ids {tuple(given.ids.shape)} and labels {tuple(given.labels.shape)}, expected (windows, tokens)"
            )
    if not problems:
        length = text.ids.shape[1]
        windows = request.tokens // max(1, length)
        if not 0 < windows <= len(text.ids):
            problems.append(
                f"a budget of {request.tokens:,} tokens is {windows:,} windows of {length}, and there are {len(text.ids):,}"
            )
    for name, labels in (("text", text.labels[:windows]), ("held-out text", held_out.labels)):
        if not problems and not bool(labels[:, 1:].ne(IGNORED).any()):
            problems.append(f"the {name} has no target: all its labels are {IGNORED}")
    if request.device not in DEVICES:
        problems.append(
            f"device {request.device!r}, expected one of {', '.join(DEVICES)}: CUDA_VISIBLE_DEVICES chooses another GPU"
        )
    if request.dtype == "float16" and request.device == "cpu":
        problems.append("float16 can be trained in on a GPU alone: take bfloat16 or float32")
    if not trainable(model):
        problems.append("no parameter of the model requires a gradient, so there is nothing to train")
    if problems:
        raise FlexiError(f"{who}: {'; '.join(problems)}")
    assert all(str(p.dtype) == "torch.float32" for p in trainable(model).values()), "see working_copy"


def _call(request: RecoveryRequest, model: nn.Module, options: TrainingOptions, steps: Steps) -> str:
    """Return a digest of what the course of a training depends on; of the weights, of a sample of each."""
    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        weights.update(f"{name} {tuple(parameter.shape)} {parameter.requires_grad}".encode())
        weights.update(flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes())
    texts = [(request.text.ids, request.text.labels), (request.held_out.ids, request.held_out.labels)]
    described = [type(options).__qualname__, asdict(options), asdict(steps), request.seed, request.dtype]
    read = [hashlib.sha256(t.cpu().contiguous().numpy().tobytes()).hexdigest() for pair in texts for t in pair]
    return digest([*described, request.plan.hash, *read, weights.hexdigest()])[:16]


class _Run:
    """What one training counts, says and stops for."""

    def __init__(
        self, request: RecoveryRequest, options: TrainingOptions, who: str, steps: Steps, loss: Loss, measure: Loss
    ) -> None:
        self.request, self.options, self.who, self.steps = request, options, who, steps
        self.loss, self.measure = loss, measure
        self.advance: Callable[..., None] = lambda tokens, note="": None
        self.sums: Any = 0.0  # (2,): summed loss, and targets, since the last point of the curve
        self.begun = (0.0, 0)  # clock, tokens
        self.stopped: tuple[int, str] | None = None  # step, reason

    def point(self, step: int, sums: Sequence[float], held_out: float) -> dict[str, float]:
        """Return a point of the curve, and say it."""
        tokens, total = self.steps.tokens(step), self.steps.tokens(self.steps.total)
        point: dict[str, float] = {"tokens": tokens}
        if sums[1]:
            point["loss"] = sums[0] / sums[1]
        point["held_out_loss"] = held_out
        clock, before = self.begun
        left = (time.monotonic() - clock) * (total - tokens) / (tokens - before) if tokens > before else None
        said = [f"{key.replace('_', ' ')} {value:.4f}" for key, value in point.items() if key != "tokens"]
        said += [] if left is None else [f"about {left:.0f} s left"]
        self.request.say(f"{self.who}: {tokens:,} of {total:,} tokens, {', '.join(said)}")
        return point

    def judge(self, control: Any, step: int, before: Sequence[Mapping[str, float]], held_out: float) -> None:
        """Stop a training whose held-out loss is not finite or far above its lowest value before."""
        lowest = min((point["held_out_loss"] for point in before), default=math.inf)
        if not before and not math.isfinite(held_out):
            raise FlexiError(
                f"{self.who}: the held-out loss is {held_out} before any training: the pruned model is broken; check its "
                "tensors, or compute in float32"
            )
        if before and not held_out <= self.options.divergence * max(lowest, NOISE):
            self.stop(control, step, f"the held-out loss went from {lowest:.4g} to {held_out:.4g}")

    def stop(self, control: Any, step: int, reason: str) -> None:
        """End the training behind this step, whose state is not to be kept."""
        self.stopped = step, reason
        control.should_training_stop = True
        control.should_evaluate = control.should_save = False

    def kept(self, history: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
        """Return the point whose state is kept: the best, or the last, of those before the training went wrong."""
        end = math.inf if self.stopped is None else self.stopped[0]
        good = [point for point in _points(history) if point["step"] < end]
        return min(good, key=lambda point: point["held_out_loss"]) if self.options.keep == "best" else good[-1]

    def trained(self, state: Any, kept: Mapping[str, float], model: nn.Module) -> Trained:
        """Return what there is to say at the end."""
        notes: list[str] = []
        tokens = self.steps.tokens(state.global_step)
        if self.stopped:
            notes.append(
                f"{self.who}: training was stopped after {tokens:,} of {self.steps.tokens(self.steps.total):,} tokens, where "
                f"{self.stopped[1]}; the state after {kept['tokens']:,} tokens is restored. Lower the learning rate"
            )
        elif not kept["step"]:
            notes.append(
                f"{self.who}: no state had a lower held-out loss than the start, {kept['held_out_loss']:.4f}, which is "
                "kept. Train on more tokens, or lower the learning rate"
            )
        for note in notes:
            self.request.say(note)
        keys = ("tokens", "loss", "held_out_loss")
        curve = tuple({k: point[k] for k in keys if k in point} for point in _points(state.log_history))
        facts = {
            "trained_parameters": sum(p.numel() for p in trainable(model).values()),
            "trained_tokens": tokens,
            "kept_tokens": kept["tokens"],
        }
        return Trained(curve, facts, tuple(notes))


def _points(history: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Return the finite points of the curve in what Trainer has logged, which its checkpoints hold."""
    return [h for h in history if math.isfinite(h.get("held_out_loss", math.nan)) and math.isfinite(h.get("loss", 0.0))]


# ------------------------------------------------------------------------------------- inside Trainer


def _trainer(model: nn.Module, run: _Run, folder: Path) -> Any:
    """Return transformers' Trainer with our seams, and without its own bar, prints, reports and data-parallel threads."""
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    request, options, steps = run.request, run.options, run.steps
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=steps.micro,
        gradient_accumulation_steps=steps.accumulation,
        learning_rate=options.learning_rate,
        optim="adamw_torch_fused",
        weight_decay=options.weight_decay,
        max_grad_norm=options.gradient_clip,
        average_tokens_across_devices=True,
        bf16=request.dtype == "bfloat16",
        fp16=request.dtype == "float16",
        use_cpu=request.device == "cpu",
        seed=request.seed % 2**32,
        eval_strategy="steps",
        eval_steps=steps.every,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=steps.every,
        save_total_limit=2,  # the last and the best
        metric_for_best_model="loss",
        greater_is_better=False,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        log_level="error",
        disable_tqdm=True,
        report_to="none",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs in one process would be nn.DataParallel
    listener = type("Listener", (_Listener, TrainerCallback), {"run": run})()
    trainer = type("RecoveryTrainer", (_Seams, Trainer), {"run": run})(
        model,
        arguments,
        train_dataset=_windows(
            request.text, steps.windows, steps.micro * steps.processes if steps.processes > 1 else 1
        ),
        eval_dataset=_windows(request.held_out),
        callbacks=[listener],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.model_accepts_loss_kwargs = True  # has Trainer count the targets of a step
    run.sums = torch.zeros(2, dtype=torch.float64, device=arguments.device)
    listener.reduce = trainer.accelerator.reduce
    return trainer


def _windows(text: TrainingText, count: int | None = None, multiple: int = 1) -> Dataset:
    """Return the first windows as a data set; the first token of a window is no target, since nothing predicts it.

    multiple: of how many windows their number is to be; what is missing are windows without a target, where several
    processes would else be given some twice.
    """
    import torch
    from torch.utils.data import StackDataset

    ids, labels = text.ids[:count].long(), text.labels[:count].long().clone()
    labels[:, 0] = IGNORED
    missing = -len(ids) % multiple
    ids = torch.cat([ids, ids[:1].expand(missing, -1)])
    labels = torch.cat([labels, torch.full_like(ids[:missing], IGNORED)])
    return StackDataset(input_ids=ids, labels=labels)  # type: ignore[arg-type]


def _summed(mean: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the sum over a batch's targets and their number, (2,) float64."""
    import torch

    targets = batch["labels"].ne(IGNORED).sum().double()
    return torch.stack((mean.detach().double() * targets, targets))


class _Listener:
    """A TrainerCallback's part that is ours: count tokens, measure at the end, stop where the loss is not finite."""

    run: _Run
    reduce: Callable[[Tensor], Tensor]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock; what an earlier process trained is done."""
        done = self.run.steps.tokens(state.global_step)
        self.run.begun = time.monotonic(), done
        if done:
            self.run.advance(done)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at one step; all processes see the same sums, so that they stop together."""
        run, step = self.run, state.global_step
        total, targets = self.reduce(run.sums).tolist()
        passed, every = run.steps.tokens(step), run.steps.tokens(run.steps.total)
        run.advance(
            passed - run.steps.tokens(step - 1), f"{passed:,} of {every:,} tokens, loss {total / max(1, targets):.4f}"
        )
        if step >= state.max_steps:
            control.should_evaluate = True
        if not math.isfinite(total):
            run.stop(control, step, "the training loss was not finite")


class _Seams:
    """A Trainer's parts that are ours; mixed into it where transformers is imported."""

    run: _Run

    def get_train_dataloader(self: Any) -> Any:
        """Return the windows in their order."""
        from torch.utils.data import DataLoader

        return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=self.run.steps.micro))

    def create_scheduler(self: Any, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the learning rate follow ``rate``."""
        from torch.optim.lr_scheduler import LambdaLR

        run = self.run
        factor = partial(rate, schedule=run.options.schedule, warm_up=run.steps.warm_up, total=num_training_steps)
        self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
        return self.lr_scheduler

    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return a micro-batch's share of the step's loss, which is the mean over all targets on all devices."""
        import torch

        mean = self.run.loss(model, inputs)
        sums = _summed(mean, inputs)
        self.run.sums += sums
        share = sums[1] / torch.as_tensor(num_items_in_batch, device=sums.device).clamp(min=1)
        return mean * share.to(mean.dtype) * self.args.world_size

    def evaluate(self: Any, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Add a point to the curve, and judge it; a training that goes on has its first point already."""
        run, step = self.run, self.state.global_step
        before = _points(self.state.log_history)
        known = before[-1]["held_out_loss"] if before and before[-1]["step"] == step else None
        held_out = self._held_out_loss() if known is None else known
        if known is None:
            self.log(run.point(step, self.accelerator.reduce(run.sums).tolist(), held_out))
            run.sums.zero_()
        metrics = {"eval_loss": held_out}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if known is None:
            run.judge(self.control, step, before, held_out)
        return metrics

    def _held_out_loss(self: Any) -> float:
        """Return the mean loss over the held-out targets; each process measures its part of the windows."""
        import torch

        args, text = self.args, self.eval_dataset
        rows = max(1, self.run.options.micro_batch_tokens // text[0]["input_ids"].numel())
        sums = torch.zeros_like(self.run.sums)
        self.model.eval()
        with torch.no_grad():
            for start in range(args.process_index * rows, len(text), args.world_size * rows):
                batch = {name: tensor.to(args.device) for name, tensor in text[start : start + rows].items()}
                sums += _summed(self.run.measure(self.model, batch), batch)
        total, targets = self.accelerator.reduce(sums).tolist()
        return total / targets

    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained parameters alone: all others can be had from the request."""
        if self.args.should_save:
            _write_state(self.model, Path(output_dir or self.args.output_dir) / STATE)

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        _read_state(self.model, Path(resume_from_checkpoint) / STATE)


# ------------------------------------------------------------------------------------------- on disk


def _write_state(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    save_file({name: tensor.detach().contiguous() for name, tensor in trainable(model).items()}, unfinished)
    os.replace(unfinished, path)


def _read_state(model: nn.Module, path: Path) -> None:
    from safetensors.torch import load_file

    state, parameters = load_file(path), trainable(model)
    assert state.keys() == parameters.keys(), f"{path} holds other parameters than are trained"
    for name, parameter in parameters.items():
        parameter.data.copy_(state[name])


def _last_checkpoint(folder: Path) -> str | None:
    """Return the newest whole checkpoint; what a kill left unfinished is deleted.

    Trainer writes the file with the step and the curve last.
    """
    found = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*")}
    for step in sorted(found, reverse=True):
        try:
            json.loads((found[step] / "trainer_state.json").read_text())
        except (OSError, ValueError):
            shutil.rmtree(found[step], ignore_errors=True)
        else:
            return str(found[step])
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Put the verbosity of transformers, which a Trainer sets, back afterwards."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    try:
        yield
    finally:
        logging.set_verbosity(before)
