"""bfloat16 on processors that do not multiply it: products are formed in float32 and rounded, several times as fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    {
        functional.linear,
        functional.scaled_dot_product_attention,
        torch.bmm,
        torch.matmul,
        torch.mm,
        Tensor.__matmul__,
        Tensor.bmm,
        Tensor.matmul,
        Tensor.mm,
    }
)


@cache
def native_bfloat16(device: str = "cpu") -> bool:
    """Whether a type of device ("cpu", "cuda") multiplies bfloat16 itself; processors before AVX512-BF16 and AMX do not."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # no public query exists


class WideProducts(TorchFunctionMode):
    """While it is entered, products of bfloat16 tensors are computed in float32 and rounded to bfloat16 once.

    That is what hardware with bfloat16 products does: it adds up in float32. Gradients are computed in the same way. Under
    ``torch.autocast`` to bfloat16, float32 factors are rounded to it first, as it would have them.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute a function of torch, a product of bfloat16 tensors in float32."""
        given = kwargs or {}
        first = next(iter((*args, *given.values())), None)
        if func not in PRODUCTS or not isinstance(first, Tensor) or not _is_narrow(first):
            return func(*args, **given)
        if func is functional.linear:
            return _wide_linear(*args, **given)
        wide_args, wide_given = tree_map_only(Tensor, _widened, (args, dict(given)))
        with torch.autocast("cpu", enabled=False):
            return func(*wide_args, **wide_given).bfloat16()


def _is_narrow(factor: Tensor) -> bool:
    """Whether a product of this factor is one of bfloat16: it is of that type, or is cast to it."""
    cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return factor.dtype == torch.bfloat16 or (cast and factor.dtype == torch.float32)


def _widened(tensor: Tensor) -> Tensor:
    """Return a factor's values as bfloat16 has them, in float32; masks stay."""
    return tensor.bfloat16().float() if tensor.is_floating_point() else tensor


class _WideLinear(torch.autograd.Function):
    """A linear map computed in float32; for its gradients it keeps the factors as they were given, not in float32.

    So a training holds no second copy of the weights, twice as large as they are in bfloat16: they are widened again.
    Other products are of activations alone, which torch keeps in float32.
    """

    @staticmethod
    def forward(ctx: Any, entering: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return entering W' + bias, (..., outputs) in bfloat16, of (..., inputs), (outputs, inputs) and (outputs,)."""
        ctx.save_for_backward(entering, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        with torch.autocast("cpu", enabled=False):
            wide_bias = None if bias is None else _widened(bias)
            return functional.linear(_widened(entering), _widened(weight), wide_bias).bfloat16()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of what needs one, rounded to bfloat16 and in its dtype."""
        entering, weight = ctx.saved_tensors
        wide = gradient.reshape(-1, len(weight)).float()
        found: list[Tensor | None] = [None, None, None]
        with torch.autocast("cpu", enabled=False):
            if ctx.needs_input_grad[0]:
                found[0] = (wide @ _widened(weight)).bfloat16().to(entering.dtype).view_as(entering)
            if ctx.needs_input_grad[1]:
                found[1] = (wide.T @ _widened(entering).reshape(-1, weight.shape[1])).bfloat16().to(weight.dtype)
            if ctx.needs_input_grad[2]:
                found[2] = wide.sum(0).bfloat16().to(ctx.bias_dtype)
        return tuple(found)  # type: ignore[return-value]


def _wide_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``_WideLinear`` of arguments by place or by name, as ``functional.linear`` takes them."""
    return _WideLinear.apply(input, weight, bias)


def products(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which to multiply tensors of a dtype on a device: ``WideProducts`` where that is faster."""
    return WideProducts() if widens(dtype, device) else nullcontext()


def widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of a dtype on a device are computed in float32, and so take memory for factors in float32."""
    return dtype == torch.bfloat16 and not native_bfloat16(device.type)
