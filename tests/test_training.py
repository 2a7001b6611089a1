"""The training core against plain torch: the steps, the text and the budget, resuming to the bit, stopping in time."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SIZES, attached_for, built, logits, opened, sharing, tiny, tokens
from torch import Tensor, nn

from flexi_plugins.data import PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import RecoveryRequest, TrainingText
from flexi_plugins.machine import Machine, take_own_gpu
from flexi_plugins.recovery.copies import replaced, trainable, working_copy
from flexi_plugins.recovery.monitor import Loss, Monitor, Trained
from flexi_plugins.recovery.options import Steps, TrainingOptions, rate, unfit
from flexi_plugins.recovery.training import next_token_loss, train

LENGTH = 12
STEP = 2 * LENGTH  # tokens
FAST = TrainingOptions(learning_rate=1e-3, schedule="constant", batch_tokens=STEP, evaluate_every=2 * STEP, keep="last")


class KilledError(Exception):
    """The end of a process, as far as a test can raise it."""


def text(windows: int = 16, seed: int = 0) -> TrainingText:
    """Windows that count upwards from random numbers, so that every next token can be learned."""
    starts = torch.randint(SIZES["vocab_size"], (windows, 1), generator=torch.Generator().manual_seed(seed))
    ids = (starts + torch.arange(LENGTH)) % SIZES["vocab_size"]
    return TrainingText(ids, ids.clone())


@contextmanager
def silent(title: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda count, note="": None


def killed_after(limit: int, kill: Callable[[], None]) -> Callable[..., Any]:
    """Return a progress that kills the training in the step in which so many tokens have passed."""

    @contextmanager
    def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
        passed = 0

        def advance(count: int, note: str = "") -> None:
            nonlocal passed
            passed += count
            if passed >= limit:
                kill()

        yield advance

    return progress


def die() -> None:
    raise KilledError


def no_teacher(ids: Tensor, blocks: Any) -> Mapping[int, Tensor]:
    raise AssertionError("nobody needs the teacher here")


def ask(folder: Path, model: nn.Module | None = None, **changes: Any) -> RecoveryRequest:
    """Return a request of eight steps of two windows; the model is its own plan unless one is given."""
    model = tiny() if model is None else model
    plan = changes.pop("plan", None) or PruningPlan.identity(opened(model).shape)
    asked = RecoveryRequest(
        model=model,
        plan=plan,
        text=text(),
        held_out=text(4, seed=9),
        tokens=16 * LENGTH,
        seed=0,
        folder=folder,
        teacher=no_teacher,
        progress=silent,
        say=lambda said: None,
    )
    return replace(asked, **changes)


def learn(
    request: RecoveryRequest,
    options: TrainingOptions = FAST,
    names: Collection[str] = (),
    loss: Loss = next_token_loss,
    measure: Loss = next_token_loss,
) -> tuple[dict[str, Tensor], Trained]:
    """Train a copy of the request's model (all of it, or the named parameters); return the parameters and what is said."""
    names = names or [name for name, _ in request.model.named_parameters()]
    model = working_copy(request.model, names, request.dtype)
    trained = train(request, model, options, "test", loss, measure)
    return snapshot(model), trained


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainable(model).items()}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Watched:
    """A loss that notes what it was asked: the ids of every batch, and the parameters in front of every step."""

    def __init__(self, loss: Loss = next_token_loss) -> None:
        self.loss = loss
        self.ids: list[Tensor] = []
        self.states: list[dict[str, Tensor]] = []

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        self.ids.append(batch["input_ids"])
        self.states.append(snapshot(model))
        return self.loss(model, batch)

    @property
    def tokens(self) -> int:
        return sum(ids.numel() for ids in self.ids)


def scripted(*values: float) -> Loss:
    """Return a measure that gives these values, one an evaluation."""
    left = iter(values)
    return lambda model, batch: torch.tensor(next(left))


