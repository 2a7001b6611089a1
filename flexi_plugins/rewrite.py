"""Plan + weights -> a model in memory (unchanged blocks share storage) or a checkpoint folder (streamed)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedConfig

from flexi_plugins.checkpoint import Checkpoint, LazyTensors, new_folder, read_ahead, write_tensors
from flexi_plugins.data import BlockRecipe, Family, Part, PruningPlan, Weighted
from flexi_plugins.errors import FlexiError
from flexi_plugins.files import write_tensor_file
from flexi_plugins.modeling import FlexiConfig, FlexiForCausalLM, resized_config, unfilled

Tensors = Mapping[str, Tensor]
PLAN_FILE = "plan.json"
PLAN_TENSORS = "plan.tensors"  # a safetensors file, but none that other loaders would take for weights


# ----------------------------------------------------------------------------------------------- blocks


def block_tensors(plan: PruningPlan, position: int, checkpoint: Checkpoint, attached: Tensors) -> dict[str, Tensor]:
    """Return the state dict of one block of the plan's model, by names inside the block.

    A sharing block has no linear weights of its own: only its norms, biases, adapters and output norms.
    """
    return dict(_lazy_block(plan, position, checkpoint, attached))


def _lazy_block(plan: PruningPlan, position: int, checkpoint: Checkpoint, attached: Tensors) -> LazyTensors:
    """Return the state dict of a block, of which each tensor is made when it is asked for."""
    recipe, family = plan.blocks[position], checkpoint.family
    shape = plan.block_shape(recipe)
    readers: dict[str, Callable[[], Tensor]] = {}
    if recipe.shares is None:
        for role in plan.shape.maps(shape):
            readers[f"{family.ROLES[role]}.weight"] = partial(_weight, plan, recipe, role, checkpoint)
    for name in plan.shape.vectors(shape):
        readers[family.vector(name)] = partial(_vector, plan, recipe, name, checkpoint)
    prefix = f"blocks.{position}."
    for name in attached:
        if name.startswith(prefix):
            readers[_attached_name(name.removeprefix(prefix), family)] = partial(attached.__getitem__, name)
    return LazyTensors(readers)


def _attached_name(name: str, family: Family) -> str:
    """Map ``ROLE.lora_a`` or ``attention.output_norm`` to a name inside the block."""
    role, _, rest = name.partition(".")
    if role in family.ROLES:
        return f"{family.ROLES[role]}.{rest}"
    if role in ("attention_norm", "mlp_norm") or role.startswith("head_norm_"):
        return family.vector(name)
    if name in ("attention.output_norm", "mlp.output_norm"):
        return f"{family.attention if role == 'attention' else family.mlp}.output_norm.weight"
    raise FlexiError(
        f"plan: attached tensor {name!r} has no place in a block; expected ROLE.lora_a, ROLE.lora_b, *.output_norm, or "
        "ROLE.weight, ROLE.bias and norms of a block's own"
    )


def _weight(plan: PruningPlan, recipe: BlockRecipe, role: str, checkpoint: Checkpoint) -> Tensor:
    def read(source: int) -> Tensor:
        family = checkpoint.family
        return checkpoint.read(f"{family.block_prefix(source)}{family.ROLES[role]}.weight")

    if recipe.mix:
        return _weighted(recipe.mix, read)
    return _concatenated(plan, recipe, role, read, 1 if role in ("attention_output", "down") else 0)


def _concatenated(
    plan: PruningPlan, recipe: BlockRecipe, role: str, read: Callable[[int], Tensor], dimension: int
) -> Tensor:
    """Return the units of the parts one after the other; each source is read once, and one of them held at a time."""
    taken: dict[int, Tensor | None] = {}  # position of a part -> its rows
    for position, part in enumerate(recipe.parts):
        rows = part_rows(plan, part, role)
        if rows is None or len(rows):
            taken[position] = rows
    pieces: dict[int, Tensor] = {}
    for source in dict.fromkeys(recipe.parts[position].source for position in taken):
        tensor = read(source)
        for position, rows in taken.items():
            if recipe.parts[position].source == source:
                pieces[position] = tensor if rows is None else tensor.index_select(dimension, rows.to(tensor.device))
        del tensor
    ordered = [pieces[position] for position in sorted(pieces)]
    return ordered[0] if len(ordered) == 1 else torch.cat(ordered, dimension)


def part_rows(plan: PruningPlan, part: Part, role: str) -> Tensor | None:
    """Return the rows (columns for output maps) of a map that a part takes; None for all of them."""
    if part.query_heads is not None and role in ("query", "attention_output"):
        width = plan.shape.blocks[part.source].head_dim
        return (torch.tensor(part.query_heads)[:, None] * width + torch.arange(width)).flatten()
    return unit_rows(plan, part.source, role, part.channels if role in ("gate", "up", "down") else part.kv_heads)


def unit_rows(plan: PruningPlan, source: int, role: str, units: tuple[int, ...] | None) -> Tensor | None:
    """Return the rows (columns for output maps) of a map that belong to units of an old block; None for all of them.

    KV head k owns the query heads k * group .. (k + 1) * group - 1.
    """
    if units is None:
        return None
    block = plan.shape.blocks[source]
    index = torch.tensor(units, dtype=torch.long)
    if role in ("gate", "up", "down"):
        return index
    width = block.head_dim if role in ("key", "value") else block.head_dim * block.group
    return (index[:, None] * width + torch.arange(width)).flatten()


def _vector(plan: PruningPlan, recipe: BlockRecipe, name: str, checkpoint: Checkpoint) -> Tensor:
    """Norms and output biases are weighted sums of blocks'; other biases go with their units, and all with a mix."""

    def read(source: int) -> Tensor:
        family = checkpoint.family
        return checkpoint.read(family.block_prefix(source) + family.vector(name))

    role = name.removesuffix(".bias")
    if name in ("attention_norm", "mlp_norm"):
        return _weighted(recipe.norm_weights, read)
    if recipe.mix and role != name:
        return _weighted(recipe.mix, read)
    if role == name or role in ("attention_output", "down"):
        return _weighted(recipe.bias_weights, read)
    return _concatenated(plan, recipe, role, read, 0)


