"""Prune&Comp's magnitude compensation: alpha by hand, exactness of the fold, and one cut after another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import change, close, logits, opened, tiny, tokens
from torch import nn
from transformers import AutoModelForCausalLM

from flexi_plugins.checkpoint import Checkpoint
from flexi_plugins.data import PruningPlan
from flexi_plugins.metrics.flexigpt import FlexiGPT
from flexi_plugins.numerics import enlargement
from flexi_plugins.plugins import Plugins
from flexi_plugins.pruner import count_only
from flexi_plugins.rewrite import build_model, write_checkpoint
from flexi_plugins.strategies.remove_blocks import RemoveBlocks
from flexi_plugins.testing.bench import TinyPruner
from flexi_plugins.testing.models import tiny_checkpoint

IDS = tokens(3, 10)
KINDS = ("llama", "llama-tied", "llama-biases", "qwen2", "qwen3")
ALPHA = 1.7


def exact(kind: str) -> nn.Module:
    """A tiny model whose norms have so small an epsilon that scale does not matter to them."""
    return tiny(kind, rms_norm_eps=1e-12)


def entering(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return the residual stream that enters each block."""
    seen: list[torch.Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
        for layer in model.model.layers
    ]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return seen


def written(plan: PruningPlan, model: nn.Module, folder: Path) -> Any:
    """Return what transformers makes of a plan's folder."""
    write_checkpoint(plan, opened(model), None, folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


def with_gain(plan: PruningPlan, position: int, gain: float) -> PruningPlan:
    return change(plan, {position: replace(plan.blocks[position], gain=gain)})


@pytest.mark.parametrize("kind", KINDS)
def test_the_stream_that_enters_the_cut_is_alpha_times_as_large(kind, tmp_path):
    """And the streams in front of it as well, since all that they are made of is."""
    model = exact(kind)
    removed = PruningPlan.keep(opened(model).shape, (0, 1, 3, 4))
    plain = entering(build_model(removed, opened(model)), IDS)
    folded = written(with_gain(removed, 2, ALPHA), model, tmp_path / "folded")
    assert folded.config.model_type == model.config.model_type
    for before, after in zip(plain[:3], entering(folded, IDS)[:3], strict=True):
        assert close(after, ALPHA * before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_enlarged_whole_computes_the_same(kind, tmp_path):
    """With nothing removed: every block and the embedding times alpha, and a tied head made up for in the final norm."""
    model = exact(kind)
    last = len(opened(model).shape.blocks) - 1
    enlarged = with_gain(PruningPlan.identity(opened(model).shape), last, ALPHA)
    folded = written(enlarged, model, tmp_path / "folded")
    block = folded.model.layers[last]
    for linear in (block.self_attn.o_proj, block.mlp.down_proj):  # behind the gain: the one block that is as it was
        linear.weight = nn.Parameter(linear.weight * ALPHA, requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias * ALPHA, requires_grad=False)
    assert close(logits(folded, IDS), logits(model, IDS))


@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_model_computes_what_a_gain_at_the_cut_does(kind, tmp_path):
    """In memory, and as a folder that transformers alone can load: against hooks on the model without the blocks."""
    model = exact(kind)
    removed = PruningPlan.keep(opened(model).shape, (0, 2, 4))
    plan = replace(with_gain(with_gain(removed, 1, 1.3), 2, 0.8), embedding_gain=1.1, final_norm_gain=0.9)
    oracle = build_model(removed, opened(model))
    for position, gain in ((0, 1.1), (1, 1.3), (2, 0.8)):
        oracle.model.layers[position].register_forward_pre_hook(lambda _, args, gain=gain: (args[0] * gain, *args[1:]))
    expected = 0.9 * logits(oracle, IDS) if model.lm_head.bias is None else None
    assert expected is not None
    assert close(logits(build_model(plan, opened(model)), IDS), expected)
    folded = written(plan, model, tmp_path / "folded")
    assert folded.config.model_type == model.config.model_type
    assert close(logits(folded, IDS), expected)


def test_alpha_is_a_mean_of_ratios_and_not_a_ratio_of_means():
    before, after = torch.tensor([[1.0, 2.0], [4.0, 1.0]]), torch.tensor([[2.0, 2.0], [4.0, 4.0]])
    assert enlargement(before, after) == pytest.approx(((2 + 1) / 2 + (1 + 4) / 2) / 2)
    assert enlargement(torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0, 3.0]])) == 2  # a silent channel says nothing


