"""bfloat16 on processors that do not multiply it: products are formed in float32 and rounded, several times as fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
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
        if func not in PRODUCTS or not isinstance(args[0], Tensor) or not _is_narrow(args[0]):
            return func(*args, **given)
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


def products(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which to multiply tensors of a dtype on a device: ``WideProducts`` where that is faster."""
    return WideProducts() if widens(dtype, device) else nullcontext()


def widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of a dtype on a device are computed in float32, and so take memory for factors in float32."""
    return dtype == torch.bfloat16 and not native_bfloat16(device.type)
