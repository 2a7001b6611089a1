"""Distillation: correspondences and losses by hand, and trainings that are the same in plain torch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import attached_for, built, change, opened, random_plan, tiny, tokens
from torch import Tensor, nn

from flexi_plugins.data import BlockRecipe, ModelShape, Part, PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import Recovered, RecoveryRequest, TrainingText
from flexi_plugins.progress import Progress
from flexi_plugins.recovery import distill
from flexi_plugins.recovery.blockwise import summed
from flexi_plugins.recovery.correspondence import Run, correspondences
from flexi_plugins.recovery.course import course_of
from flexi_plugins.recovery.distill import Distill, token_losses
from flexi_plugins.recovery.monitor import Trained

WINDOWS, LENGTH = 8, 12
STEPS = 4
IDS, HELD_OUT = tokens(WINDOWS, LENGTH, seed=1), tokens(2, LENGTH, seed=2)
RATE = 3e-3
FAST = Distill(learning_rate=RATE, batch_tokens=2 * LENGTH, keep="last", divergence=1e9)  # four steps of two windows
KINDS = ("llama", "llama-biases", "mistral", "qwen2-mixed", "qwen3")
TINY_MEMORY = 1e-9  # GiB: every block by itself


def whole(*sources: int) -> list[BlockRecipe]:
    return [BlockRecipe(parts=(Part(source),)) for source in sources]


def plan_of(shape: ModelShape, name: str) -> PruningPlan:
    """Return a plan for the model of five blocks."""
    halves = Part(1, (0, 1), tuple(range(12))), Part(3, (2, 3), tuple(range(12, 24)))
    first, second, third, last = whole(0, 1, 3, 4)
    recipes = {
        "removed": [first, second, third],
        "front": [third, last],
        "concatenated": [first, BlockRecipe(parts=halves, norms=((1, 0.5), (3, 0.5))), last],
        "mixed": [first, BlockRecipe(mix=((1, 0.25), (3, 0.75))), last],
        "norms alone": [first, BlockRecipe(parts=(Part(3),), norms=((1, 1.0),)), last],
        "narrow": [first, BlockRecipe(parts=(Part(1, (0, 2), tuple(range(8))),)), third],
        "gains": [replace(first, gain=0.8), replace(second, gain=1.25), replace(third, gain=1.5)],
    }
    return PruningPlan(shape, tuple(recipes[name]))


SPANS = {  # position -> the original blocks behind which its input and its target are
    "removed": {1: (0, 2), 2: (2, 4)},
    "front": {0: (-1, 3)},
    "concatenated": {1: (0, 3)},
    "mixed": {1: (0, 3)},
    "norms alone": {1: (0, 3)},
    "narrow": {1: (0, 2), 2: (2, 4)},
    "gains": {1: (0, 2), 2: (2, 4)},
}


Teacher = Callable[[Tensor, Sequence[int]], Mapping[int, Tensor]]


def teacher_of(dense: Any) -> Teacher:
    """Return what tells the states of a model that transformers runs."""

    def teacher(ids: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
        seen: dict[int, Tensor] = {}

        def note(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
                seen.setdefault(index - 1, arguments[0])
                seen[index] = output

            return hook

        handles = [layer.register_forward_hook(note(i)) for i, layer in enumerate(dense.model.layers)]
        with torch.no_grad():
            dense(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
        return {block: seen[block] for block in blocks}

    return teacher


def request_of(
    dense: nn.Module, plan: PruningPlan, folder: Path, attached: Mapping[str, Tensor] | None = None, **changes: Any
) -> RecoveryRequest:
    values: dict[str, Any] = {
        "model": built(plan, dense, attached),
        "plan": plan,
        "text": TrainingText(IDS, IDS.clone()),
        "held_out": TrainingText(HELD_OUT, HELD_OUT.clone()),
        "tokens": WINDOWS * LENGTH,
        "seed": 0,
        "folder": folder,
        "teacher": teacher_of(dense),
        "progress": Progress(quiet=True).stage,
        "say": lambda text: None,
    }
    return RecoveryRequest(**{**values, **changes})


def by_name(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def changed(found: nn.Module, before: nn.Module) -> set[str]:
    """Return the names of the parameters that are other tensors than before."""
    old = by_name(before)
    return {name for name, tensor in by_name(found).items() if tensor.data_ptr() != old[name].data_ptr()}


def names_of(model: nn.Module, positions: Iterable[int]) -> set[str]:
    starts = tuple(f"model.layers.{position}." for position in positions)
    return {name for name in by_name(model) if name.startswith(starts)}


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(tensor, by_name(other)[name]) for name, tensor in by_name(one).items())


def learnt_alike(one: nn.Module, other: nn.Module, start: nn.Module, tolerance: float = 1e-2) -> bool:
    """Whether two trained models went the same way: AdamW makes a whole step of a gradient that is only rounding errors."""
    begun, others = by_name(start), by_name(other)
    return all(
        float((tensor - others[name]).norm()) <= tolerance * float((others[name] - begun[name]).norm())
        for name, tensor in by_name(one).items()
    )


# ------------------------------------------------------------------------------------ plain torch


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 KL(teacher || student) of each token."""
    p, q = ((x / temperature).softmax(-1) for x in (teacher, student))
    return temperature**2 * (p * (p.log() - q.log())).sum(-1)