class Weight(nn.Module):
    """A parameter whose gradient is 1 whatever it is asked, so that AdamW moves it by the learning rate."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.weight.sum()


def falling(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(batch["input_ids"])


# --------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_step_is_adamw_on_the_mean_over_all_targets_of_its_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro: int
) -> None:
    """However they are cut into micro-batches, and although their windows have different numbers of targets."""
    gradients, step = list[float](), torch.optim.AdamW.step

    def noting(self: torch.optim.AdamW, *given: Any) -> Any:  # AdamW itself does not depend on a gradient's scale
        own = [p.grad for group in self.param_groups for p in group["params"]]
        gradients.append(float(torch.nn.utils.get_total_norm(own)))
        return step(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    given = text(4)
    labels = given.ids.clone()
    for row, prompt in enumerate((0, 9, 4, 7)):
        labels[row, :prompt] = -100
    options = TrainingOptions(
        learning_rate=0.01,
        schedule="constant",
        batch_tokens=4 * LENGTH,
        micro_batch_tokens=micro * LENGTH,
        gradient_clip=0,
        weight_decay=0.1,
        keep="last",
    )
    found, trained = learn(ask(tmp_path, text=TrainingText(given.ids, labels), tokens=4 * LENGTH), options)
    reference = tiny().requires_grad_(True)
    loss = reference(input_ids=given.ids, labels=labels).loss
    loss.backward()
    assert trained.curve[-1]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    whole = [p.grad for p in reference.parameters() if p.grad is not None]
    assert gradients == pytest.approx([float(torch.nn.utils.get_total_norm(whole))], rel=1e-5)
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        before = parameter.detach()
        decayed = before * (1 - 0.01 * 0.1) if before.dim() > 1 else before  # norms have no decay
        expected = decayed - 0.01 * parameter.grad / (parameter.grad.abs() + 1e-8)
        off = (found[name] - expected).abs()
        assert float(off.max()) < 5e-4, name  # where a gradient almost vanishes
        assert float(off.mean()) < 1e-6, name


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_rises_and_falls_without_a_step_at_zero(tmp_path: Path, schedule: Any) -> None:
    by_hand = {
        "cosine": [1 / 3, 2 / 3, 1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873],
        "linear": [1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
        "constant": [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1],
    }[schedule]
    assert [rate(step, schedule, 2, 8) for step in range(8)] == pytest.approx(by_hand)
    model = Weight()
    options = replace(FAST, learning_rate=0.5, schedule=schedule, warm_up=0.25)
    train(ask(tmp_path), model, options, "test", falling, scripted(*[1.0] * 9))
    assert model.weight.tolist() == pytest.approx([-0.5 * sum(by_hand)] * 3, rel=1e-5)


def test_the_loss_is_that_of_transformers_on_the_response_alone() -> None:
    model, given = tiny(), text(3)
    labels = given.ids.clone()
    labels[:, :7] = -100
    expected = model(input_ids=given.ids, labels=labels).loss
    assert torch.allclose(next_token_loss(model, {"input_ids": given.ids, "labels": labels}), expected)
    nothing = torch.full_like(labels, -100)
    assert float(next_token_loss(model, {"input_ids": given.ids, "labels": nothing})) == 0


def test_windows_without_targets_count_as_tokens_and_weigh_nothing(tmp_path: Path) -> None:
    given = text(16)
    labels = given.ids.clone()
    labels[::2] = -100
    half = TrainingText(given.ids, labels)
    others = TrainingText(given.ids[1::2].repeat_interleave(2, 0), labels[1::2].repeat_interleave(2, 0))
    found, trained = learn(ask(tmp_path, text=half))
    expected, _ = learn(ask(tmp_path, text=others))
    assert trained.facts["trained_tokens"] == 16 * LENGTH
    assert all(float((found[name] - expected[name]).abs().mean()) < 1e-5 for name in found)


# ------------------------------------------------------------------------------------------ budget, text


def test_the_budget_is_spent_once_in_the_order_of_the_text(tmp_path: Path) -> None:
    """Whole windows alone, the last step shorter; what is measured on held-out text is not part of it."""
    watched, advanced, said = Watched(), [], []

    @contextmanager
    def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
        assert total == 7 * LENGTH
        yield lambda count, note: advanced.append((count, note))

    request = ask(tmp_path, tokens=7 * LENGTH + 5, progress=progress, say=said.append)
    _, trained = learn(request, loss=watched)
    assert torch.equal(torch.cat(watched.ids), request.text.ids[:7])
    assert trained.facts["trained_tokens"] == sum(count for count, _ in advanced) == 7 * LENGTH
    assert advanced[-1][1].startswith("84 of 84 tokens, loss ")
    assert [point["tokens"] for point in trained.curve] == [0, 2 * STEP, 7 * LENGTH]
    assert "loss" not in trained.curve[0]
    assert "84 of 84 tokens, loss " in said[-1]
    assert "held out loss" in said[-1]
    assert "s left" in said[-1]


def test_the_time_that_is_left_is_that_of_the_tokens_since_this_process_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that was taken up after 2 of 8 steps has done 3 more in 6 seconds: 6 s for the 3 that are left."""
    said: list[str] = []
    request = ask(tmp_path, say=said.append)
    monitor = Monitor(request, FAST, "test", Steps.of(16 * LENGTH, LENGTH, FAST, 1), next_token_loss, next_token_loss)
    monitor.begun = 100.0, 2 * STEP
    monkeypatch.setattr("flexi_plugins.recovery.monitor.time.monotonic", lambda: 106.0)
    monitor.point(2, (0.0, 0.0), 3.0)
    monitor.point(5, (40.0, 20.0), 2.5)
    assert said == [
        "test: 48 of 192 tokens, held out loss 3.0000",
        "test: 120 of 192 tokens, loss 2.0000, held out loss 2.5000, about 6 s left",
    ]


