"""least-squares-merge: the solution against numpy, and a model in which a block can be absorbed exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import logits

from flexi_plugins.data import PruningPlan
from flexi_plugins.metrics.flexigpt import FlexiGPT
from flexi_plugins.plugins import Plugins
from flexi_plugins.rewrite import build_model
from flexi_plugins.strategies.least_squares_merge import LeastSquaresMerge
from flexi_plugins.testing.bench import KnownScores, TinyPruner, with_tensors
from flexi_plugins.testing.models import tiny_checkpoint


def pruner(kind: str = "llama-gqa-tied") -> TinyPruner:
    return TinyPruner(tiny_checkpoint(kind), Plugins.load())


def record(model: torch.nn.Module, ids: torch.Tensor, block: int) -> dict[str, np.ndarray]:
    """Return what a transformers block does: its input, the input of its down map, and the stream before its MLP."""
    layer, seen = model.model.layers[block], {}

    def note(name):
        return lambda _, args, kwargs: seen.__setitem__(name, args[0].double().flatten(0, 1).numpy())

    handles = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in (
            ("input", layer),
            ("attention", layer.self_attn.o_proj),
            ("middle", layer.post_attention_layernorm),
            ("mlp", layer.mlp.down_proj),
        )
    ]
    handles.append(
        layer.register_forward_hook(lambda _, args, out: seen.__setitem__("output", out.double().flatten(0, 1).numpy()))
    )
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", ["llama-gqa-tied", "llama-bias"])
@pytest.mark.parametrize("maps", ["down", "joint"])
def test_the_new_maps_are_the_ridge_solution(maps, kind):
    """What the maps' biases add stays, and is not solved for."""
    own = pruner(kind)
    strategy = LeastSquaresMerge(blocks=1, maps=maps, protect_first=3, protect_last=2)
    planned = own.make(KnownScores(), strategy, 0.0)
    assert [r.sources for r in planned.plan.blocks] == [(0,), (1,), (2,), (4,), (5,)]
    dense = build_model(PruningPlan.identity(own.checkpoint.shape), own.checkpoint)
    before, behind = record(dense, own.texts[0], 2), record(dense, own.texts[0], 3)["output"]
    layer = dense.model.layers[2]
    x, old = before["mlp"], layer.mlp.down_proj.weight.double().numpy()
    y = behind - before["middle"]
    if maps == "joint":
        x = np.concatenate([before["attention"], x], 1)
        old = np.concatenate([layer.self_attn.o_proj.weight.double().numpy(), old], 1)
        y = behind - before["input"]
    for module in (layer.self_attn.o_proj, layer.mlp.down_proj) if maps == "joint" else (layer.mlp.down_proj,):
        assert (module.bias is not None) == (kind == "llama-bias")
        assert module.bias is None or float(module.bias.abs().max()) > 0
        y = y if module.bias is None else y - module.bias.double().numpy()
    weight = strategy.ridge * np.mean(np.diag(x.T @ x))
    expected = np.linalg.solve(x.T @ x + weight * np.eye(x.shape[1]), x.T @ y + weight * old.T).T
    roles = ["down"] if maps == "down" else ["attention_output", "down"]
    found = np.concatenate([planned.attached[f"blocks.2.{role}.weight"].double().numpy() for role in roles], 1)
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_a_block_that_does_what_its_neighbour_can_is_absorbed_exactly():
    """A block whose attention and MLP add nothing leaves nothing to make up for; the model stays what it was."""
    own = pruner("llama")
    silent = {
        name: torch.zeros_like(own.checkpoint.read(name))
        for name in ("model.layers.3.self_attn.o_proj.weight", "model.layers.3.mlp.down_proj.weight")
    }
    changed = TinyPruner(with_tensors(own.checkpoint, silent), Plugins.load())
    planned = changed.make(FlexiGPT(), LeastSquaresMerge(blocks=1), 0.0)
    assert [r.sources[0] for r in planned.plan.blocks] == [0, 1, 2, 4, 5]
    dense = logits(build_model(PruningPlan.identity(changed.checkpoint.shape), changed.checkpoint), own.texts[0])
    found = logits(build_model(planned.plan, changed.checkpoint, planned.attached), own.texts[0])
    assert float((found - dense).abs().max()) < 1e-3


def test_absorbing_is_better_than_removing_on_the_calibration_tokens():
    """The stream behind the cut is nearer to the dense model's, by its own measure."""
    own = pruner("llama")
    planned = own.make(FlexiGPT(), LeastSquaresMerge(blocks=1), 0.0)
    gone = next(i for i in range(6) if i not in [r.sources[0] for r in planned.plan.blocks])
    identity = PruningPlan.identity(own.checkpoint.shape)
    target = record(build_model(identity, own.checkpoint), own.texts[0], gone)["output"]
    removed = record(build_model(identity, own.checkpoint), own.texts[0], gone - 1)["output"]
    absorbed = record(build_model(planned.plan, own.checkpoint, planned.attached), own.texts[0], gone - 1)["output"]
    assert np.square(absorbed - target).sum() < 0.7 * np.square(removed - target).sum()


@pytest.mark.parametrize("target", ["original", "current"])
def test_statistics_are_retaken_through_the_merged_model(target):
    """The second merge sees the first: its maps solve for activations of the model that has the first one."""
    own = pruner("llama")
    strategy = LeastSquaresMerge(blocks=1, target=target)
    first = own.make(KnownScores(), strategy, 0.0)
    both = own.make(KnownScores(), replace(strategy, blocks=2), 0.0)
    merged = build_model(first.plan, own.checkpoint, first.attached)
    kept = [r.sources[0] for r in both.plan.blocks]
    gone = next(p for p, r in enumerate(first.plan.blocks) if r.sources[0] not in kept)
    seen = record(merged, own.texts[0], gone - 1)
    sources = [r.sources[0] for r in first.plan.blocks]
    end = (sources[gone + 1] if gone + 1 < len(sources) else 6) - 1
    dense = build_model(PruningPlan.identity(own.checkpoint.shape), own.checkpoint)
    model, block = (dense, end) if target == "original" else (merged, gone)
    x, y = seen["mlp"], record(model, own.texts[0], block)["output"] - seen["middle"]
    old = merged.model.layers[gone - 1].mlp.down_proj.weight.double().numpy()
    weight = strategy.ridge * np.mean(np.diag(x.T @ x))
    expected = np.linalg.solve(x.T @ x + weight * np.eye(x.shape[1]), x.T @ y + weight * old.T).T
    found = both.attached[f"blocks.{gone - 1}.down.weight"].double().numpy()
    assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()


def test_a_merged_model_is_a_plain_one(tmp_path):
    from transformers import AutoModelForCausalLM

    own = pruner("llama")
    planned = own.make(FlexiGPT(), LeastSquaresMerge(), 0.2)
    assert planned.plan.not_plain() is None
    own.write(planned, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(loaded, own.texts[0]), logits(own.model(planned), own.texts[0]))