def squares(student: Tensor, teacher: Tensor) -> Tensor:
    return ((student - teacher) ** 2).mean(-1)


def mean_over_targets(losses: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over the tokens behind which a target stands."""
    kept = [losses[r, t] for r in range(len(labels)) for t in range(labels.shape[1] - 1) if labels[r, t + 1] != -100]
    return torch.stack(kept).mean()


def output_of(model: Any, position: int, ids: Tensor, entering: Tensor) -> Tensor:
    """Return what a block of a model gives, where transformers runs the model and other states enter the block."""
    found = []

    def enter(module: nn.Module, arguments: Any) -> Any:
        return (entering, *arguments[1:])

    layer = model.model.layers[position]
    handles = [
        layer.register_forward_pre_hook(enter, prepend=True),
        layer.register_forward_hook(lambda module, arguments, output: found.append(output)),
    ]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found[0]


def block_loss(
    model: nn.Module, plan: PruningPlan, position: int, span: tuple[int, int], teacher: Teacher, text: TrainingText
) -> Tensor:
    """Return the KL loss of a block that the original's state enters."""
    before, after = span
    states = teacher(text.ids, span)
    gains = [recipe.gain for recipe in plan.blocks] + [1.0]
    entering = states[before] if position == 0 else states[before] / gains[position]
    output = output_of(model, position, text.ids, entering) * gains[position + 1]
    return mean_over_targets(divergence(output, states[after]), text.labels)


def steps_in_torch(parameters: Sequence[nn.Parameter], loss: Callable[[Tensor], Tensor]) -> None:
    """Train on the windows in their order, two a step, with AdamW and half a cosine."""
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    for step, ids in enumerate(IDS.chunk(STEPS)):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 + math.cos(math.pi * step / STEPS)) / 2
        optimizer.zero_grad()
        loss(ids).backward()
        optimizer.step()


def trained_in_torch(
    dense: nn.Module, plan: PruningPlan, spans: Mapping[int, tuple[int, int]], attached: Any = None
) -> nn.Module:
    """Train each block alone on the original's states."""
    model: Any = deepcopy(built(plan, dense, attached))
    teacher = teacher_of(dense)
    for position, span in spans.items():
        parameters = [p.requires_grad_(True) for p in model.model.layers[position].parameters()]
        steps_in_torch(
            parameters,
            lambda ids, p=position, s=span: block_loss(model, plan, p, s, teacher, TrainingText(ids, ids)),
        )
    return model


# -------------------------------------------------------------------------------- correspondences


@pytest.mark.parametrize("name", SPANS)
def test_a_block_stands_for_what_went_into_it_and_for_what_is_gone_behind_it(name):
    plan = plan_of(opened(tiny()).shape, name)
    merged = {run.position: (run.before, run.last) for run in correspondences(plan) if run.merged}
    assert merged == SPANS[name]


