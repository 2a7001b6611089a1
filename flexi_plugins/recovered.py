"""From a recovered model back to a plan: what training changed becomes the plan's own tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from flexi_plugins.checkpoint import Checkpoint
from flexi_plugins.data import PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.execution.sweep import Planned
from flexi_plugins.numerics import all_finite
from flexi_plugins.rewrite import with_digests


def planned_of(model: nn.Module, planned: Planned, before: Mapping[str, Tensor], checkpoint: Checkpoint) -> Planned:
    """Return the plan of a recovered model: that of the pruned one, with the tensors that training changed as its own.

    before: the state dict of the pruned model. What is the same tensor there is unchanged, so that blocks which were not
    trained are still known to be equal to other plans'. Raise a FlexiError for a model with other tensors than that.
    """
    plan, after = planned.plan, model.state_dict()
    different = sorted(before.keys() ^ after.keys())
    if different:
        raise FlexiError(
            f"recovery: tensor {different[0]!r} is in {'the pruned' if different[0] in before else 'the recovered'} model "
            "alone; expected the modules of the pruned model (merge adapters into the weights)"
        )
    places = _places(plan, checkpoint)
    moved = {name: tensor for name, tensor in after.items() if tensor.data_ptr() != before[name].data_ptr()}
    placed = {tensor.data_ptr() for name, tensor in moved.items() if name in places}
    lost = sorted(name for name, tensor in moved.items() if name not in places and tensor.data_ptr() not in placed)
    if lost:  # a tied head has no place of its own, and is the embedding
        raise FlexiError(f"recovery: tensor {lost[0]!r} was changed, and a plan has no place for it; leave it as it is")
    changed = {places[name]: tensor for name, tensor in moved.items() if name in places}
    for name, tensor in changed.items():
        if not all_finite(tensor):
            raise FlexiError(f"recovery: the trained tensor {name!r} is not finite (NaN or infinity)")
    attached = {**planned.attached, **{n: t.detach().clone() for n, t in changed.items()}}
    own: dict[int, set[str]] = {}
    for name in changed:
        prefix, position, rest = (*name.split(".", 2), "")[:3]
        if prefix == "blocks" and not rest.endswith(("lora_a", "lora_b", "output_norm")):
            own.setdefault(int(position), set()).add(rest)
    blocks = tuple(
        replace(r, own=tuple(sorted({*r.own, *own.get(p, ())}))) if p in own else r for p, r in enumerate(plan.blocks)
    )
    outer = {name.removeprefix("outer.") for name in changed if name.startswith("outer.")}
    trained = replace(plan, blocks=blocks, own=tuple(sorted({*plan.own, *outer})), tensors=())
    return Planned(with_digests(trained, attached), attached)


def _places(plan: PruningPlan, checkpoint: Checkpoint) -> dict[str, str]:
    """Return where every tensor of the plan's model belongs in a plan: state-dict name -> name of an attached tensor."""
    family = checkpoint.family
    names = dict(zip(checkpoint.outer_names(), ("outer.embedding", "outer.final_norm", "outer.head"), strict=False))
    for position, recipe in enumerate(plan.blocks):
        shape, prefix = plan.block_shape(recipe), family.block_prefix(position)
        for role in plan.shape.maps(shape):
            path = prefix + family.ROLES[role]
            kinds = ("lora_a", "lora_b") if recipe.shares is not None else ("weight",)
            names |= {f"{path}.{kind}": f"blocks.{position}.{role}.{kind}" for kind in kinds}
        for role in plan.added_biases(recipe):
            names[f"{prefix}{family.ROLES[role]}.bias"] = f"blocks.{position}.{role}.bias"
        for name in plan.shape.vectors(shape):
            names[prefix + family.vector(name)] = f"blocks.{position}.{name}"
        for kind, module in (("attention", family.attention), ("mlp", family.mlp)):
            names[f"{prefix}{module}.output_norm.weight"] = f"blocks.{position}.{kind}.output_norm"
    return names