def _weighted(terms: Weighted, read: Callable[[int], Tensor]) -> Tensor:
    """Return the weighted sum, formed in float32, in the first term's dtype; one term is held at a time."""
    (source, coefficient), *rest = terms
    tensor = read(source)
    if not rest and coefficient == 1.0:
        return tensor
    dtype, total = tensor.dtype, coefficient * tensor.float()
    del tensor
    for source, coefficient in rest:
        total += coefficient * read(source).float()
    return total.to(dtype)


class PlanWeights:
    """The linear maps of a plan's model, read lazily (see ``Weights``): what metrics and strategies are handed."""

    def __init__(self, plan: PruningPlan, checkpoint: Checkpoint, attached: Tensors) -> None:
        self.plan, self.checkpoint, self.attached = plan, checkpoint, attached

    def block(self, index: int) -> LazyTensors:
        """Return the linear maps of a block by role; for a sharing block the donor's, with its adapters added.

        Each is read, and made, when it is asked for.
        """
        roles = self.plan.shape.maps(self.plan.block_shape(self.plan.blocks[index]))
        return LazyTensors({role: partial(self._map, index, role) for role in roles})

    def _map(self, index: int, role: str) -> Tensor:
        recipe = self.plan.blocks[index]
        if f"{role}.weight" in recipe.own:
            return self.attached[f"blocks.{index}.{role}.weight"]
        if recipe.shares is None:
            return _weight(self.plan, recipe, role, self.checkpoint)
        donor = self.plan.donor(index)
        assert donor is not None
        weight = self._map(donor, role)
        a, b = (self.attached.get(f"blocks.{index}.{role}.{x}") for x in ("lora_a", "lora_b"))
        return weight if a is None or b is None else weight + a @ b

    def vectors(self, index: int) -> LazyTensors:
        """Return the norms and biases of a block by name, read when they are asked for."""
        recipe, family = self.plan.blocks[index], self.checkpoint.family
        names = (
            *self.plan.shape.vectors(self.plan.block_shape(recipe)),
            *(f"{r}.bias" for r in self.plan.added_biases(recipe)),
        )
        tensors = _lazy_block(self.plan, index, self.checkpoint, self.attached)
        return LazyTensors({name: partial(tensors.__getitem__, family.vector(name)) for name in names})

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return ``make()``, computed once per checkpoint, plan and key."""
        return self.checkpoint.cached((self.plan.hash, key), make)


# ------------------------------------------------------------------------------------------ whole models


def check_attached(plan: PruningPlan, attached: Tensors) -> None:
    """Raise unless every tensor that the plan's adapters and output norms need is there."""
    missing = [n for n in needed_tensors(plan) if n not in attached]
    assert set(attached) == set(dict(plan.tensors)), "a plan says the digests of its tensors: see with_digests"
    if missing:
        raise FlexiError(
            f"plan: {len(missing)} attached tensors are missing ({missing[0]}, ...); they lie beside the plan "
            f"({PLAN_TENSORS} in a folder), or its strategy makes them"
        )


