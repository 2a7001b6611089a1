"""SAAP's group-wise fine-tuning (arXiv 2412.15127), read as QA-LoRA (arXiv 2309.14717): integers that absorb adapters.

What is known of SAAP's: columns in groups, each quantised between its least and largest weight and tuned by a low-rank
decomposition. That is QA-LoRA's method; bits, group size, rank and schedule of SAAP are not known, so all defaults are
QA-LoRA's. Its paper's: 4 bits, groups of 32, sums over the inputs of a group, a constant rate of 2e-5 (7B, 13B), gradients
clipped at 0.3; rank 64 on all seven maps is what its table 2 counts. Its code's (github.com/yuhuixu1993/qa-lora): alpha
16, A Xavier-uniform and B zero, no dropout; there it is means in the place of sums, and with them 2e-4. Ours: rounding to
nearest where they run GPTQ, and the steps, text and kept state that all methods share (see ``TrainingOptions``).

Nothing runs packed. Adapters are trained beside de-quantised weights, and the model that comes back has plain linear maps
of de-quantised values. The integers are what is stored: in ``PACKED_FILE``, in the folder of the training.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flexi_plugins.data import Family, PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import Recovered, RecoveryMethod, RecoveryRequest, hookimpl
from flexi_plugins.recovery.copies import replaced, seed_of, working_copy
from flexi_plugins.recovery.lora import Lora, linear_maps
from flexi_plugins.recovery.monitor import Trained
from flexi_plugins.recovery.options import Schedule, TrainingOptions
from flexi_plugins.recovery.quantised import Packed, group_sums, quantise, save_packed
from flexi_plugins.recovery.training import train

if TYPE_CHECKING:
    from torch import Tensor, nn

PACKED_FILE = "weights.packed"  # not *.safetensors, which other loaders would take for weights


@dataclass(frozen=True)
class Groups(TrainingOptions):
    """How weights are quantised. A group at the end of a row may be shorter than ``group_size`` columns."""

    bits: Literal[2, 3, 4, 8] = 4
    group_size: int = 32
    factors: Literal["float32", "float16"] = "float32"  # scales and zero factors; what adapters are merged to

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with each option."""
        yield from super().problems()
        if self.group_size < 1:
            yield f"group_size = {self.group_size}, expected 1 or more columns"


@dataclass(frozen=True)
class GroupQuant(Groups):
    """Quantise the blocks' linear maps in groups of columns, and train adapters that go into their zero factors.

    Of rank 0, or on 0 tokens, it is rounding to nearest alone. Embedding, head, norms, biases, and the adapters of blocks
    that share weights stay as they are. An adapter's rank is at most the number of groups in a row: with so many it can
    move each group as it likes. What comes back computes what was trained: exactly where the model and the factors are stored in
    float32; in less they are rounded at random, so that what training added does not get lost. Scales and zero factors in float32
    cost 64 bits a group: with groups of 32 four bits are six.
    """

    learning_rate: float = 2e-5
    schedule: Schedule = "constant"
    gradient_clip: float = 0.3
    rank: int = 64
    alpha: float = 16.0  # an adapter's output is scaled by alpha / rank
    pooling: Literal["sum", "mean"] = "sum"  # of the inputs of a group

    name: ClassVar[str] = "group-quant"
    paper: ClassVar[str] = "SAAP, arXiv 2412.15127, read as QA-LoRA, arXiv 2309.14717"

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with each option."""
        yield from super().problems()
        if self.rank < 0:
            yield f"rank = {self.rank}, expected 0 (no training) or more"

    def recover(self, request: RecoveryRequest) -> Recovered:
        """Return the model with de-quantised weights; facts count the bytes of the packed ones."""
        packed = rounded(self, request)
        if not (self.rank and request.tokens):
            return _stored(self, request, packed, _untrained())
        model = working_copy(replaced(request.model, dequantised(packed)), (), request.dtype)
        self.adapt(model, request.seed)
        trained = train(request, model, self, self.name)
        return _stored(self, request, self.merged(model, packed, request.seed), trained)

    def adapt(self, model: nn.Module, seed: int) -> None:
        """Put an adapter beside each linear map of a model, in place: A (rank, groups) and B (rows, rank), float32.

        A map then gives W~ x + s B A pool(x), s = alpha / rank (section 3.3, algorithm 1). A map that runs with another's
        weight runs with its adapter too, as it will with the merged weight.
        """
        import torch
        from torch import nn

        generator = torch.Generator().manual_seed(seed)
        maps = [model.get_submodule(name) for name in linear_maps(model)]
        for linear in maps:
            rows, columns = linear.get_parameter("weight").shape
            groups = -(-columns // self.group_size)
            rank = min(self.rank, rows, groups)
            linear.group_a = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, groups), generator=generator))
            linear.group_b = nn.Parameter(torch.zeros(rows, rank))
        for module in model.modules():
            if getattr(module, "donor", module) in maps:
                module.register_forward_hook(self._add_adapter)

    def _add_adapter(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        from torch.nn import functional as F

        owner = getattr(module, "donor", module)
        pooled = group_sums(inputs[0], self.group_size)
        inner = F.linear(pooled * self._scale(inputs[0].shape[-1], pooled), owner.group_a)
        return output + F.linear(inner, owner.group_b).to(output.dtype)

    def _scale(self, columns: int, like: Tensor) -> Tensor | float:
        """Return what sums over groups are multiplied with: s; for means s / the columns of each group, (groups,)."""
        scale = self.alpha / self.rank
        return scale if self.pooling == "sum" else scale / group_sums(like.new_ones(columns), self.group_size)

    def merged(self, model: nn.Module, packed: Mapping[str, Packed], seed: int = 0) -> dict[str, Packed]:
        """Return the quantised weights of an adapted model with its adapters in them.

        To all columns of group l in row j an adapter adds the same s (B A)_jl (for means, over their number). That is a
        change of the group's zero factor, and of nothing else: every integer and scale stays, and nothing is rounded anew
        but zero factors that are stored in float16, at random.
        """
        found = {}
        for name, weight in packed.items():
            linear: Any = model.get_submodule(name)
            shift = linear.group_b.detach().cpu() @ linear.group_a.detach().cpu()
            shifted = weight.shifted(shift * self._scale(weight.columns, shift), seed_of(seed, name))
            found[name] = shifted.checked(f"{self.name}: {name}")
        return found


@dataclass(frozen=True)
class LoraQuantise(Lora, Groups):
    """LoRA on the weights as they are, merged, then rounding to nearest: what QA-LoRA is compared with (QLoRA w/ GPTQ)."""

    name: ClassVar[str] = "lora-quantise"
    paper: ClassVar[str] = "the baseline of QA-LoRA, arXiv 2309.14717"

    def recover(self, request: RecoveryRequest) -> Recovered:
        """Return the model with de-quantised weights; the curve is that of the weights before they were rounded."""
        trained = super().recover(request)
        request = replace(request, model=trained.model)
        note = f"{self.name}: the losses are those of the weights before they were rounded"
        return _stored(self, request, rounded(self, request), replace(trained, notes=(*trained.notes, note)))


Method = GroupQuant | LoraQuantise


def _untrained() -> Trained:
    return Trained((), {"trained_parameters": 0, "trained_tokens": 0, "kept_tokens": 0}, ())


def rounded(method: Method, request: RecoveryRequest) -> dict[str, Packed]:
    """Return the linear maps of the request's model, quantised, by module name; a weight that maps share is there once."""
    names, packed = linear_maps(request.model), dict[str, Packed]()
    if not names:
        expected = ", ".join(Family.ROLES.values())
        raise FlexiError(f"{method.name}: expected linear maps {expected}; {type(request.model).__name__} has none")
    with request.progress(f"{method.name}: rounding to {method.bits} bits", len(names)) as advance:
        for name in names:
            weight = request.model.get_parameter(f"{name}.weight")
            found = quantise(weight, method.bits, method.group_size, method.factors)
            packed[name] = found.checked(f"{method.name}: {name}")
            advance(1)
    return packed


