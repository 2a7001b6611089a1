"""Copies of models to train: what is trained is cloned, all else shares its storage with the model that was handed in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from flexi_plugins.data import digest

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def working_copy(model: nn.Module, trained: Collection[str], dtype: str) -> nn.Module:
    """Return a copy of a model to train in a compute dtype: nothing that is done to it reaches the model.

    Parameters named in ``trained`` are cloned in float32 and require gradients. All others are frozen, in the compute
    dtype; those that have it already share the model's storage.
    """
    import torch

    compute = getattr(torch, dtype)

    def parameter(name: str, old: Tensor) -> Tensor:
        return old.to(torch.float32, copy=True) if name in trained else old.to(compute)

    return _copied(model, parameter, trained)


def replaced(model: nn.Module, tensors: Mapping[str, Tensor], seed: int | None = None) -> nn.Module:
    """Return a copy of a model with other parameters, in their stored dtype and device; all the rest is the same tensor.

    A parameter that its new value equals stays the same tensor too. With a seed values that the dtype cannot hold are
    rounded up or down at random (see ``stochastically_rounded``), else to the nearest.
    """
    import torch

    def parameter(name: str, old: Tensor) -> Tensor:
        if name not in tensors:
            return old
        new = tensors[name].detach().to(old.device).contiguous()
        if seed is not None:
            new = stochastically_rounded(new, old.dtype, seed_of(seed, name))
        new = new.to(old.dtype)
        return old if torch.equal(new, old) else new

    return _copied(model, parameter)


def seed_of(seed: int, name: str) -> int:
    """Return a seed for one parameter of many."""
    return int(digest([seed, name])[:12], 16)


def stochastically_rounded(values: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """Return float32 values rounded to one of the two nearest of bfloat16 or float16, each as likely as it is near.

    The mean is the value itself, so that of an update which is smaller than half a step of the dtype the expected part
    arrives, where rounding to nearest would leave nothing of it. What the dtype can hold stays as it is. Other dtypes: the
    values as they are.
    """
    import torch

    dropped = {torch.bfloat16: 16, torch.float16: 13}.get(dtype)  # bits of a float32's mantissa that are too many
    if dropped is None or values.dtype != torch.float32:
        return values
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(2**dropped, values.shape, generator=generator, dtype=torch.int32).to(values.device)
    rounded = ((values.view(torch.int32) + noise) & -(2**dropped)).view(torch.float32)
    if dtype == torch.float16:  # whose smallest numbers are all as far apart, bfloat16's are beyond what weights are
        step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        small = torch.floor(values / step + noise / 2**dropped) * step
        rounded = torch.where(values.abs() < torch.finfo(dtype).smallest_normal, small, rounded)
    return rounded.to(dtype)


def _copied(model: nn.Module, parameter: Callable[[str, Tensor], Tensor], trained: Collection[str] = ()) -> nn.Module:
    """Copy a model's modules around new parameters; tied ones stay tied, and buffers are the same tensors."""
    from torch import nn

    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for name, old in model.named_parameters():
        memo[id(old)] = nn.Parameter(parameter(name, old.detach()), requires_grad=name in trained)
    return deepcopy(model, memo)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that require gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
