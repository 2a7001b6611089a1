"""The training core of recovery methods: some parameters of a model, on given text, for a budget of tokens.

transformers' Trainer does the work: gradient accumulation, mixed precision, several processes (``torchrun ... -m
flexi_plugins.cli recover``, one a GPU), checkpoints and resuming. Ours are the arithmetic of the budget, the order of the
text, the loss curve, when to stop, and which state is kept. A method trains a copy and puts what came of it beside what
stays:

    model = working_copy(request.model, names, request.dtype)
    trained = train(request, model, options, "name")
    return trained.recovered(request, trainable(model))
"""

from __future__ import annotations

import gc
import hashlib
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from flexi_plugins.data import digest
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import IGNORED, RecoveryRequest
from flexi_plugins.recovery.copies import trainable
from flexi_plugins.recovery.monitor import Loss, Monitor, Trained
from flexi_plugins.recovery.options import Steps, TrainingOptions, unfit
from flexi_plugins.recovery.trainer import STATE, last_checkpoint, quiet, read_state, trainer_for, write_state

if TYPE_CHECKING:
    from torch import Tensor, nn

START = "start.safetensors"  # the trained parameters before the first step


def next_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy of the next token over the labels that are not ``IGNORED``, nats; 0 without any."""
    from torch.nn import functional as F

    from flexi_plugins.numerics import cross_entropy

    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    total = cross_entropy(logits.flatten(0, 1), labels.flatten(), IGNORED)
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
    import torch

    from flexi_plugins.precision import products

    _check(request, model, options, who)
    length = request.text.ids.shape[1]
    steps = Steps.of(request.tokens, length, options, int(os.environ.get("WORLD_SIZE", "1")))
    folder = request.folder / f"{who}-{_call(request, model, options, steps)}"
    multiplied = products(getattr(torch, request.dtype), torch.device(request.device))
    with seeded(request.seed, request.device), quiet(), multiplied:
        monitor = Monitor(request, options, who, steps, loss, measure)
        trainer = trainer_for(model, monitor, folder)
        if trainer.args.should_save and not (folder / START).is_file():
            write_state(model, folder / START)
        trainer.accelerator.wait_for_everyone()
        title = f"{who}: training {sum(p.numel() for p in trainable(model).values()):,} parameters"
        checkpoint, done = last_checkpoint(folder, steps.processes)
        with request.progress(title, steps.tokens(steps.total) - steps.tokens(done)) as monitor.advance:
            trainer.train(resume_from_checkpoint=checkpoint)
        kept = monitor.kept(trainer.state.log_history)
        if monitor.stopped or kept["step"] != trainer.state.global_step:
            read_state(model, folder / (f"checkpoint-{kept['step']}/{STATE}" if kept["step"] else START))
        trainer.accelerator.wait_for_everyone()
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):  # accelerate's, for mixed precision
        model.__dict__.pop(name, None)
    trained = monitor.trained(trainer.state, kept, model)
    del trainer
    gc.collect()  # a Trainer refers to itself, and would hold the moments while the next model is trained
    return trained


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
    problems += unfit(request.device, request.dtype)
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
