"""Inside other people's harnesses: torch-pruning's own pruner, lm-eval's own command line, LLM-Pruner's own checkpoints."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch_pruning as tp
from studies import byte_tokenizer, make_text
from tiny import KINDS, built, change, close, family_of, logits, opened, tiny, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from flexi_plugins.budget import removable_share, without_units
from flexi_plugins.checkpoint import Checkpoint
from flexi_plugins.data import BlockRecipe, Part, PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.integrations import llm_pruner, sliced
from flexi_plugins.integrations.torch_pruning import FlexiImportance
from flexi_plugins.metrics.greedy import Greedy
from flexi_plugins.metrics.saap import Saap
from flexi_plugins.modeling import FlexiForCausalLM
from flexi_plugins.models import open_model
from flexi_plugins.plugins import Plugins
from flexi_plugins.pruner import Pruner
from flexi_plugins.rewrite import write_checkpoint

WINDOWS = tokens(3, 16)  # calibration ids
UNTRACED = "ignore:Unwrapped parameters detected"  # torch-pruning's, of the weights of norms
HEADS, CHANNELS, HEAD_DIM = 8, 24, 4  # of the tiny models


# ---------------------------------------------------------------------------------------------- torch-pruning


def traced(kind: str = "llama-mha", **changes: Any) -> nn.Module:
    """Return a tiny model of three blocks that torch-pruning can trace."""
    return tiny(kind, num_hidden_layers=3, **changes).requires_grad_(True)


def pruned_by_torch_pruning(model: nn.Module, importance: Any, heads: float = 0.0, **options: Any) -> nn.Module:
    """Run torch-pruning's pruner on a model in place."""
    pruner = tp.pruner.MetaPruner(model, tokens(1, 6), importance, **importance.arguments(heads), **options)
    pruner.step()
    return model


