"""Tiny random models of every family, checkpoints over them, and random plans: what the numeric tests run on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from flexi_plugins.checkpoint import Checkpoint
from flexi_plugins.data import BlockRecipe, Family, ModelShape, Part, PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.families.llama import FAMILIES
from flexi_plugins.rewrite import build_model, needed_tensors, with_digests

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MIXED = ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-mha": {"model_type": "llama", "num_key_value_heads": 8},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "mistral-full": {"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-mixed": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED},
    "qwen3": {"model_type": "qwen3", "head_dim": 6},
    "qwen3-biases": {"model_type": "qwen3", "head_dim": 6, "attention_bias": True, "tie_word_embeddings": True},
}


def noting(shown: list[tuple[str, int, int]]) -> Any:
    """Return a ``progress`` that notes each stage in a list: title, the total it announced, and what was done of it."""

    @contextmanager
    def progress(title: str, total: int) -> Iterator[Any]:
        done: list[int] = []
        yield done.append
        shown.append((title, total, sum(done)))

    return progress


def family_of(config: Any) -> Family:
    """Return the family of a configuration, without any plugin manager."""
    if config.model_type not in FAMILIES:
        raise FlexiError(f"model type {config.model_type!r} is unknown")
    return FAMILIES[config.model_type]


def config_of(kind: str, **changes: Any) -> Any:
    """Return a tiny configuration."""
    values = {**SIZES, **KINDS[kind], **changes}
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][: values["num_hidden_layers"]]
    return AutoConfig.for_model(values.pop("model_type"), **values)


def tiny(kind: str = "llama", seed: int = 0, **changes: Any) -> nn.Module:
    """Return a tiny model in float32 whose norms and biases are not their trivial starting values."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(kind, **changes)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def opened(model: nn.Module) -> Checkpoint:
    """Return the checkpoint over a model in memory."""
    return Checkpoint.from_model(model, family_of)


def tokens(rows: int = 2, length: int = 12, seed: int = 0, vocabulary: int = SIZES["vocab_size"]) -> Tensor:
    """Return random token ids."""
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Return a model's logits."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def built(plan: PruningPlan, model: nn.Module, attached: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Return the plan's model of a model in memory."""
    return build_model(plan, opened(model), attached)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two tensors agree to a tolerance relative to their size."""
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


# ------------------------------------------------------------------------------------------- plans


def change(plan: PruningPlan, recipes: Mapping[int, BlockRecipe], **changes: Any) -> PruningPlan:
    """Return a plan with some of its recipes replaced."""
    blocks = tuple(recipes.get(i, r) for i, r in enumerate(plan.blocks))
    return PruningPlan(plan.shape, blocks, **changes)


def narrowed(shape: ModelShape, heads: Iterable[int] | None, channels: Iterable[int] | None) -> PruningPlan:
    """Return the plan that keeps the same units of every block."""
    kept = tuple(heads) if heads is not None else None, tuple(channels) if channels is not None else None
    return PruningPlan(shape, tuple(BlockRecipe(parts=(Part(i, *kept),)) for i in range(len(shape.blocks))))


def sharing(shape: ModelShape, pairs: Mapping[int, int], rank: int = 2) -> PruningPlan:
    """Return the plan whose blocks (keys) run with the weights of others (values)."""
    recipes = {
        b: BlockRecipe(parts=(Part(b),), shares=donor, rank=rank, output_norm=True) for b, donor in pairs.items()
    }
    return change(PruningPlan.identity(shape), recipes)


def attached_for(plan: PruningPlan, seed: int = 0) -> tuple[PruningPlan, dict[str, Tensor]]:
    """Return random tensors for the adapters and output norms of a plan, and the plan with their digests."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name in needed_tensors(plan):
        position, role = int(name.split(".")[1]), name.split(".")[2]
        block = plan.block_shape(plan.blocks[position])
        if name.endswith("output_norm"):
            size: tuple[int, ...] = (plan.shape.hidden,)
        else:
            rows, columns = plan.shape.maps(block)[role]
            rank = min(plan.blocks[position].rank, rows, columns)
            size = (rows, rank) if name.endswith("lora_a") else (rank, columns)
        made[name] = 0.2 * torch.randn(size, generator=generator)
    return with_digests(plan, made), made


def _units(rng: random.Random, width: int) -> tuple[int, ...] | None:
    if rng.random() < 0.3:
        return None
    return tuple(sorted(rng.sample(range(width), rng.randint(1, width))))


def random_plan(shape: ModelShape, rng: random.Random, closed: bool = True) -> PruningPlan:
    """Return a random valid plan: removal, width, merges, mixes, norms and gains.

    closed: without mixes of blocks, whose units no later plan could take.
    """
    kept = sorted(rng.sample(range(len(shape.blocks)), rng.randint(min(2, len(shape.blocks)), len(shape.blocks))))
    recipes = []
    while kept:
        first = kept.pop(0)
        second = kept[0] if kept else None
        recipe = _random_recipe(shape, rng, first, second, closed)
        if len(recipe.sources) == 2:
            kept.pop(0)
        recipes.append(recipe)
    if rng.random() < 0.3 and not any(len(r.sources) > 1 for r in recipes):
        position = rng.randrange(len(recipes))
        recipes[position] = replace(recipes[position], gain=rng.choice([0.5, 1.5]))
    return PruningPlan(shape, tuple(recipes))


def _random_recipe(shape: ModelShape, rng: random.Random, first: int, second: int | None, closed: bool) -> BlockRecipe:
    alike = second is not None and shape.blocks[first] == shape.blocks[second]
    norms = ((first, 0.4), (second, 0.6)) if second is not None and alike and rng.random() < 0.5 else ()
    biases = ((first, 0.3), (second, 0.7)) if second is not None and norms and rng.random() < 0.5 else ()
    choice = rng.random()
    if alike and choice < 0.3:
        parts = tuple(
            Part(b, _units(rng, shape.blocks[b].kv_heads), _units(rng, shape.blocks[b].channels))
            for b in (first, second)
            if b is not None
        )
        return BlockRecipe(parts=parts, norms=norms, biases=biases)
    if alike and choice < 0.45 and not closed:
        return BlockRecipe(mix=((first, 0.25), (second or 0, 0.75)), norms=norms, biases=biases)
    if choice < 0.6:
        return BlockRecipe(parts=(Part(first),))
    block = shape.blocks[first]
    return BlockRecipe(parts=(Part(first, _units(rng, block.kv_heads), _units(rng, block.channels)),))