@pytest.mark.parametrize(
    ("options", "processes", "expected"),
    [
        ({"batch_tokens": 64}, 1, Steps(100, 16, 4, 1, 1, 3, 0)),
        ({"batch_tokens": 64, "micro_batch_tokens": 32}, 1, Steps(100, 16, 2, 2, 1, 3, 0)),
        ({"batch_tokens": 96, "micro_batch_tokens": 64}, 1, Steps(100, 16, 3, 2, 1, 2, 0)),
        ({"batch_tokens": 64}, 2, Steps(100, 16, 2, 1, 2, 3, 0)),
        ({"batch_tokens": 1, "evaluate_every": 160, "warm_up": 0.1}, 1, Steps(100, 16, 1, 1, 1, 10, 10)),
    ],
)
def test_steps_are_counted_by_hand(options: dict[str, Any], processes: int, expected: Steps) -> None:
    found = Steps.of(1609, 16, TrainingOptions(**options), processes)
    assert found == expected
    per_step = expected.micro * expected.accumulation * processes
    assert found.total == -(-100 // per_step)
    assert found.tokens(1) == per_step * 16
    assert found.tokens(found.total) == 1600


def test_a_step_of_other_tokens_than_asked_for_is_noted(tmp_path: Path) -> None:
    _, trained = learn(ask(tmp_path / "exact"), FAST)
    assert trained.facts["batch_tokens"] == STEP
    assert trained.notes == ()
    _, trained = learn(ask(tmp_path / "more"), replace(FAST, batch_tokens=5))
    assert trained.facts["batch_tokens"] == LENGTH
    (note,) = trained.notes
    assert note.startswith("test: a step is of 12 tokens in the place of 5, windows of 12 being whole on each of 1 ")


def test_a_process_of_several_has_a_gpu_and_a_share_of_the_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    alone = Machine("cpu").budget()[0]
    take_own_gpu()
    assert taken == [], "without torchrun"
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    take_own_gpu("cpu")
    assert taken == []
    take_own_gpu()
    assert taken == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        FlexiError, match=r"process 2 of this machine has no GPU of its own, there are 2; start as many"
    ):
        take_own_gpu("cuda")
    assert list(unfit("cuda", "bfloat16")) == []
    assert "expected 'cuda', of which each has its own" in next(unfit("cuda:0", "bfloat16"))
    assert Machine("cpu").budget()[0] < alone / 2


def test_the_curve_holds_means_over_the_tokens_since_the_last_point(tmp_path: Path) -> None:
    watched, seen = Watched(), []

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        value = next_token_loss(model, batch)
        seen.append(float(value.detach()))
        return value

    watched.loss = loss
    request = ask(tmp_path)
    found, trained = learn(request, loss=watched)
    means = [sum(seen[k : k + 2]) / 2 for k in range(0, 8, 2)]
    assert [point["loss"] for point in trained.curve[1:]] == pytest.approx(means, rel=1e-5)
    model = replaced(request.model, found)
    held_out = model(input_ids=request.held_out.ids, labels=request.held_out.labels).loss
    assert trained.curve[-1]["held_out_loss"] == pytest.approx(float(held_out.detach()), rel=1e-5)
    assert trained.curve[-1]["held_out_loss"] < trained.curve[0]["held_out_loss"]