def test_the_runs_of_come_are_its_merge_info():
    """[0, [1, 2], 3, [4, 5], 6] of seven blocks."""
    shape = opened(tiny(num_hidden_layers=7)).shape
    first, second = (tuple(range(12)), (0, 1)), (tuple(range(12, 24)), (2, 3))

    def pair(i: int) -> BlockRecipe:
        parts = Part(i, first[1], first[0]), Part(i + 1, second[1], second[0])
        return BlockRecipe(parts=parts, norms=((i, 0.5), (i + 1, 0.5)))

    zero, three, six = whole(0, 3, 6)
    plan = PruningPlan(shape, (zero, pair(1), three, pair(4), six))
    assert correspondences(plan) == (Run(0, 0, 0), Run(1, 1, 2), Run(2, 3, 3), Run(3, 4, 5), Run(4, 6, 6))


def test_the_runs_of_any_plan_are_all_original_blocks_once_each():
    shape = opened(tiny(num_hidden_layers=7)).shape
    rng = random.Random(0)
    for _ in range(50):
        plan = random_plan(shape, rng, closed=False)
        runs = correspondences(plan)
        assert [run.position for run in runs] == list(range(len(plan.blocks)))
        assert [b for run in runs for b in range(run.first, run.last + 1)] == list(range(7))


def test_repeated_blocks_stand_for_no_run():
    shape = opened(tiny()).shape
    plan = PruningPlan(shape, tuple(whole(0, 1, 2, 1, 2, 3, 4)))
    with pytest.raises(FlexiError, match=r"block 3 begins with original block 1 behind one that begins with 2"):
        correspondences(plan)


# ----------------------------------------------------------------------------------------- losses


def test_the_divergence_is_that_of_two_known_distributions():
    teacher = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]])  # (1/4, 3/4), (1/2, 1/2)
    student = torch.tensor([[2.0, 2.0], [0.0, math.log(3.0)]])  # (1/2, 1/2), (1/4, 3/4)
    expected = [
        0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5),
        0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75),
    ]
    assert token_losses("kl", student, teacher, 1.0).tolist() == pytest.approx(expected, rel=1e-5)
    hotter = token_losses("kl", 2 * student, 2 * teacher, 2.0)
    assert hotter.tolist() == pytest.approx([4 * e for e in expected], rel=1e-5)


def test_the_squared_error_is_a_mean_over_channels():
    student, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 4.0], [1.0, 1.0]])
    assert token_losses("mse", student, teacher, 1.0).tolist() == [2.0, 1.0]


@pytest.mark.parametrize("name", SPANS)
def test_the_loss_before_any_training_is_the_divergence_by_hand(name, tmp_path):
    """On the targets alone: half of the held-out tokens are none."""
    dense = tiny("llama")
    plan = plan_of(opened(dense).shape, name)
    labels = HELD_OUT.masked_fill(tokens(2, LENGTH, seed=3) % 2 == 0, -100)
    text = TrainingText(HELD_OUT, labels)
    request = request_of(dense, plan, tmp_path, held_out=text)
    with torch.no_grad():
        losses = [
            block_loss(request.model, plan, position, span, request.teacher, text)
            for position, span in SPANS[name].items()
        ]
    found = FAST.recover(request).curve[0]
    assert found == {"tokens": 0, "held_out_block_loss": pytest.approx(float(sum(losses)), rel=1e-4)}


def test_temperature_and_the_squared_error_reach_the_loss(tmp_path):
    dense = tiny("llama")
    plan = plan_of(opened(dense).shape, "concatenated")
    request = request_of(dense, plan, tmp_path)
    states = request.teacher(HELD_OUT, [0, 3])
    with torch.no_grad():
        output = output_of(request.model, 1, HELD_OUT, states[0])
    expected = {
        replace(FAST, temperature=3.0): divergence(output, states[3], 3.0),
        replace(FAST, loss="mse"): squares(output, states[3]),
    }
    for method, losses in expected.items():
        found = method.recover(request).curve[0]["held_out_block_loss"]
        assert found == pytest.approx(float(mean_over_targets(losses, HELD_OUT)), rel=1e-4)