def sensitivities(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return CoMe's sensitivity of heads and channels per block, from the inputs of the outgoing maps: plain torch."""
    seen: dict[nn.Module, Tensor] = {}
    layers = model.model.layers
    maps = [m for layer in layers for m in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    handles = [m.register_forward_pre_hook(lambda module, inputs: seen.update({module: inputs[0]})) for m in maps]
    logits(model, WINDOWS)
    for handle in handles:
        handle.remove()

    def channels(module: nn.Module) -> Tensor:
        return seen[module].flatten(0, 1).abs().mean(0) * module.weight.detach().abs().sum(0)

    heads = [channels(layer.self_attn.o_proj).view(HEADS, HEAD_DIM).sum(1) for layer in layers]
    return heads, [channels(layer.mlp.down_proj) for layer in layers]


def lowest(values: Tensor, count: int) -> list[int]:
    return values.argsort()[:count].tolist()


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    """Whether two models have the same weights, bit for bit, and the same answers."""
    state = theirs.state_dict()
    equal = all(torch.equal(p, state[n]) for n, p in ours.state_dict().items())
    return equal and close(logits(theirs, tokens()), logits(ours, tokens()))


@pytest.mark.filterwarnings(UNTRACED)
def test_torch_prunings_pruner_cuts_the_heads_and_channels_that_come_ranks_lowest() -> None:
    model = traced()
    original = copy.deepcopy(model).requires_grad_(False)
    heads, channels = sensitivities(original)
    importance = FlexiImportance.on_tokens(model, WINDOWS, "come")
    theirs = pruned_by_torch_pruning(model, importance, heads=0.25, pruning_ratio=0.25)
    gone = {(i, "attention"): lowest(h, 2) for i, h in enumerate(heads)}
    gone |= {(i, "mlp"): lowest(c, 6) for i, c in enumerate(channels)}
    ours = built(without_units(opened(original).shape, gone), original)
    assert same(ours, theirs.requires_grad_(False))


@pytest.mark.filterwarnings(UNTRACED)
@pytest.mark.parametrize("metric", ["flexigpt", "saap"])
@pytest.mark.parametrize(("kind", "heads"), [("llama-mha", 0.25), ("llama-mha", 0.0), ("qwen2", 0.0)])
def test_torch_prunings_pruner_cuts_the_heads_and_channels_that_a_metric_ranks_lowest(
    metric: str, kind: str, heads: float
) -> None:
    """Of grouped KV heads the channels alone: their MLPs go through torch-pruning's graph."""
    model = traced(kind)
    original = copy.deepcopy(model).requires_grad_(False)
    importance = FlexiImportance.on_tokens(model, WINDOWS, metric)
    theirs = pruned_by_torch_pruning(model, importance, heads=heads, pruning_ratio=0.5)
    scores = scored(original, metric)
    gone = {(i, "mlp"): lowest(s, CHANNELS // 2) for i, s in enumerate(scores.mlp)}
    if heads:
        gone |= {(i, "attention"): lowest(s, int(heads * HEADS)) for i, s in enumerate(scores.attention)}
    assert same(built(without_units(opened(original).shape, gone), original), theirs.requires_grad_(False))


def scored(model: nn.Module, metric: str) -> Any:
    """Return the scores of a metric as ``flexi prune`` would take them from these windows."""
    pruner = Pruner(opened(model), dtype="float32", device="cpu")
    pruner.texts = WINDOWS, WINDOWS, ""
    return pruner.score(metric)


@pytest.mark.filterwarnings(UNTRACED)
def test_a_global_ranking_of_torch_prunings_ranks_the_channels_of_all_blocks_together() -> None:
    model = traced()
    original = copy.deepcopy(model).requires_grad_(False)
    importance = FlexiImportance.on_tokens(model, WINDOWS, "flexigpt")
    theirs = pruned_by_torch_pruning(model, importance, pruning_ratio=0.5, global_pruning=True)
    scores = torch.cat(scored(original, "flexigpt").mlp)
    gone: dict[tuple[int, str], list[int]] = {}
    for unit in lowest(scores, len(scores) // 2):
        gone.setdefault((unit // CHANNELS, "mlp"), []).append(unit % CHANNELS)
    widths = [len(layer.mlp.gate_proj.weight) for layer in theirs.model.layers]
    assert len(set(widths)) > 1, "some blocks lose more than others"
    assert same(built(without_units(opened(original).shape, gone), original), theirs.requires_grad_(False))


@pytest.mark.filterwarnings(UNTRACED)
def test_a_pruned_model_is_scored_again_and_written_as_a_folder(tmp_path: Path) -> None:
    model = traced()
    importance = FlexiImportance.on_tokens(model, WINDOWS, "come")
    pruner = tp.pruner.BasePruner(
        model, tokens(1, 6), importance, pruning_ratio=0.5, iterative_steps=2, **importance.arguments()
    )
    pruner.step()
    with pytest.raises(
        FlexiError, match=r"of which 24 channels were scored and 18 are left; make the importance again"
    ):
        pruner.step()
    pruner.current_step = 1
    pruner.importance = FlexiImportance.on_tokens(model, WINDOWS, "come")
    before = sensitivities(model)[1]
    kept = [layer.mlp.gate_proj.weight.detach().clone() for layer in model.model.layers]
    pruner.step()
    for layer, values, rows in zip(model.model.layers, before, kept, strict=True):
        left = sorted(set(range(18)) - set(lowest(values, 6)))
        assert torch.equal(layer.mlp.gate_proj.weight, rows[left])

    sliced.write(sliced.opened(model, family_of), tmp_path / "pruned", byte_tokenizer())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert isinstance(loaded, LlamaForCausalLM), "all blocks have one width"
    assert close(logits(loaded, tokens()), logits(model, tokens()))
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "pruned")("abc")["input_ids"] == byte_tokenizer()("abc")["input_ids"]
    )


def group(module: nn.Module, side: str, indices: list[int]) -> list[Any]:
    """Return the head of a pruning group: its root, as torch-pruning and LLM-Pruner's copy of it have it."""
    handler = getattr(tp.pruner.function.LinearPruner(), f"prune_{side}_channels")
    return [(SimpleNamespace(target=SimpleNamespace(module=module), handler=handler), indices)]


@pytest.mark.parametrize("kind", ["llama", "llama-mha", "qwen3"])
def test_llm_pruners_sum_over_a_head_is_the_heads_score(kind: str) -> None:
    """Its pruner asks with the groupings and sums the root's channels; its roots are query or key, and gate."""
    model = tiny(kind, num_hidden_layers=2)
    importance = FlexiImportance.on_tokens(model, WINDOWS, "flexigpt")
    scores, shape = scored(model, "flexigpt"), opened(model).shape.blocks[1]
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    for role, rows in (("q_proj", shape.query_heads), ("k_proj", shape.kv_heads), ("v_proj", shape.kv_heads)):
        every = list(range(rows * shape.head_dim))
        found = importance(
            group(getattr(attention, role), "out", every), ch_groups=1, consecutive_groups=shape.head_dim
        )
        assert close(found.view(shape.kv_heads, -1).sum(1), scores.attention[1]), role
    columns = importance(group(attention.o_proj, "in", list(range(shape.query_heads * shape.head_dim))))
    assert close(columns.view(shape.kv_heads, -1).sum(1), scores.attention[1])
    for module, side in ((mlp.gate_proj, "out"), (mlp.up_proj, "out"), (mlp.down_proj, "in")):
        assert torch.equal(importance(group(module, side, [5, 0, 17])), scores.mlp[1][[5, 0, 17]])


def test_the_residual_stream_and_the_vocabulary_are_left_alone() -> None:
    model = tiny("llama-mha", num_hidden_layers=2)
    importance = FlexiImportance.on_tokens(model, WINDOWS, "come")
    layer = model.model.layers[0]
    for module, side in ((layer.self_attn.o_proj, "out"), (layer.mlp.gate_proj, "in"), (model.lm_head, "out")):
        assert importance(group(module, side, [0, 1])) is None


@pytest.mark.parametrize("rule", ["auto", "undivided"])
def test_scores_that_do_not_compare_blocks_are_standardised_within_them(rule: str, monkeypatch) -> None:
    """Unless their metric has a rule of its own, as SAAP's have, which are standardised already."""
    model = tiny("llama-mha", num_hidden_layers=2)
    expected = scored(model, "saap")
    assert expected.rule == "undivided"
    monkeypatch.setattr(Saap, "score", lambda *_: replace(expected, rule=rule))
    importance = FlexiImportance.on_tokens(model, WINDOWS, "saap")
    for layer, scores in zip(model.model.layers, expected.mlp, strict=True):
        found = importance(group(layer.mlp.up_proj, "out", list(range(CHANNELS))))
        standardised = (scores - scores.mean()) / scores.std(correction=0)
        assert close(found, standardised if rule == "auto" else scores)


def test_texts_are_cut_into_windows_of_tokens(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    model = tiny("llama-mha", num_hidden_layers=2, vocab_size=len(tokenizer))
    texts = make_text(tmp_path / "text.txt", words=200).read_text().split("\n")
    one, again, other = (
        FlexiImportance.on_texts(model, tokenizer, texts, "come", windows=2, length=32, seed=seed) for seed in (0, 0, 1)
    )
    root = group(model.model.layers[0].mlp.gate_proj, "out", [0, 1, 2])
    assert torch.equal(one(root), again(root))
    assert not torch.equal(one(root), other(root))
    with pytest.raises(FlexiError, match="expected at least 999 windows of 32 tokens"):
        FlexiImportance.on_texts(model, tokenizer, texts, windows=999, length=32)


def test_what_torch_pruning_cannot_do_is_said_with_the_next_step() -> None:
    grouped = traced("llama")
    importance = FlexiImportance.on_tokens(grouped, WINDOWS, "come")
    with pytest.raises(FlexiError, match=r"several query heads share a KV head; prune the MLPs through it \(heads=0\)"):
        importance.arguments(heads=0.5)
    importance.model.requires_grad_(False)
    with pytest.raises(FlexiError, match=r"call model.requires_grad_\(True\) first"):
        importance.arguments()
    with pytest.raises(
        FlexiError, match="metric 'greedy': torch-pruning ranks heads and channels, it gives block scores"
    ):
        FlexiImportance.on_tokens(grouped, WINDOWS, Greedy())
    for wrong in (WINDOWS[0], WINDOWS.float(), WINDOWS[:, :1], WINDOWS[:0]):
        with pytest.raises(FlexiError, match=r"calibration tokens: expected ids \(windows, length\)"):
            FlexiImportance.on_tokens(grouped, wrong)
    with pytest.raises(FlexiError, match=r"expected ids in 0\.\.60, found 99\.\.99; take the model's own tokenizer"):
        FlexiImportance.on_tokens(grouped, torch.full((2, 8), 99))


# --------------------------------------------------------------------------------------------- sliced models


def cut_rows(module: nn.Linear, kept: list[int]) -> None:
    module.weight = nn.Parameter(module.weight.detach()[kept], requires_grad=False)
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias.detach()[kept], requires_grad=False)


def cut_columns(module: nn.Linear, kept: list[int]) -> None:
    module.weight = nn.Parameter(module.weight.detach()[:, kept], requires_grad=False)


def cut(model: nn.Module, block: int, heads: list[int], channels: list[int]) -> None:
    """Slice the maps of a block in place, as torch-pruning and LLM-Pruner do: these KV heads and channels stay."""
    attention, mlp = model.model.layers[block].self_attn, model.model.layers[block].mlp
    size = attention.head_dim
    group_size = model.config.num_attention_heads // model.config.num_key_value_heads
    rows = [k * size + i for k in heads for i in range(size)]
    query_rows = [k * size * group_size + i for k in heads for i in range(size * group_size)]
    cut_rows(attention.k_proj, rows)
    cut_rows(attention.v_proj, rows)
    cut_rows(attention.q_proj, query_rows)
    cut_columns(attention.o_proj, query_rows)
    cut_rows(mlp.gate_proj, channels)
    cut_rows(mlp.up_proj, channels)
    cut_columns(mlp.down_proj, channels)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sliced_model_becomes_a_folder_that_gives_its_answers(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    cut(model, 1, [0, 2], [1, 3, 4])
    cut(model, 3, [1], list(range(20)))
    sliced.write(sliced.opened(model, family_of), tmp_path / "pruned")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert isinstance(loaded, FlexiForCausalLM)
    assert close(logits(loaded, tokens()), logits(model, tokens()))
    assert not (tmp_path / "pruned" / "plan.json").exists(), "what it was made from is not known"
    with pytest.raises(
        FlexiError, match=r"give the model that it was made from, or measure it as it is: .*--model flexi"
    ):
        open_model(str(tmp_path / "pruned"), family_of)


def test_a_sliced_model_is_pruned_further_like_any_other() -> None:
    model = tiny("llama")
    cut(model, 1, [0, 2], [1, 3, 4, 5])
    pruner = Pruner(sliced.opened(model, family_of), dtype="float32", device="cpu")
    pruner.texts = WINDOWS, WINDOWS, ""
    plan = pruner.plan("come", "remove-blocks", 0.2)
    kept = [recipe.whole for recipe in plan.blocks]
    expected = copy.deepcopy(model)
    expected.model.layers = nn.ModuleList(expected.model.layers[i] for i in kept)
    assert close(logits(pruner.model(plan), tokens()), logits(expected, tokens()))


LACKING = [
    ("come", "remove-blocks", {}, 0.4),
    ("flexigpt", "share-lora", {"output_gain": "calibrated"}, 0.2),
    ("flexigpt", "share-lora", {"rank": 0}, 0.2),
    ("come", "concat-merge", {"pairs": "score"}, None),
    ("come", "remove-units", {}, 0.2),
    ("none", "extend", {"start": 1, "end": 3, "repetitions": 2}, 0.0),
]


@pytest.mark.parametrize(("metric", "strategy", "options", "ratio"), LACKING)
def test_a_model_of_which_blocks_lack_a_sub_layer_is_pruned_like_any_other(
    metric: str, strategy: str, options: dict[str, Any], ratio: float | None
) -> None:
    """As BlockPruner leaves it: here the first block has no attention, the third no MLP, the fifth neither of all widths."""
    whole = tiny("llama")
    narrowed = {
        0: BlockRecipe(parts=(Part(0, ()),)),
        2: BlockRecipe(parts=(Part(2, None, ()),)),
        4: BlockRecipe(parts=(Part(4, (1,), (2, 3)),)),
    }
    model = built(change(PruningPlan.identity(opened(whole).shape), narrowed), whole)
    pruner = Pruner(sliced.opened(model, family_of), dtype="float32", device="cpu")
    pruner.texts = WINDOWS, WINDOWS, ""
    chosen = pruner.plugins.get("strategy", strategy, options)
    share = 0.98 * chosen.reach(pruner.checkpoint.shape) if ratio is None else ratio
    made = pruner.make(metric, chosen, share)
    assert bool(logits(pruner.model(made), tokens()).isfinite().all())
    assert made.plan != PruningPlan.identity(pruner.checkpoint.shape)


def test_the_reach_is_true_whichever_of_several_sizes_goes() -> None:
    whole = tiny("llama")
    count = opened(whole).shape.blocks[1].channels
    wide = dict.fromkeys((1, 3, 4), BlockRecipe(parts=(Part(0, None, range(count // 4)),)))
    narrowed = {i: replace(r, parts=(replace(r.parts[0], source=i),)) for i, r in wide.items()}
    shape = change(PruningPlan.identity(opened(whole).shape), narrowed).new_shape
    sizes = [shape.block_parameters(b) for b in shape.blocks]
    apart, together = (removable_share(shape, 1, 0, t) * shape.parameters for t in (False, True))
    assert apart == sum(sizes[1:])
    apart, together = (removable_share(shape, 0, 0, t) * shape.parameters for t in (False, True))
    assert round(apart) == sum(sizes) - max(sizes)
    assert round(together) == sum(sizes) - max(sizes[0], sizes[-1])


def test_a_folder_with_blocks_of_different_width_is_opened_again(tmp_path: Path) -> None:
    model = tiny("llama")
    cut(model, 2, [3], [0, 1])
    sliced.write(sliced.opened(model, family_of), tmp_path / "pruned")
    again = sliced.opened(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned"), family_of)
    assert again.shape == sliced.opened(model, family_of).shape
    assert close(logits(Pruner(again).model(PruningPlan.identity(again.shape)), tokens()), logits(model, tokens()))


def test_last_layers_and_hidden_dimensions_may_be_gone() -> None:
    """LLM-Pruner's layer-wise and channel-wise modes; the latter updates the hidden size in the configuration."""
    model = tiny("llama-mha")
    model.model.layers = model.model.layers[:2]
    kept = [i for i in range(32) if i % 4]
    for layer in model.model.layers:
        for module in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            cut_columns(module, kept)
        cut_columns(layer.mlp.gate_proj, kept)
        cut_columns(layer.mlp.up_proj, kept)
        cut_rows(layer.self_attn.o_proj, kept)
        cut_rows(layer.mlp.down_proj, kept)
    norms = [n for layer in model.model.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
    for norm in [*norms, model.model.norm]:
        norm.weight = nn.Parameter(norm.weight.detach()[kept], requires_grad=False)
    model.model.embed_tokens.weight = nn.Parameter(
        model.model.embed_tokens.weight.detach()[:, kept], requires_grad=False
    )
    cut_columns(model.lm_head, kept)
    checkpoint = sliced.opened(model, family_of)
    assert (checkpoint.shape.hidden, len(checkpoint.shape.blocks)) == (24, 2)
    found = Pruner(checkpoint).model(PruningPlan.identity(checkpoint.shape))
    assert close(logits(found, tokens()), logits(model, tokens()))


def test_maps_that_do_not_fit_together_are_named() -> None:
    half = tiny("llama-mha")
    cut_rows(half.model.layers[1].self_attn.q_proj, list(range(30)))
    with pytest.raises(FlexiError, match=r"block 1: expected whole heads of 4 rows, found 30 rows of queries"):
        sliced.opened(half, family_of)
    lonely = tiny("llama")
    cut_rows(lonely.model.layers[2].self_attn.k_proj, list(range(12)))
    with pytest.raises(FlexiError, match="block 2: expected every KV head to have as many query heads"):
        sliced.opened(lonely, family_of)
    uneven = tiny("llama")
    cut_columns(uneven.model.layers[0].mlp.down_proj, list(range(20)))
    with pytest.raises(
        FlexiError, match=r"mlp.down_proj.weight': expected \(32, 24\) to fit the others, found \(32, 20\)"
    ):
        sliced.opened(uneven, family_of)


# ------------------------------------------------------------------------------------------------- LLM-Pruner


def saved_by_llm_pruner(path: Path) -> nn.Module:
    """Save a pruned module and its tokenizer as LLM-Pruner does, with the configuration of the model before."""
    tokenizer = byte_tokenizer()
    model = tiny("llama-mha", vocab_size=len(tokenizer))
    for block in (1, 2, 3):
        cut(model, block, [0, 2, 3, 5, 6, 7], list(range(0, 24, 2)))
    torch.save({"model": model, "tokenizer": tokenizer}, path)
    return model


def test_what_llm_pruner_saved_becomes_a_folder_where_asked_for(tmp_path: Path, capsys: Any) -> None:
    model = saved_by_llm_pruner(tmp_path / "pytorch_model.bin")
    llm_pruner.main([str(tmp_path / "pytorch_model.bin"), str(tmp_path / "pruned"), "--allow-pickle"])
    assert f"parameters in 5 blocks, written to {tmp_path / 'pruned'}" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())
    assert close(logits(loaded, tokens()), logits(model, tokens()))
    said = AutoTokenizer.from_pretrained(tmp_path / "pruned")("The first.")["input_ids"]
    assert said == byte_tokenizer()("The first.")["input_ids"]
    assert not list((tmp_path / "pruned").glob("*.bin"))


def test_classes_that_are_here_no_more_are_stood_in_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of transformers' older releases, of LLM-Pruner's own code where it is not here, and of nothing else."""
    modeling = sys.modules["transformers.models.llama.modeling_llama"]

    class LlamaSdpaAttention(modeling.LlamaAttention):  # type: ignore[name-defined, misc]
        pass

    LlamaSdpaAttention.__qualname__, LlamaSdpaAttention.__module__ = "LlamaSdpaAttention", modeling.__name__
    model = saved_by_llm_pruner(tmp_path / "plain.bin")
    with monkeypatch.context() as older:
        older.setattr(modeling, "LlamaSdpaAttention", LlamaSdpaAttention, raising=False)
        older.setitem(sys.modules, "LLMPruner", ModuleType("LLMPruner"))
        older.setitem(sys.modules, "LLMPruner.models", ModuleType("LLMPruner.models"))
        older.setitem(sys.modules, "elsewhere", ModuleType("elsewhere"))
        for layer in model.model.layers:
            layer.self_attn.__class__ = LlamaSdpaAttention
        torch.save({"model": model}, tmp_path / "older.bin")
        for package in ("LLMPruner.models", "elsewhere"):
            theirs = type("LlamaForCausalLM", (type(model),), {"__module__": package})
            older.setattr(sys.modules[package], "LlamaForCausalLM", theirs, raising=False)
            model.__class__ = theirs
            torch.save({"model": model}, tmp_path / f"{package}.bin")
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in ("older", "LLMPruner.models"):
        checkpoint, tokenizer = llm_pruner.read(tmp_path / f"{name}.bin", allow_pickle=True)
        assert tokenizer is None
        assert all(expected[n] == shape for n, shape in checkpoint.tensor_names().items())
    with pytest.raises(FlexiError, match=r"the code of its classes is not here .*elsewhere"):
        llm_pruner.read(tmp_path / "elsewhere.bin", allow_pickle=True)


class Elsewhere:
    """A tensor that lies on a GPU."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.shape = tensor, tensor.shape

    def cpu(self) -> torch.Tensor:
        return self.tensor


def test_what_is_read_of_a_model_on_a_gpu_is_on_the_cpu() -> None:
    """As it is where weights come from files: pinning them, and scores made of them, ask for it."""
    model = sliced.opened(tiny("llama"), family_of)
    away = {name: Elsewhere(model.read(name)) for name in model.tensor_names()}
    moved: Any = sliced.SlicedModel("moved", model.config, model.family, cast(Any, away), model.shape)
    assert all(moved.read(name) is away[name].tensor for name in away)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_a_pickle_is_not_opened_unless_asked_for(tmp_path: Path, capsys: Any) -> None:
    file, mark = tmp_path / "pytorch_model.bin", tmp_path / "ran"
    torch.save({"model": Trap(mark)}, file)
    with pytest.raises(FlexiError, match="is a pickle: opening it runs whatever code its maker put into it"):
        llm_pruner.read(file)
    with pytest.raises(SystemExit) as end:
        llm_pruner.main([str(file), str(tmp_path / "pruned")])
    assert end.value.code == 2
    assert "--allow-pickle" in capsys.readouterr().err
    assert not mark.exists()
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"state_dict": {}}, "expected LLM-Pruner's model and tokenizer, found a mapping of state_dict"),
        ([1, 2], "expected LLM-Pruner's model and tokenizer, found list"),
        (None, "it cannot be read: "),
    ],
)
def test_another_file_is_named(content: Any, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "other.bin"
    if content is None:
        file.write_bytes(b"no pickle")
    else:
        torch.save(content, file)
    with pytest.raises(FlexiError, match=problem) as found:
        llm_pruner.convert(file, tmp_path / "pruned", allow_pickle=True)
    assert str(file) in str(found.value)
    with pytest.raises(FlexiError, match="there is no file"):
        llm_pruner.read(tmp_path / "none.bin", allow_pickle=True)
    with pytest.raises(FlexiError, match="exists already"):
        llm_pruner.convert(file, tmp_path, allow_pickle=True)


# ---------------------------------------------------------------------------------------------------- lm-eval

DOCUMENTS = [
    {"question": "What comes after one?", "choices": ["two", "ten", "none"], "answer": 0},
    {"question": "The opposite of hot is", "choices": ["warm", "cold"], "answer": 1},
    {"question": "A b c", "choices": ["d", "e", "f", "g"], "answer": 0},
]
TASK = {
    "task": "questions",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}


def pruned_folder(model: Path, folder: Path, uniform: bool) -> PruningPlan:
    """Write a pruned model: without two of its blocks, or with blocks of different width."""
    checkpoint = Checkpoint.from_folder(model, Plugins.load().family)
    shape = checkpoint.shape
    gone: dict[tuple[int, str], list[int]] = {
        (1, "attention"): [0, 3],
        (2, "mlp"): [1, 2, 5],
        (4, "mlp"): list(range(50)),
    }
    plan = PruningPlan.keep(shape, [0, 1, 3, 5]) if uniform else without_units(shape, gone)
    write_checkpoint(plan, checkpoint, None, folder)
    return plan


def run_lm_eval(scratch: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run lm-eval's command line in a process of its own, through the module that adds our model to it."""
    (scratch / "documents.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    definition = {**TASK, "dataset_kwargs": {"data_files": {"test": str(scratch / "documents.jsonl")}}}
    (scratch / "tasks").mkdir()
    (scratch / "tasks" / "questions.yaml").write_text(json.dumps(definition))
    command = [sys.executable, "-m", "flexi_plugins.integrations.lm_eval", "run", "--model", "flexi", *arguments]
    command += ["--tasks", "questions", "--include_path", str(scratch / "tasks"), "--device", "cpu"]
    command += ["--output_path", str(scratch / "results"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(scratch / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, check=False)


def choice_logprob(model: nn.Module, tokenizer: Any, question: str, choice: str) -> float:
    """Return the log-probability of a choice after its question: plain transformers."""
    before, whole = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (question, f"{question} {choice}"))
    start = before.shape[1]
    found = logits(model, whole)[0].log_softmax(-1)[start - 1 : -1]
    return float(found.gather(1, whole[0, start:, None]).sum())


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "blocks-of-different-width"])
def test_lm_evals_command_line_judges_a_pruned_folder(model: Path, uniform: bool, tmp_path: Path) -> None:
    plan = pruned_folder(model, tmp_path / "pruned", uniform)
    done = run_lm_eval(tmp_path, "--model_args", f"pretrained={tmp_path / 'pruned'},dtype=float32")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "questions" in done.stdout, "lm-eval prints its table"

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32).eval()
    assert isinstance(loaded, LlamaForCausalLM) == uniform
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "pruned")
    expected = [[choice_logprob(loaded, tokenizer, d["question"], c) for c in d["choices"]] for d in DOCUMENTS]
    [samples] = (tmp_path / "results").rglob("samples_questions_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    found = [[float(answer[0][0]) for answer in row["resps"]] for row in rows]
    assert [len(f) for f in found] == [len(e) for e in expected]
    for mine, theirs in zip(expected, found, strict=True):
        assert theirs == pytest.approx(mine, abs=1e-3)

    [file] = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(file.read_text())
    right = [e.index(max(e)) == d["answer"] for e, d in zip(expected, DOCUMENTS, strict=True)]
    assert results["results"]["questions"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert results["config"]["flexi_plan"] == plan.hash
    assert results["config"]["flexi_ratio"] == pytest.approx(plan.ratio)


def test_lm_evals_command_line_ends_with_our_error_where_there_is_no_such_model(tmp_path: Path) -> None:
    done = run_lm_eval(tmp_path, "--model_args", "pretrained=smollm2-135")
    assert done.returncode == 2, done.stderr[-3000:]
    assert "error: unknown model 'smollm2-135': did you mean 'smollm2-135m'?" in done.stderr
    assert "Traceback" not in done.stderr