# -------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_killed_training_goes_on_as_if_nothing_had_happened(tmp_path: Path, keep: Any) -> None:
    """With the same dropout, optimiser, learning rate, text and curve, to the bit."""
    model, options = tiny(attention_dropout=0.3), replace(FAST, keep=keep, schedule="cosine", warm_up=0.25)
    whole, expected = learn(ask(tmp_path / "whole", model), options)
    with pytest.raises(KilledError):
        learn(ask(tmp_path / "killed", model, progress=killed_after(5 * STEP, die)), options)
    watched = Watched()
    resumed, trained = learn(ask(tmp_path / "killed", model), options, loss=watched)
    assert watched.tokens == 4 * STEP  # the checkpoint was made after four steps
    assert trained == expected
    assert equal(resumed, whole)
    again, finished = learn(ask(tmp_path / "killed", model), options, loss=watched)
    assert watched.tokens == 4 * STEP
    assert finished.curve == expected.curve
    assert equal(again, whole)


def test_the_bar_of_a_training_that_is_taken_up_is_that_of_the_rest(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        learn(ask(tmp_path, progress=killed_after(5 * STEP, die)))
    totals, passed = [], []

    @contextmanager
    def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
        totals.append(total)
        yield lambda count, note="": passed.append(count)

    learn(ask(tmp_path, progress=progress))
    assert totals == [sum(passed)] == [4 * STEP]


@pytest.mark.parametrize("unfinished", ["trainer_state.json", "rng_state.pth"])
def test_a_checkpoint_that_a_kill_left_unfinished_is_not_used(tmp_path: Path, unfinished: str) -> None:
    whole, _ = learn(ask(tmp_path / "whole"))
    with pytest.raises(KilledError):
        learn(ask(tmp_path / "killed", progress=killed_after(5 * STEP, die)))
    [state] = tmp_path.glob(f"killed/*/checkpoint-4/{unfinished}")
    state.write_bytes(state.read_bytes()[:100])
    watched = Watched()
    resumed, _ = learn(ask(tmp_path / "killed"), loss=watched)
    assert watched.tokens == 6 * STEP
    assert equal(resumed, whole)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"learning_rate": 2e-3}),
        ({"seed": 1}, {}),
        ({"tokens": 14 * LENGTH}, {}),
        ({"text": text(16, seed=3)}, {}),
        ({"held_out": text(4, seed=3)}, {}),
        ({"model": tiny(seed=1)}, {}),
        ({"plan": PruningPlan.keep(opened(tiny()).shape, [0, 1])}, {}),
        ({"dtype": "bfloat16"}, {}),
    ],
    ids=["option", "seed", "tokens", "text", "held-out", "model", "plan", "dtype"],
)
def test_the_checkpoint_of_another_call_is_not_taken(tmp_path: Path, changes: Any, options: Any) -> None:
    with pytest.raises(KilledError):
        learn(ask(tmp_path, progress=killed_after(5 * STEP, die)))
    watched, request = Watched(), ask(tmp_path, **changes)
    learn(request, replace(FAST, **options), loss=watched)
    assert watched.tokens == request.tokens
    rest = Watched()
    learn(ask(tmp_path), loss=rest)
    assert rest.tokens == 4 * STEP  # and it is still there for its own


# --------------------------------------------------------------------------------------- stopping, keeping


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_training_and_the_last_good_state_is_restored(
    tmp_path: Path, value: float
) -> None:
    watched = Watched()
    watched.loss = lambda model, batch: next_token_loss(model, batch) * (value if len(watched.ids) == 6 else 1)
    found, trained = learn(ask(tmp_path), loss=watched)
    assert len(watched.ids) == 6
    assert equal(found, watched.states[4])  # after four steps there was a checkpoint
    assert trained.curve[-1]["tokens"] == trained.facts["kept_tokens"] == 4 * STEP
    [note] = trained.notes
    assert "stopped after 144 of 192 tokens" in note
    assert "not finite" in note
    assert "the state after 96 tokens is restored" in note


