"""transformers' Trainer with our seams: the order of the text, the points of the loss curve, and what a checkpoint holds."""

from __future__ import annotations

import json
import math
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexi_plugins.files import write_tensor_file
from flexi_plugins.hookspecs import IGNORED, TrainingText
from flexi_plugins.recovery.copies import trainable
from flexi_plugins.recovery.monitor import Monitor, points
from flexi_plugins.recovery.options import rate

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

STATE = "trained.safetensors"  # the trained parameters, in a checkpoint


def trainer_for(model: nn.Module, monitor: Monitor, folder: Path) -> Any:
    """Return transformers' Trainer with our seams, and without its own bar, prints, reports and data-parallel threads."""
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    request, options, steps = monitor.request, monitor.options, monitor.steps
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
    listener = type("Listener", (_Listener, TrainerCallback), {"monitor": monitor})()
    trainer = type("RecoveryTrainer", (_Seams, Trainer), {"monitor": monitor})(
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
    monitor.sums = torch.zeros(2, dtype=torch.float64, device=arguments.device)
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

    monitor: Monitor
    reduce: Callable[[Tensor], Tensor]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock; what an earlier process trained is done."""
        self.monitor.begun = time.monotonic(), self.monitor.steps.tokens(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at one step; all processes see the same sums, so that they stop together."""
        monitor, step = self.monitor, state.global_step
        total, targets = self.reduce(monitor.sums).tolist()
        passed, every = monitor.steps.tokens(step), monitor.steps.tokens(monitor.steps.total)
        monitor.advance(
            passed - monitor.steps.tokens(step - 1),
            f"{passed:,} of {every:,} tokens, loss {total / max(1, targets):.4f}",
        )
        if step >= state.max_steps:
            control.should_evaluate = True
        if not math.isfinite(total):
            monitor.stop(control, step, "the training loss was not finite")


class _Seams:
    """A Trainer's parts that are ours; mixed into it where transformers is imported."""

    monitor: Monitor

    def get_train_dataloader(self: Any) -> Any:
        """Return the windows in their order."""
        from torch.utils.data import DataLoader

        return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=self.monitor.steps.micro))

    def create_scheduler(self: Any, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the learning rate follow ``rate``."""
        from torch.optim.lr_scheduler import LambdaLR

        monitor = self.monitor
        factor = partial(
            rate, schedule=monitor.options.schedule, warm_up=monitor.steps.warm_up, total=num_training_steps
        )
        self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
        return self.lr_scheduler

    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return a micro-batch's share of the step's loss, which is the mean over all targets on all devices."""
        import torch

        mean = self.monitor.loss(model, inputs)
        sums = _summed(mean, inputs)
        self.monitor.sums += sums
        share = sums[1] / torch.as_tensor(num_items_in_batch, device=sums.device).clamp(min=1)
        return mean * share.to(mean.dtype) * self.args.world_size

    def evaluate(self: Any, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Add a point to the curve, and judge it; a training that goes on has its first point already."""
        monitor, step = self.monitor, self.state.global_step
        before = points(self.state.log_history)
        known = before[-1]["held_out_loss"] if before and before[-1]["step"] == step else None
        held_out = self._held_out_loss() if known is None else known
        if known is None:
            self.log(monitor.point(step, self.accelerator.reduce(monitor.sums).tolist(), held_out))
            monitor.sums.zero_()
        metrics = {"eval_loss": held_out}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if known is None:
            monitor.judge(self.control, step, before, held_out)
        return metrics

    def _held_out_loss(self: Any) -> float:
        """Return the mean loss over the held-out targets; each process measures its part of the windows."""
        import torch

        args, text = self.args, self.eval_dataset
        rows = max(1, self.monitor.options.micro_batch_tokens // text[0]["input_ids"].numel())
        sums = torch.zeros_like(self.monitor.sums)
        self.model.eval()
        with torch.no_grad():
            for start in range(args.process_index * rows, len(text), args.world_size * rows):
                batch = {name: tensor.to(args.device) for name, tensor in text[start : start + rows].items()}
                sums += _summed(self.monitor.measure(self.model, batch), batch)
        total, targets = self.accelerator.reduce(sums).tolist()
        return total / targets

    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained parameters alone: all others can be had from the request."""
        if self.args.should_save:
            write_state(self.model, Path(output_dir or self.args.output_dir) / STATE)

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        read_state(self.model, Path(resume_from_checkpoint) / STATE)


# ------------------------------------------------------------------------------------------- on disk


def write_state(model: nn.Module, path: Path) -> None:
    """Write the parameters that are trained."""
    write_tensor_file(path, trainable(model))


def read_state(model: nn.Module, path: Path) -> None:
    """Set the parameters that are trained to what was written."""
    from safetensors.torch import load_file

    state, parameters = load_file(path), trainable(model)
    assert state.keys() == parameters.keys(), f"{path} holds other parameters than are trained"
    for name, parameter in parameters.items():
        parameter.data.copy_(state[name])


def last_checkpoint(folder: Path, processes: int = 1) -> tuple[str | None, int]:
    """Return the newest whole checkpoint and its step; what a kill left unfinished is deleted.

    Trainer's first process writes the file with the step and the curve last; others write their random state when they come
    to it.
    """
    found = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-[0-9]*")}
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)]
    for step in sorted(found, reverse=True):
        try:
            json.loads((found[step] / "trainer_state.json").read_text())
            whole = all(zipfile.is_zipfile(found[step] / state) for state in states)
        except (OSError, ValueError):
            whole = False
        if whole:
            return str(found[step]), step
        shutil.rmtree(found[step], ignore_errors=True)
    return None, 0


@contextmanager
def quiet() -> Iterator[None]:
    """Put the verbosity of transformers, which a Trainer sets, back afterwards."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    try:
        yield
    finally:
        logging.set_verbosity(before)