def dequantised(packed: Mapping[str, Packed], seed: int | None = None) -> dict[str, Tensor]:
    """Return the values of quantised weights by the names of the parameters that hold them; see ``Packed.weight``."""
    seeds = {name: None if seed is None else seed_of(seed, name) for name in packed}
    return {f"{name}.weight": weight.weight(seeds[name]) for name, weight in packed.items()}


def _stored(
    method: Method, request: RecoveryRequest, packed: Mapping[str, Packed], trained: Trained | Recovered
) -> Recovered:
    """Write the packed weights, and return the model that runs on their values, with what they take."""
    if os.environ.get("RANK", "0") == "0":  # one process of several
        save_packed(packed, request.folder / PACKED_FILE)
    model = replaced(request.model, dequantised(packed, request.seed))
    count, size = sum(p.rows * p.columns for p in packed.values()), sum(p.nbytes for p in packed.values())
    others = (p for name, p in model.named_parameters() if name.removesuffix(".weight") not in packed)
    facts = {
        **trained.facts,
        "bits": method.bits,
        "group_size": method.group_size,
        "quantised_parameters": count,
        "packed_bytes": size,
        "bits_per_weight": 8 * size / count,
        "stored_bytes": size + sum(p.numel() * p.element_size() for p in others),
    }
    return Recovered(model, trained.curve, facts, (*trained.notes, *_notes(method, request.plan, model, packed, facts)))


def _notes(
    method: Method, plan: PruningPlan, model: nn.Module, packed: Mapping[str, Packed], facts: Mapping[str, float]
) -> Iterator[str]:
    yield (
        f"{method.name}: {len(packed)} linear maps take {facts['packed_bytes'] / 2**20:,.1f} MiB packed, "
        f"{facts['bits_per_weight']:.3g} bits a weight with scales and zero factors; embedding, head, norms and biases are "
        "not quantised. Nothing runs packed: the model runs on the de-quantised weights"
    )
    if any(recipe.gain != 1.0 for recipe in plan.blocks):
        yield (
            f"{method.name}: {PACKED_FILE} has the weights of the plan; in a plain folder those in front of a gain are "
            "multiplied by it"
        )
    sharing = sum(getattr(module, "donor", None) is not None for module in model.modules())
    if sharing:
        yield f"{method.name}: {sharing} maps run with another's weight, quantised once; their own adapters are not"


@hookimpl
def recovery_methods() -> list[RecoveryMethod]:
    """Return the group-quant method, and the one it is compared with."""
    return [GroupQuant(), LoraQuantise()]