def test_a_training_that_breaks_in_its_first_step_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    request = ask(tmp_path)
    found, trained = learn(request, loss=lambda model, batch: next_token_loss(model, batch) * float("nan"))
    assert equal(found, dict(request.model.named_parameters()))
    assert trained.facts["kept_tokens"] == 0


@pytest.mark.parametrize("last", [3.0, float("nan")])
def test_a_held_out_loss_that_shoots_up_stops_the_training(tmp_path: Path, last: float) -> None:
    watched = Watched()
    found, trained = learn(ask(tmp_path), loss=watched, measure=scripted(2.5, 2.0, 1.9, last))
    assert len(watched.ids) == 6
    assert equal(found, watched.states[4])
    assert f"the held-out loss went from 1.9 to {last:.4g}" in trained.notes[0]


def test_a_training_that_really_diverges_is_stopped(tmp_path: Path) -> None:
    request = ask(tmp_path)
    found, trained = learn(request, replace(FAST, learning_rate=3.0, keep="best"))
    assert equal(found, dict(request.model.named_parameters()))
    assert trained.facts["trained_tokens"] < request.tokens
    assert trained.notes


@pytest.mark.parametrize(("keep", "steps"), [("best", 2), ("last", 8)])
def test_the_best_state_on_held_out_text_is_kept_or_the_last(tmp_path: Path, keep: Any, steps: int) -> None:
    watched = Watched()
    measure = scripted(3.0, 2.0, 2.4, 2.3, 2.2)
    found, trained = learn(ask(tmp_path), replace(FAST, keep=keep), loss=watched, measure=measure)
    final, _ = learn(ask(tmp_path / "again"))
    assert equal(found, watched.states[steps] if steps < 8 else final)
    assert trained.facts["kept_tokens"] == steps * STEP
    assert not trained.notes


def test_the_start_is_kept_where_training_only_made_it_worse(tmp_path: Path) -> None:
    request = ask(tmp_path)
    found, trained = learn(request, replace(FAST, keep="best"), measure=scripted(2.0, 2.1, 2.2, 2.3, 2.4))
    model = trained.recovered(request, found).model
    assert [p.data_ptr() for p in model.parameters()] == [p.data_ptr() for p in request.model.parameters()]
    assert "no state had a lower held-out loss than the start, 2.0000" in trained.notes[0]


# ------------------------------------------------------------------------------------ copies, kinds of numbers


def test_what_is_not_trained_is_the_same_tensor_and_the_original_stays_as_it_is(tmp_path: Path) -> None:
    model = tiny("llama-tied")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters() if ".layers.1." in name]
    request = ask(tmp_path, model)
    found, trained = learn(request, names=names)
    assert found.keys() == set(names)
    recovered = trained.recovered(request, found).model
    after = recovered.state_dict()
    moved = [name for name, tensor in model.state_dict().items() if after[name].data_ptr() != tensor.data_ptr()]
    assert sorted(moved) == sorted(names)
    assert equal(model.state_dict(), before)
    buffers = zip(model.buffers(), recovered.buffers(), strict=True)
    assert all(one.data_ptr() == other.data_ptr() for one, other in buffers)
    assert recovered.lm_head.weight is recovered.model.embed_tokens.weight


def test_a_copy_shares_weights_among_its_own_blocks() -> None:
    model = tiny()
    plan, attached = attached_for(sharing(opened(model).shape, {3: 1}))
    shared = built(plan, model, attached)
    copy = working_copy(shared, [name for name, _ in shared.named_parameters()], "float32")
    assert copy.model.layers[3].mlp.up_proj.donor is copy.model.layers[1].mlp.up_proj
    assert torch.equal(logits(copy, tokens()), logits(shared, tokens()))
    with torch.no_grad():
        copy.model.layers[1].mlp.up_proj.weight.zero_()
    assert not torch.equal(logits(copy, tokens()), logits(shared, tokens()))


