"""LoRA on every linear map of a pruned model, merged into the weights at the end: LLM-Pruner's recovery (arXiv 2305.11627).

From the authors' code (post_training.py and its README): rank 8, alpha 16, dropout 0.05, learning rate 1e-4, on the maps
q, k, v, o, gate, up and down, AdamW, the gradient clipped to 1, the state with the lowest held-out loss kept, and 100
steps of warm-up in 1,555, here a share, and a linear schedule. Theirs are steps of 64 texts of up to 256 tokens; ours are
smaller (see ``TrainingOptions``).

Where blocks share weights: the LoRA of a donor's map is that of all blocks which run with it, in training as after the
merge, and what those blocks have of their own, adapters and the gains of output norms, is trained as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from flexi_plugins.data import Family
from flexi_plugins.errors import FlexiError, unknown
from flexi_plugins.hookspecs import Recovered, RecoveryMethod, RecoveryRequest, hookimpl
from flexi_plugins.recovery.copies import trainable, working_copy
from flexi_plugins.recovery.options import Schedule, TrainingOptions
from flexi_plugins.recovery.training import seeded, train

if TYPE_CHECKING:
    from torch import Tensor, nn

ADAPTER = "default"  # peft's name for the only one
OWN = ("lora_a", "lora_b")  # the adapters of a map that runs with another's weight
Layers = Mapping[str, Any]
"""peft's LoRA layers by the names of the linear maps that they are around."""


@dataclass(frozen=True)
class Lora(TrainingOptions):
    """Train a low-rank update B A alpha / rank of every linear map of the blocks, and add it to the weights.

    maps: the roles of the maps that get one. learning_rate: the authors', for 1,555 steps; a few dozen steps learn far more at a
    much higher one.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    maps: tuple[str, ...] = tuple(Family.ROLES)
    learning_rate: float = 1e-4
    schedule: Schedule = "linear"
    warm_up: float = 0.06

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "LLM-Pruner, arXiv 2305.11627"

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with each option."""
        yield from super().problems()
        if self.rank < 1:
            yield f"rank = {self.rank}, expected 1 or more"
        if not 0 <= self.dropout < 1:
            yield f"dropout = {self.dropout}, expected 0 <= dropout < 1"
        if not self.maps:
            yield f"maps is empty, expected some of {', '.join(Family.ROLES)}"
        yield from (unknown("map", role, Family.ROLES) for role in self.maps if role not in Family.ROLES)

    def recover(self, request: RecoveryRequest) -> Recovered:
        """Return the model with the trained updates merged in: the same modules, and as many parameters."""
        own = own_adapters(request.model, self.maps) + output_gains(request.model)
        names = linear_maps(request.model, self.maps)
        if not names and not own:
            raise FlexiError(f"{self.name}: the model has none of the maps {', '.join(self.maps)}; name others in maps")
        model = working_copy(request.model, own, request.dtype)
        with seeded(request.seed, request.device):
            layers = add_lora(model, names, self.rank, self.alpha, self.dropout)
        trained = train(request, model, self, self.name)
        return trained.recovered(request, merged(request.model, layers) | only(trainable(model), own))


def linear_maps(model: nn.Module, roles: Collection[str] = tuple(Family.ROLES)) -> list[str]:
    """Return the names of the linear maps of a model's blocks that have these roles and a weight of their own."""
    from torch import nn

    ends = tuple(f".{Family.ROLES[role]}" for role in roles)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.endswith(ends)]


def own_adapters(model: nn.Module, roles: Collection[str] = tuple(Family.ROLES)) -> list[str]:
    """Return the names of the adapters that maps with these roles have of their own, beside the weight of another."""
    ends = tuple(f".{Family.ROLES[role]}.{kind}" for role in roles for kind in OWN)
    return [name for name, _ in model.named_parameters() if name.endswith(ends)]


def output_gains(model: nn.Module) -> list[str]:
    """Return the names of the gains of the output norms that replaced blocks have."""
    return [name for name, _ in model.named_parameters() if name.endswith(".output_norm.weight")]


def only(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors of these names."""
    return {name: tensors[name] for name in names}


def add_lora(model: nn.Module, names: Collection[str], rank: int, alpha: float, dropout: float) -> Layers:
    """Put peft's LoRA layers around linear maps of a model, in place; their parameters are float32 and require gradients.

    Maps that run with the weight of another, their ``donor`` (``modeling.AdaptedLinear``), run with its LoRA as well.
    What required gradients before still does. Names of the parameters inside a layer change.
    """
    if not names:
        return {}
    from peft import LoraConfig, inject_adapter_in_model

    before = trainable(model)
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(names)), model
    )
    for parameter in before.values():
        parameter.requires_grad_(True)
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    for layer in layers.values():
        for factor in (layer.lora_A, layer.lora_B):
            factor.float().requires_grad_(True)
    wrapped = {id(layer.get_base_layer()): layer for layer in layers.values()}
    for module in model.modules():
        layer = wrapped.get(id(getattr(module, "donor", None)))
        if layer is not None:
            module.register_forward_hook(partial(_with_update, layer))
    return layers


def _with_update(layer: Any, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Add what a LoRA layer adds to its own map, to the output of another that runs with the same weight."""
    inner = layer.lora_dropout[ADAPTER](arguments[0].to(layer.lora_A[ADAPTER].weight.dtype))
    update = layer.lora_B[ADAPTER](layer.lora_A[ADAPTER](inner)) * layer.scaling[ADAPTER]
    return output + update.to(output.dtype)


def merged(model: nn.Module, layers: Layers) -> dict[str, Tensor]:
    """Return the weights of a model with the updates of LoRA layers added in float32: name -> (rows, columns)."""
    weights = {}
    for name, layer in layers.items():
        weight = model.get_parameter(f"{name}.weight").detach()
        update = layer.get_delta_weight(ADAPTER).detach()
        weights[f"{name}.weight"] = weight.float() + update.float().to(weight.device)
    return weights


@hookimpl
def recovery_methods() -> list[RecoveryMethod]:
    """Return the lora method."""
    return [Lora()]
