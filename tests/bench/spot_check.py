"""Whether a written checkpoint holds what its plan says: a few tensors against the source's, read with safetensors alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from flexi_plugins.checkpoint import INDEX, Checkpoint
from flexi_plugins.data import BlockRecipe, PruningPlan

Read = Callable[[str], Tensor | None]


def spot_check(plan: PruningPlan, source: Checkpoint, folder: Path) -> None:
    """Raise an AssertionError if a changed block, the first, or the last one, or the head is not as the plan says."""
    assert source.folder is not None
    old, new = reader(source.folder), reader(folder)
    changed = [p for p, r in enumerate(plan.blocks) if r.whole is None]
    for position in {0, len(plan.blocks) - 1, *changed[:1], *changed[-1:]}:
        check_block(plan, position, old, new)
    expect(equal(new("lm_head.weight"), old("lm_head.weight")), folder, "lm_head.weight")
    last = f"model.layers.{len(plan.blocks)}.input_layernorm.weight"
    expect(new(last) is None, folder, last)


def check_block(plan: PruningPlan, position: int, old: Read, new: Read) -> None:
    """Compare the query map, the down map and the norm of one block with what its recipe takes from the source."""
    recipe, prefix = plan.blocks[position], f"model.layers.{position}."
    norm, query, down = (f"{prefix}{n}.weight" for n in ("input_layernorm", "self_attn.q_proj", "mlp.down_proj"))
    expect(new(norm) is not None, position, norm)
    if recipe.shares is not None:
        check_adapters(recipe, prefix + "mlp.down_proj", old, new)
        return
    expect(equal(new(query), taken(plan, recipe, "self_attn.q_proj", old)), position, query)
    expect(equal(new(down), taken(plan, recipe, "mlp.down_proj", old)), position, down)


def taken(plan: PruningPlan, recipe: BlockRecipe, role: str, old: Read) -> Tensor:
    """Return the rows of the query map (columns of the down map) that a recipe's parts name, concatenated."""
    pieces = []
    for part in recipe.parts:
        weight = old(f"model.layers.{part.source}.{role}.weight")
        assert weight is not None
        if role == "mlp.down_proj":
            pieces.append(weight if part.channels is None else weight[:, list(part.channels)])
        else:
            heads = weight.unflatten(0, (plan.shape.blocks[part.source].kv_heads, -1))
            pieces.append((heads if part.kv_heads is None else heads[list(part.kv_heads)]).flatten(0, 1))
    return torch.cat(pieces, 1 if role == "mlp.down_proj" else 0)


def check_adapters(recipe: BlockRecipe, name: str, old: Read, new: Read) -> None:
    """Check that a sharing block stores no map of its own, and adapters that take its donor's map nearer to its own."""
    tail = name.split(".", 3)[3]
    own, donor = (old(f"model.layers.{i}.{tail}.weight") for i in (recipe.sources[0], recipe.shares))
    a, b = new(f"{name}.lora_a"), new(f"{name}.lora_b")
    assert own is not None
    assert donor is not None
    assert a is not None
    assert b is not None
    expect(new(f"{name}.weight") is None, name, "a map of its own")
    difference = own.float() - donor.float()
    left = difference - a.float() @ b.float()
    expect(float(left.norm()) < float(difference.norm()), name, "adapters")


def reader(folder: Path) -> Read:
    """Return a function from a tensor's name to the tensor, None where the folder has no such tensor."""
    index = folder / INDEX
    single = folder / "model.safetensors"
    files = json.loads(index.read_text())["weight_map"] if index.is_file() else None

    def read(name: str) -> Tensor | None:
        file = single if files is None else folder / files.get(name, next(iter(files.values())))
        with safe_open(file, framework="pt") as shard:
            return shard.get_tensor(name) if name in shard.keys() else None  # noqa: SIM118

    return read


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both tensors are there and equal."""
    return a is not None and b is not None and torch.equal(a, b)


def expect(holds: bool, where: object, name: str) -> None:
    """Raise unless it holds."""
    if not holds:
        raise AssertionError(f"{where}: {name} is not what the plan says")