def needed_tensors(plan: PruningPlan) -> list[str]:
    """Return the names of the new tensors that the plan's blocks run with: adapters, output norms, and those of their own."""
    names = [f"outer.{name}" for name in plan.own]
    for position, recipe in enumerate(plan.blocks):
        block = plan.block_shape(recipe)
        names += [f"blocks.{position}.{name}" for name in recipe.own]
        if recipe.rank:
            names += [f"blocks.{position}.{r}.{x}" for r in plan.shape.maps(block) for x in ("lora_a", "lora_b")]
        if recipe.output_norm:
            names += [f"blocks.{position}.attention.output_norm"] * bool(block.kv_heads)
            names += [f"blocks.{position}.mlp.output_norm"] * bool(block.channels)
    return names


def state_dict(
    plan: PruningPlan, checkpoint: Checkpoint, attached: Tensors, fold: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield the state dict of the plan's model tensor by tensor, in the order of the model; none of them is kept.

    fold: have the plan's gains in the weights, for a model that knows of none. Blocks normalise what enters them, so a
    stream that is c times as large from the embedding on goes through the same computations if every block in front of a
    gain adds c times as much (Prune&Comp, arXiv 2507.18212); exact up to the epsilon of the norms. A head that is tied to
    the embedding grows with it, for which the final norm makes up.
    """
    check_attached(plan, attached)
    first, final, *head = checkpoint.outer_names()
    total = plan.total_gain
    own = {name: attached[f"outer.{name}"] for name in plan.own}

    def outer(name: str, kind: str) -> Tensor:
        return own[kind] if kind in own else checkpoint.read(name)

    yield first, _scaled(outer(first, "embedding"), total if fold else 1.0)
    for position in range(len(plan.blocks)):
        to_come = math.prod(r.gain for r in plan.blocks[position + 1 :])
        prefix = checkpoint.family.block_prefix(position)
        tensors = _lazy_block(plan, position, checkpoint, attached)
        outgoing = tuple(checkpoint.family.ROLES[role] + "." for role in ("attention_output", "down"))
        for name in tensors:
            yield prefix + name, _scaled(tensors[name], to_come if fold and name.startswith(outgoing) else 1.0)
    gain = plan.final_norm_gain / (total if checkpoint.shape.tied else 1.0)
    yield final, _scaled(outer(final, "final_norm"), gain if fold else 1.0)
    for name in head:
        yield name, outer(name, "head")


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else (tensor.float() * factor).to(tensor.dtype)


def model_config(plan: PruningPlan, checkpoint: Checkpoint, fold: bool = False) -> PreTrainedConfig:
    """Return the configuration of the plan's model: the original architecture where that can hold it, else FlexiConfig.

    fold: gains are in the weights (see ``state_dict``), so that the original architecture can hold the model. A Llama
    whose hidden size its number of heads does not divide becomes a Mistral without sliding window, which computes the
    same and does not refuse it.
    """
    base = checkpoint.config
    if plan.not_plain() or (plan.has_gains and not fold):
        return FlexiConfig.of_plan(plan, base, checkpoint.family)
    block = plan.new_shape.blocks[0]
    config = resized_config(base, len(plan.blocks))
    values = {
        **config.to_dict(),
        "head_dim": block.head_dim,
        "num_attention_heads": block.query_heads,
        "num_key_value_heads": block.kv_heads,
        "intermediate_size": block.channels,
    }
    if values.get("layer_types"):
        values["layer_types"] = [b.attention_type for b in plan.new_shape.blocks]
    if base.model_type == "llama" and plan.shape.hidden % block.query_heads:
        if plan.shape.qkv_bias or plan.shape.mlp_bias:
            return FlexiConfig.of_plan(plan, base, checkpoint.family)
        for key in ("model_type", "attention_bias", "mlp_bias", "pretraining_tp", "architectures"):
            values.pop(key, None)
        return MistralConfig.from_dict({**values, "sliding_window": None, "architectures": ["MistralForCausalLM"]})
    return type(base).from_dict(values)


def plain_reason(plan: PruningPlan, checkpoint: Checkpoint) -> str | None:
    """Say why the plan's model is not a plain transformers folder; None if it is one."""
    reason = plan.not_plain()
    if reason is None and isinstance(model_config(plan, checkpoint, fold=True), FlexiConfig):
        return "the number of heads does not divide the hidden size, and only Llama without biases has a twin that allows it"
    return reason


def build_model(
    plan: PruningPlan, checkpoint: Checkpoint, attached: Tensors | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Return the plan's model in memory, in one dtype (default: that of the stored embedding).

    What is stored in it and unchanged shares the checkpoint's storage.
    """
    config = model_config(plan, checkpoint)
    with unfilled():
        make = FlexiForCausalLM if isinstance(config, FlexiConfig) else AutoModelForCausalLM.from_config
        model = make(config)
    state = dict(state_dict(plan, checkpoint, attached or {}))
    dtype = dtype or state[checkpoint.outer_names()[0]].dtype
    state = _copy_repeated({name: tensor.to(dtype) for name, tensor in state.items()})
    if checkpoint.shape.tied:
        state[f"{checkpoint.family.head}.weight"] = state[checkpoint.outer_names()[0]]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    config.dtype = model.config.dtype = dtype
    return model.eval().requires_grad_(False)


def _copy_repeated(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, with a copy for each that shares memory with one before it (a block that is there twice)."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        place = tensor.data_ptr()
        result[name] = tensor.clone() if place in seen and tensor.numel() else tensor
        seen.add(place)
    return result


def write_checkpoint(
    plan: PruningPlan, checkpoint: Checkpoint, attached: Tensors | None, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Write the plan's model as a checkpoint folder, tensor by tensor, with the plan beside it; renamed when whole.

    Gains are folded into the weights of a plain folder; in any other they are in its configuration. The next tensor is
    made while one is written, so two are held at a time, and what goes into them. A plan that uses each source once
    reads each tensor once.
    """
    attached = attached or {}
    config = model_config(plan, checkpoint, fold=True)

    def converted(item: tuple[str, Tensor]) -> tuple[str, Tensor]:
        return item[0], item[1] if dtype is None else item[1].to(dtype)

    with new_folder(Path(folder)) as temporary:
        fold = not isinstance(config, FlexiConfig)
        write_tensors(temporary, read_ahead(map(converted, state_dict(plan, checkpoint, attached, fold))))
        if dtype is not None:
            config.dtype = dtype
        _write_config(temporary, config)
        (temporary / PLAN_FILE).write_text(json.dumps(plan.to_json(), indent=1) + "\n")
        if attached:
            write_tensor_file(temporary / PLAN_TENSORS, attached)
        _copy_beside(checkpoint, temporary)


def _write_config(folder: Path, config: PreTrainedConfig) -> None:
    """Save config.json; rope_theta is written both ways, since releases before 5 ignore rope_parameters and use 10000."""
    config.save_pretrained(folder)
    file = folder / "config.json"
    values = json.loads(file.read_text())
    rope = values.get("rope_parameters") or {}
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        values["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
        file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _copy_beside(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy what belongs to the model but is neither weights nor configuration: tokenizer files, generation settings."""
    if checkpoint.folder is None:
        return
    for file in sorted(checkpoint.folder.iterdir()):
        other = file.name in ("config.json", PLAN_FILE) or file.name.endswith(".index.json")
        if file.is_file() and not other and file.suffix in (".json", ".jinja", ".model", ".txt"):
            (folder / file.name).write_bytes(file.read_bytes())


def read_attached(plan: PruningPlan, path: Path) -> dict[str, Tensor]:
    """Read the tensors that were saved with a plan; others than the plan's digests say are an error."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        attached = load_file(path)
    except (SafetensorError, OSError) as error:
        raise FlexiError(f"plan: cannot read its tensors in {path}: {error}") from None
    found, wanted = dict(with_digests(plan, attached).tensors), dict(plan.tensors)
    wrong = sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))
    if wrong:
        raise FlexiError(f"plan: {path} holds other tensors than the plan was saved with: {wrong[0]}, ...")
    return attached


def with_digests(plan: PruningPlan, attached: Tensors) -> PruningPlan:
    """Return the plan with the digests of its attached tensors."""
    from flexi_plugins.digests import tensor_digest

    return replace(plan, tensors=tuple(sorted((n, tensor_digest(t)) for n, t in attached.items())))