# --------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("kind", KINDS)
def test_distillation_is_the_training_of_each_block_alone(kind, tmp_path):
    """Whatever masks, rotary embeddings and norms the architecture has."""
    dense = tiny(kind)
    plan = plan_of(opened(dense).shape, "concatenated")
    found = FAST.recover(request_of(dense, plan, tmp_path)).model
    assert learnt_alike(found, trained_in_torch(dense, plan, SPANS["concatenated"]), built(plan, dense))
    assert not same(found, built(plan, dense))


@pytest.mark.parametrize("name", [n for n in SPANS if n != "concatenated"])
def test_distillation_is_the_training_of_each_block_alone_on_every_plan(name, tmp_path):
    """Also where the pruned model is no plain one: gains, and blocks of several widths."""
    dense = tiny("llama")
    plan = plan_of(opened(dense).shape, name)
    found = FAST.recover(request_of(dense, plan, tmp_path)).model
    assert learnt_alike(found, trained_in_torch(dense, plan, SPANS[name]), built(plan, dense))


def test_only_merged_blocks_change_and_the_pruned_model_stays_as_it_was(tmp_path):
    dense = tiny("llama-tied")
    request = request_of(dense, plan_of(opened(dense).shape, "removed"), tmp_path)
    before = {name: tensor.clone() for name, tensor in by_name(request.model).items()}
    found = FAST.recover(request)
    assert changed(found.model, request.model) == names_of(found.model, (1, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in by_name(request.model).items())
    assert not any(p.requires_grad for p in found.model.parameters())
    assert found.facts["trained_blocks"] == 2
    assert found.facts["trained_parameters"] == sum(before[name].numel() for name in names_of(found.model, (1, 2)))


def test_changed_blocks_or_all_are_trained_where_that_is_asked_for(tmp_path):
    dense = tiny("llama")
    shape = opened(dense).shape
    narrow = BlockRecipe(parts=(Part(1, (0, 2), tuple(range(8))),))
    plan = change(PruningPlan.identity(shape), {1: narrow})
    request = request_of(dense, plan, tmp_path)
    only = replace(FAST, blocks="changed").recover(request).model
    assert changed(only, request.model) == names_of(only, (1,))
    assert learnt_alike(only, trained_in_torch(dense, plan, {1: (0, 1)}), request.model)
    everything = replace(FAST, blocks="all", input="student").runs(plan)
    assert [(run.position, run.before, run.last) for run in everything] == [(i, i - 1, i) for i in range(5)]
    assert [run.position for run in replace(FAST, blocks="all").runs(plan)] == [1]  # the others have nothing to learn


def test_of_all_blocks_the_original_trains_those_that_have_something_to_learn(tmp_path):
    """A narrow one stands for itself alone, and is trained beside the merged one; the two behind them give its states."""
    dense = tiny("llama")
    narrow = BlockRecipe(parts=(Part(0, (0, 2), tuple(range(8))),))
    plan = PruningPlan(opened(dense).shape, (narrow, *whole(1, 3, 4)))
    request = request_of(dense, plan, tmp_path)
    found = replace(FAST, blocks="all").recover(request)
    assert changed(found.model, request.model) == names_of(found.model, (0, 1))
    assert learnt_alike(found.model, trained_in_torch(dense, plan, {0: (-1, 0), 1: (0, 2)}), request.model)
    assert found.facts["trained_blocks"] == 2


@pytest.mark.parametrize("windows", [1, 3, 100])
def test_the_original_is_asked_ahead_about_as_many_windows_as_there_is_room_for(windows, monkeypatch):
    asked: list[int] = []

    def teacher(ids: Tensor, blocks: Sequence[int]) -> Mapping[int, Tensor]:
        asked.append(len(ids))
        return {block: ids[:, :, None] * torch.tensor([1.0, block]) for block in blocks}

    monkeypatch.setattr(distill, "STATES", windows * 4 * LENGTH * 2 * 2)
    ahead = distill.ahead(teacher, IDS, hidden=2)
    for batch in IDS.split(2):
        found = ahead(batch, [1, 3])
        assert torch.equal(found[3], teacher(batch, [3])[3])
        asked.pop()
    assert asked == ([WINDOWS] if windows == 100 else [2] * (WINDOWS // 2))


def test_windows_that_do_not_follow_each_other_are_asked_about_alone():
    """The last batch of several processes may be the last window and, to fill it up, the first."""
    asked: list[int] = []

    def teacher(ids: Tensor, blocks: Sequence[int]) -> Mapping[int, Tensor]:
        asked.append(len(ids))
        return {block: ids[:, :, None] * torch.tensor([1.0, block]) for block in blocks}

    ahead = distill.ahead(teacher, IDS, hidden=2)
    batch = IDS[[-1, 0]]
    assert torch.equal(ahead(batch, [1, 3])[3], batch[:, :, None] * torch.tensor([1.0, 3]))
    assert asked == [2]


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_a_block_that_does_what_its_group_did_has_no_loss_and_stays(loss, tmp_path):
    """The removed block added nothing to the stream."""
    dense: Any = tiny("llama")
    for linear in (dense.model.layers[2].self_attn.o_proj, dense.model.layers[2].mlp.down_proj):
        linear.weight.zero_()
    request = request_of(dense, PruningPlan.keep(opened(dense).shape, (0, 1, 3, 4)), tmp_path)
    found = replace(FAST, loss=loss, keep="best").recover(request)
    assert found.curve[0]["held_out_block_loss"] == 0.0
    assert not changed(found.model, request.model)


def test_blocks_learn_the_same_together_and_one_after_another(tmp_path):
    """Each token passes each trained block once in either case; the original passes the text once a group."""
    dense = tiny("llama")
    plan = plan_of(opened(dense).shape, "removed")
    asked: list[int] = []

    def counting(ids: Tensor, blocks: Sequence[int]) -> Mapping[int, Tensor]:
        asked.append(ids.numel() if any(torch.equal(ids[0], window) for window in IDS) else 0)
        return teacher_of(dense)(ids, blocks)

    found: list[tuple[Recovered, int]] = []
    for memory in (1.0, TINY_MEMORY):
        asked.clear()
        request = request_of(dense, plan, tmp_path, teacher=counting)
        found.append((replace(FAST, memory=memory).recover(request), sum(asked)))
    (together, once), (apart, twice) = found
    assert learnt_alike(together.model, apart.model, request.model, 1e-4)
    assert (once, twice) == (WINDOWS * LENGTH, 2 * WINDOWS * LENGTH)
    assert together.facts == apart.facts
    assert together.facts["trained_tokens"] == WINDOWS * LENGTH
    for one, other in zip(together.curve, apart.curve, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_the_original_is_asked_once_about_held_out_text(tmp_path):
    dense, asked = tiny("llama"), []

    def counting(ids: Tensor, blocks: Sequence[int]) -> Mapping[int, Tensor]:
        asked.append(torch.equal(ids, HELD_OUT))
        return teacher_of(dense)(ids, blocks)

    found = FAST.recover(request_of(dense, plan_of(opened(dense).shape, "mixed"), tmp_path, teacher=counting))
    assert len(found.curve) == STEPS + 1
    assert asked.count(True) == 1


def test_a_block_that_lends_its_weights_stays_and_the_borrower_learns_what_is_its_own(tmp_path):
    dense = tiny("llama")
    borrower = BlockRecipe(parts=(Part(3),), shares=1, rank=2, output_norm=True)
    first, lender, last = whole(0, 1, 4)
    plan, attached = attached_for(PruningPlan(opened(dense).shape, (first, lender, borrower, last)))
    request = request_of(dense, plan, tmp_path, attached)
    assert "stand for more than one original block and lend no weights, found none" in str(FAST.refuses(plan))
    found = replace(FAST, blocks="changed").recover(request).model
    assert changed(found, request.model) == names_of(found, (2,))
    assert learnt_alike(found, trained_in_torch(dense, plan, {2: (2, 3)}, attached), request.model)


def test_a_model_in_bfloat16_learns_and_keeps_its_dtype(tmp_path):
    dense = tiny("llama")
    for parameter in dense.parameters():
        parameter.data = parameter.data.bfloat16()
    request = request_of(dense, plan_of(opened(dense).shape, "removed"), tmp_path, dtype="bfloat16")
    found = replace(FAST, learning_rate=1e-3, batch_tokens=LENGTH).recover(request)
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}
    assert changed(found.model, request.model) <= names_of(found.model, (1, 2))
    assert len(changed(found.model, request.model)) > 10
    assert found.curve[-1]["held_out_block_loss"] < found.curve[0]["held_out_block_loss"]


# ------------------------------------------------------------------------------ through the student


@pytest.mark.parametrize(
    ("name", "weight", "blocks"),
    [
        ("removed", 0.0, "merged"),
        ("removed", 0.5, "merged"),
        ("gains", 0.0, "merged"),
        ("gains", 0.5, "merged"),
        ("removed", 0.0, "all"),
    ],
)
def test_through_the_student_blocks_feed_each_other_and_learn_for_each_other(name, weight, blocks, tmp_path):
    """The sum of the block losses in one pass of the pruned model, and the divergence of its logits from the original's.

    Of all blocks the first, which is what it was, learns for the merged ones.
    """
    dense: Any = tiny("llama")
    spans = SPANS[name] if blocks == "merged" else {0: (-1, 0), **SPANS[name]}
    plan = plan_of(opened(dense).shape, name)
    model: Any = deepcopy(built(plan, dense))
    teacher = teacher_of(dense)
    gains = [recipe.gain for recipe in plan.blocks] + [1.0]

    def loss(ids: Tensor) -> Tensor:
        outputs: dict[int, Tensor] = {}
        handles = [
            layer.register_forward_hook(lambda m, a, output, i=i: outputs.__setitem__(i, output))
            for i, layer in enumerate(model.model.layers)
        ]
        logits = model(input_ids=ids, use_cache=False).logits
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            taught = dense(input_ids=ids, use_cache=False).logits
        states = teacher(ids, [after for _, after in spans.values()])
        parts = [divergence(outputs[p] * gains[p + 1], states[after]) for p, (_, after) in spans.items()]
        parts.append(weight * divergence(logits, taught))
        return mean_over_targets(sum(parts[1:], parts[0]), ids)

    steps_in_torch([p.requires_grad_(True) for i in spans for p in model.model.layers[i].parameters()], loss)
    method = replace(FAST, input="student", logit_weight=weight, blocks=blocks)
    found = method.recover(request_of(dense, plan, tmp_path))
    start = built(plan, dense)
    assert learnt_alike(found.model, model, start)
    assert not learnt_alike(found.model, FAST.recover(request_of(dense, plan, tmp_path)).model, start, 0.1)
    with torch.no_grad():
        loss_before = float(start(input_ids=HELD_OUT, labels=HELD_OUT).loss)
    assert found.curve[0] == {"tokens": 0, "held_out_loss": pytest.approx(loss_before, rel=1e-4)}
    assert changed(found.model, start) == names_of(found.model, spans)
    assert found.facts["trained_blocks"] == len(spans)


# ------------------------------------------------------------------------------------ what goes wrong


class Killed(Exception):
    pass


def test_a_training_that_was_killed_goes_on_to_the_same_end(tmp_path, monkeypatch):
    """In the middle of the second of two blocks; what the first had learnt is not trained again."""
    monkeypatch.setattr(distill, "STATES", 0)  # a question a batch
    dense = tiny("llama")
    plan = plan_of(opened(dense).shape, "removed")
    method = replace(FAST, memory=TINY_MEMORY)
    calls: list[tuple[int, ...]] = []

    def mortal(ids: Tensor, blocks: Sequence[int]) -> Mapping[int, Tensor]:
        if tuple(blocks) == (2, 4) and torch.equal(ids, IDS[4:6]):
            raise Killed
        return teacher_of(dense)(ids, blocks)

    def counting(ids: Tensor, blocks: Sequence[int]) -> Mapping[int, Tensor]:
        if not torch.equal(ids, HELD_OUT):
            calls.append(tuple(blocks))
        return teacher_of(dense)(ids, blocks)

    with pytest.raises(Killed):
        method.recover(request_of(dense, plan, tmp_path / "killed", teacher=mortal))
    resumed = method.recover(request_of(dense, plan, tmp_path / "killed", teacher=counting))
    assert calls == [(2, 4)] * 2
    uninterrupted = method.recover(request_of(dense, plan, tmp_path / "whole"))
    assert same(resumed.model, uninterrupted.model)
    assert resumed.curve == uninterrupted.curve


def test_a_block_whose_loss_is_not_finite_stops_and_the_others_are_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "STATES", 0)  # a question a batch
    dense = tiny("llama")
    plan = plan_of(opened(dense).shape, "removed")

    def broken(ids: Tensor, blocks: Sequence[int]) -> Mapping[int, Tensor]:
        states = dict(teacher_of(dense)(ids, blocks))
        if 4 in states and torch.equal(ids, IDS[4:6]):
            states[4] = torch.full_like(states[4], torch.nan)
        return states

    method = replace(FAST, memory=TINY_MEMORY)
    good = method.recover(request_of(dense, plan, tmp_path / "good"))
    found = method.recover(request_of(dense, plan, tmp_path / "broken", teacher=broken))
    assert len(found.notes) == 1
    assert found.notes[0].startswith("distill-2: training was stopped after 72 of 96 tokens")
    pairs = by_name(found.model), by_name(good.model)
    assert all(torch.equal(pairs[0][name], pairs[1][name]) for name in names_of(found.model, (1,)))
    assert all(bool(tensor.isfinite().all()) for tensor in pairs[0].values())
    assert changed(found.model, request_of(dense, plan, tmp_path).model) == names_of(found.model, (1, 2))
    assert found.facts["kept_tokens"] == 48


def test_a_stopped_training_counts_with_its_last_point():
    facts = {"trained_parameters": 3.0, "trained_tokens": 20.0, "kept_tokens": 20.0}
    one = ({"tokens": 0, "held_out_loss": 4.0}, {"tokens": 10, "loss": 3.0, "held_out_loss": 2.0})
    other = (*one, {"tokens": 20, "loss": 1.0, "held_out_loss": 0.5})
    curve, total = summed([Trained(one, {**facts, "kept_tokens": 10.0}, ()), Trained(other, facts, ())])
    assert curve == (
        {"tokens": 0, "held_out_block_loss": 8.0},
        {"tokens": 10, "held_out_block_loss": 4.0, "loss": 6.0},
        {"tokens": 20, "held_out_block_loss": 2.5, "loss": 4.0},
    )
    kept = {"kept_tokens": 10.0, "kept_held_out_block_loss": 2.5}
    assert total == {"trained_parameters": 6.0, "trained_tokens": 20.0, **kept}
    said = course_of({"method": "theirs", "facts": total, "training": {"tokens": 20}, "curve": curve})
    assert said.endswith("on 20 tokens: held-out loss of blocks 8.0000 -> 2.5000, of the state after 10"), said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature = 0.0, expected more than 0"),
        ({"input": "student", "logit_weight": -1.0}, "logit_weight = -1.0, expected 0 or more"),
        ({"logit_weight": 1.0}, "single blocks give no logits; set input = 'student'"),
    ],
)
def test_options_that_cannot_work_are_named(options, message, tmp_path):
    dense = tiny("llama")
    with pytest.raises(FlexiError, match=message):
        replace(FAST, **options).recover(request_of(dense, plan_of(opened(dense).shape, "removed"), tmp_path))


def test_a_plan_without_merged_blocks_is_refused_with_what_would_do(tmp_path):
    dense = tiny("llama")
    with pytest.raises(FlexiError, match="found none in this plan; set blocks = 'changed' or 'all'"):
        FAST.recover(request_of(dense, PruningPlan.identity(opened(dense).shape), tmp_path))


def test_logits_of_an_original_with_another_head_cannot_be_had():
    dense = tiny("llama")
    plan = plan_of(opened(dense).shape, "removed")
    own = replace(plan, own=("head",), tensors=(("outer.head", "a" * 64),))
    method = replace(FAST, input="student", logit_weight=1.0)
    assert method.refuses(plan) is None
    assert "the original's logits cannot be had with this plan's own head" in str(method.refuses(own))
