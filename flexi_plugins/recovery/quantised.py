"""Weights as integers of a few bits with a scale and a zero factor for every group of input columns, and their files.

The arithmetic is QA-LoRA's (arXiv 2309.14717): w~ = alpha q + beta with q of 0 .. 2^bits - 1, beta the least weight of a
group and alpha its range / (2^bits - 1) (eq. 1, for each row and group of columns as in section 3.3). beta is in units of
the weights, as in eq. 1; algorithm 1 and GPTQ's files hold the same number as an integer zero point -beta / alpha, which
an adapter turns into a real one. Ours: a width that the group size does not divide has a shorter last group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flexi_plugins.errors import FlexiError
from flexi_plugins.files import write_tensor_file
from flexi_plugins.recovery.copies import stochastically_rounded

if TYPE_CHECKING:
    from torch import Tensor

TENSORS = ("integers", "scales", "zeros")
METADATA = "group-quantised"  # the key, in a file's metadata, of what its tensors are


@dataclass(frozen=True, eq=False)
class Packed:
    """One quantised weight (rows, columns).

    integers: (bytes,) uint8, the q of one row after the other (see ``pack``). scales, zeros: alpha and beta of every
    group, (rows, groups), both of one dtype. dtype: the weight's, such as "bfloat16".
    """

    integers: Tensor
    scales: Tensor
    zeros: Tensor
    columns: int
    bits: int
    group_size: int
    dtype: str

    @property
    def rows(self) -> int:
        """Rows of the weight: outputs of the map."""
        return len(self.scales)

    @property
    def nbytes(self) -> int:
        """Bytes of the integers, scales and zero factors, as they are stored."""
        return sum(t.numel() * t.element_size() for t in (self.integers, self.scales, self.zeros))

    def weight(self, seed: int | None = None) -> Tensor:
        """Return the de-quantised weight, (rows, columns) in its dtype: alpha q + beta in float32, rounded once.

        To the nearest, or with a seed at random (see ``stochastically_rounded``).
        """
        import torch

        from flexi_plugins.numerics import pieces

        integers = unpack(self.integers, self.bits, self.rows * self.columns).view(self.rows, self.columns)
        weight = torch.empty(integers.shape, dtype=getattr(torch, self.dtype), device=integers.device)
        for number, part in enumerate(pieces(self.rows, self.columns)):
            scale, zero = (
                factors[part].float().repeat_interleave(self.group_size, 1)[:, : self.columns]
                for factors in (self.scales, self.zeros)
            )
            values = scale * integers[part] + zero
            weight[part] = values if seed is None else stochastically_rounded(values, weight.dtype, seed + number)
        return weight

    def shifted(self, shift: Tensor, seed: int = 0) -> Packed:
        """Return the weight with ``shift`` (rows, groups) added to all columns of a group: its integers stay the same.

        Zero factors of float16 are rounded at random (see ``stochastically_rounded``).
        """
        zeros = self.zeros.float() + shift.to(self.zeros.device)
        return replace(self, zeros=stochastically_rounded(zeros, self.zeros.dtype, seed))

    def checked(self, name: str) -> Packed:
        """Return self; raise a FlexiError that names the weight if a scale or zero factor is not finite."""
        if bool(self.scales.isfinite().all()) and bool(self.zeros.isfinite().all()):
            return self
        raise FlexiError(
            f"{name}: expected scales and zero factors that are finite in {str(self.zeros.dtype).removeprefix('torch.')}, "
            "found others: its weights hold NaN or infinity, or are too large for that (factors = float32 holds all)"
        )


def quantise(weight: Tensor, bits: int, group_size: int, factors: str = "float32") -> Packed:
    """Return a weight (rows, columns) with each group of columns of each row rounded to the nearest of 2^bits values.

    The values are evenly spaced from the least to the largest weight of the group, so none is off by more than alpha / 2
    and the rounding of the factors. factors: the dtype of alpha and beta, "float32" or "float16"; the integers are chosen
    for the factors as they are stored. Groups of equal weights have alpha 0 and integers 0.
    """
    import torch

    from flexi_plugins.numerics import pieces

    rows, columns = weight.shape
    groups, most, kind = -(-columns // group_size), 2**bits - 1, getattr(torch, factors)
    scales, zeros = (torch.empty(rows, groups, dtype=kind, device=weight.device) for _ in range(2))
    integers = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    # a short last group is filled up with its last weight, which leaves its least and its largest one as they are
    filled = torch.arange(groups * group_size, device=weight.device).clamp_max(columns - 1)
    for part in pieces(rows, columns):
        grouped = weight[part].float()[:, filled].unflatten(1, (groups, group_size))
        least = grouped.amin(2)
        scales[part] = (grouped.amax(2) - least) / most
        zeros[part] = least
        scale, zero = scales[part].float()[..., None], zeros[part].float()[..., None]
        steps = (grouped - zero) / scale.where(scale > 0, 1.0)
        integers[part] = steps.round().clamp(0, most).flatten(1)[:, :columns].to(torch.uint8)
    dtype = str(weight.dtype).removeprefix("torch.")
    return Packed(pack(integers.flatten(), bits), scales, zeros, columns, bits, group_size, dtype)


def group_sums(x: Tensor, group_size: int) -> Tensor:
    """Return the sums over each group of the last dimension, (..., columns) -> (..., groups), in float32."""
    import torch

    missing = -x.shape[-1] % group_size
    filled = torch.nn.functional.pad(x, (0, missing)) if missing else x
    return filled.unflatten(-1, (-1, group_size)).sum(-1, dtype=torch.float32)


# --------------------------------------------------------------------------------------------- bits and files


def pack(values: Tensor, bits: int) -> Tensor:
    """Return integers of 0 .. 2^bits - 1, (n,) uint8, as a stream of bits: (ceil(n bits / 8),) uint8.

    Value k is in the bits k * bits and up; bit 0 is the lowest of the first byte. Eight values fill ``bits`` bytes.
    """
    import torch

    from flexi_plugins.numerics import pieces

    eights = torch.nn.functional.pad(values, (0, -len(values) % 8)).view(-1, 8)
    stream = torch.empty(len(eights), bits, dtype=torch.uint8, device=values.device)
    places, cuts = (step * torch.arange(n, device=values.device) for step, n in ((bits, 8), (8, bits)))
    for part in pieces(len(eights), 8):
        words = (eights[part].long() << places).sum(1, keepdim=True)
        stream[part] = ((words >> cuts) & 255).to(torch.uint8)
    return stream.flatten()[: -(-len(values) * bits // 8)].clone()


def unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """Return the ``count`` integers that ``pack`` made a stream of bits from: (count,) uint8."""
    import torch

    from flexi_plugins.numerics import pieces

    eights = -(-count // 8)
    filled = torch.nn.functional.pad(stream, (0, eights * bits - len(stream))).view(-1, bits)
    values = torch.empty(eights, 8, dtype=torch.uint8, device=stream.device)
    places, cuts = (step * torch.arange(n, device=stream.device) for step, n in ((bits, 8), (8, bits)))
    for part in pieces(eights, 8):
        words = (filled[part].long() << cuts).sum(1, keepdim=True)
        values[part] = ((words >> places) & (2**bits - 1)).to(torch.uint8)
    return values.flatten()[:count]


def save_packed(weights: Mapping[str, Packed], path: Path) -> None:
    """Write quantised weights by name as one safetensors file: NAME.integers, NAME.scales, NAME.zeros."""
    tensors = {f"{name}.{t}": getattr(packed, t) for name, packed in weights.items() for t in TENSORS}
    fields = ("columns", "bits", "group_size", "dtype")
    described = {name: {field: getattr(packed, field) for field in fields} for name, packed in weights.items()}
    write_tensor_file(path, tensors, {METADATA: json.dumps(described)})


def load_packed(path: Path) -> dict[str, Packed]:
    """Read what ``save_packed`` wrote; raise a FlexiError if it is anything else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {}).get(METADATA, "null"))
            if described is None:
                raise FlexiError(
                    f"{path}: expected packed weights that group-quant wrote, found another safetensors file"
                )
            return {n: Packed(*(file.get_tensor(f"{n}.{t}") for t in TENSORS), **kind) for n, kind in described.items()}
    except (SafetensorError, OSError) as error:
        raise FlexiError(f"{path}: cannot read packed weights: {error}") from None