def test_bfloat16_weights_are_trained_in_float32_and_stored_in_bfloat16(tmp_path: Path) -> None:
    """Steps of 1e-4 are a tenth of what bfloat16 can tell from a weight of 0.2; without master copies all were lost."""
    model = tiny().to(torch.bfloat16)
    request = ask(tmp_path, model, text=text(64), tokens=64 * LENGTH, dtype="bfloat16")
    frozen = working_copy(model, ["model.norm.weight"], "bfloat16")
    assert frozen.model.norm.weight.dtype == torch.float32
    assert frozen.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    found, trained = learn(request, replace(FAST, learning_rate=1e-4))
    recovered = trained.recovered(request, found).model
    assert {parameter.dtype for parameter in recovered.parameters()} == {torch.bfloat16}
    assert trained.curve[-1]["held_out_loss"] < trained.curve[0]["held_out_loss"]
    old, new = model.lm_head.weight, recovered.lm_head.weight
    large = old.abs() > 0.125
    assert float((old != new)[large].float().mean()) > 0.02


def test_a_float32_model_can_be_trained_in_bfloat16(tmp_path: Path) -> None:
    request = ask(tmp_path, dtype="bfloat16")
    frozen = [name for name, _ in request.model.named_parameters() if "mlp" not in name]
    found, trained = learn(request, names=[n for n, _ in request.model.named_parameters() if n not in frozen])
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    recovered = trained.recovered(request, found).model
    assert {parameter.dtype for parameter in recovered.parameters()} == {torch.float32}
    assert trained.curve[-1]["held_out_loss"] < trained.curve[0]["held_out_loss"]


# ------------------------------------------------------------------------------------------- surroundings


def test_equal_seeds_give_equal_models_whatever_the_random_state_was(tmp_path: Path) -> None:
    model, found = tiny(attention_dropout=0.3), []
    for run, (state, seed) in enumerate([(1, 0), (2, 0), (1, 5)]):
        torch.manual_seed(state)
        found.append(learn(ask(tmp_path / str(run), model, seed=seed))[0])
    assert equal(found[0], found[1])
    assert not equal(found[0], found[2])


def test_training_leaves_nothing_behind_but_its_folder(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    """No file where it runs, no line on the terminal, no random number taken, no verbosity or model changed."""
    import random

    import numpy as np
    from transformers.utils import logging

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    request = ask(tmp_path / "folder", dtype="bfloat16")
    model = working_copy(request.model, ["lm_head.weight"], "bfloat16")
    attributes, verbosity = set(model.__dict__), logging.get_verbosity()
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    train(request, model, FAST, "test")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]
    assert logging.get_verbosity() == verbosity
    assert set(model.__dict__) == attributes
    assert not os.listdir()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"tokens": LENGTH - 1}, {}, r"a budget of 11 tokens is 0 windows of 12, and there are 16"),
        ({"tokens": 17 * LENGTH}, {}, r"17 windows of 12, and there are 16"),
        ({"text": TrainingText(text().ids, torch.full((16, LENGTH), -100))}, {}, r"the text has no target"),
        (
            {"held_out": TrainingText(text(2).ids, text(3).labels)},
            {},
            r"held-out text: ids \(2, 12\) and labels \(3, 12\)",
        ),
        ({"device": "cuda:7"}, {}, r"device 'cuda:7', expected one of cpu, cuda, cuda:0"),
        ({"dtype": "float16"}, {}, r"float16 can be trained in on a GPU alone"),
        ({}, {"learning_rate": 0.0, "warm_up": 1.0}, r"learning_rate = 0.0, expected more than 0; warm_up = 1.0"),
        ({}, {"divergence": 1.0, "evaluate_every": 0}, r"evaluate_every = 0, expected more than 0; divergence = 1.0"),
        ({}, {"gradient_clip": -1.0}, r"gradient_clip = -1.0, expected 0 or more"),
    ],
)
def test_what_cannot_be_trained_is_said_beforehand(tmp_path: Path, changes: Any, options: Any, message: str) -> None:
    with pytest.raises(FlexiError, match=f"test: .*{message}"):
        learn(ask(tmp_path, **changes), replace(FAST, **options), names=["lm_head.weight"])
    assert not list(tmp_path.iterdir())


def test_a_model_without_trained_parameters_or_that_is_broken_is_an_error(tmp_path: Path) -> None:
    request = ask(tmp_path)
    with pytest.raises(FlexiError, match=r"test: no parameter of the model requires a gradient"):
        train(request, working_copy(request.model, [], "float32"), FAST, "test")
    with pytest.raises(FlexiError, match=r"test: the held-out loss is nan before any training"):
        learn(request, measure=scripted(float("nan")))