def pruner(kind: str = "llama-gqa-tied") -> TinyPruner:
    return TinyPruner(tiny_checkpoint(kind), Plugins.load())


def alpha_between(checkpoint: Checkpoint, plan: PruningPlan, first: int, end: int, ids: torch.Tensor) -> float:
    """Return alpha from hooks on the plan's model: mean over channels and windows of mean |x_end| / mean |x_first|."""
    states = [s.abs().mean(1) for s in entering(build_model(plan, checkpoint), ids)]
    return float((states[end] / states[first]).mean(0).mean())


@pytest.mark.parametrize("kind", ["llama-gqa-tied", "llama-bias", "qwen3"])
def test_each_run_of_removed_blocks_is_made_up_for(kind):
    """One-shot: by alpha of the dense model; what follows the last block of the model needs nothing."""
    own = pruner(kind)
    plan = own.plan(FlexiGPT(), RemoveBlocks(blocks=3, compensate=True), 0.0)
    kept = [r.sources[0] for r in plan.blocks]
    identity = PruningPlan.identity(own.checkpoint.shape)
    for position, (recipe, source) in enumerate(zip(plan.blocks, kept, strict=True)):
        first = kept[position - 1] + 1 if position else 0
        expected = alpha_between(own.checkpoint, identity, first, source, own.texts[0]) if first < source else 1.0
        assert recipe.gain == pytest.approx(expected, rel=1e-4)
    assert plan.not_plain() is None
    assert sorted(kept) == sorted(r.sources[0] for r in own.plan(FlexiGPT(), RemoveBlocks(blocks=3), 0.0).blocks)


def test_progressive_compensation_looks_at_the_compensated_model():
    """Step by step: the second alpha is that of the model with the first one folded in."""
    own = pruner()
    strategy = RemoveBlocks(blocks=1, progressive=True, compensate=True, protect_last=1)
    first = own.plan(FlexiGPT(), strategy, 0.0)
    both = own.plan(FlexiGPT(), replace(strategy, blocks=2), 0.0)
    (gone,) = {r.sources[0] for r in first.blocks} - {r.sources[0] for r in both.blocks}
    position = [r.sources[0] for r in first.blocks].index(gone)
    alpha = alpha_between(own.checkpoint, first, position, position + 1, own.texts[0])
    expected = [r.gain for r in first.blocks]
    carried = expected.pop(position)
    expected[position] *= alpha * carried
    assert [r.gain for r in both.blocks] == pytest.approx(expected, rel=1e-3)


def test_compensated_plans_share_what_is_in_front_of_the_cut():
    own = pruner()
    plain = own.plan(FlexiGPT(), RemoveBlocks(blocks=1, protect_first=2, protect_last=1), 0.0)
    compensated = own.plan(FlexiGPT(), RemoveBlocks(blocks=1, protect_first=2, protect_last=1, compensate=True), 0.0)
    cut = next(i for i, r in enumerate(compensated.blocks) if r.gain != 1)
    assert cut >= 2
    assert plain.blocks[:cut] == compensated.blocks[:cut]
    assert [r.sources for r in plain.blocks] == [r.sources for r in compensated.blocks]


def test_counting_needs_no_magnitudes():
    shape = pruner().checkpoint.shape
    assert len(count_only(shape, RemoveBlocks(blocks=2, compensate=True), 0.0).blocks) == len(shape.blocks) - 2
