"""Training of blocks apart from their model: what it would hand them, which fit into memory together, and their training.

A block that is fed by somebody else needs none of the other blocks, so that memory holds those that are trained at once,
with their gradients and moments, and one batch of states, however large the model is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from flexi_plugins.data import PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import RecoveryRequest
from flexi_plugins.recovery.copies import trainable, working_copy
from flexi_plugins.recovery.monitor import Loss, Trained
from flexi_plugins.recovery.options import TrainingOptions
from flexi_plugins.recovery.training import train

if TYPE_CHECKING:
    from torch import Tensor, nn

BYTES = 16  # of a parameter in training: weight, gradient and AdamW's two moments, float32


def blocks_of(model: nn.Module, plan: PruningPlan) -> tuple[str, nn.ModuleList]:
    """Return the blocks of a plan's model, behind their name in it, such as ``model.layers``."""
    from torch import nn

    body: Any = model.base_model
    found = [m for m in body.children() if isinstance(m, nn.ModuleList) and len(m) == len(plan.blocks)]
    if len(found) != 1:
        raise FlexiError(
            f"recovery: expected one list of {len(plan.blocks)} blocks in the body of {type(model).__name__}, found "
            f"{len(found)}"
        )
    return next(name for name, module in model.named_modules() if module is found[0]), found[0]


class Frame:
    """A copy of a model's body with stand-ins for its embedding and its blocks: masks, positions and the final norm.

    transformers' own body makes what blocks are handed, and the stand-ins note it: nothing here knows of architectures.
    No block's weights are touched.
    """

    def __init__(self, model: nn.Module, plan: PruningPlan, device: str) -> None:
        from torch import nn

        body: Any = model.base_model
        blocks = blocks_of(model, plan)[1]
        made: list[Any] = [nn.Identity() for _ in blocks]
        for stand_in, block in zip(made, blocks, strict=True):
            stand_in.attention_type = getattr(block, "attention_type", None)  # bodies of some releases ask for it
            stand_in.register_forward_pre_hook(self._note, with_kwargs=True)
        memo: dict[int, Any] = {id(blocks): nn.ModuleList(made), id(body.get_input_embeddings()): nn.Identity()}
        self._body = deepcopy(body, memo).to(device).eval()
        self._noted: list[dict[str, Any]] = []

    def _note(
        self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._noted.append(named)
        return arguments, {}

    def run(self, hidden: Tensor) -> tuple[list[dict[str, Any]], Tensor]:
        """Return what each block is handed beside states of this shape, and these states behind the final norm.

        hidden: (rows, tokens, hidden). No gradients flow.
        """
        import torch

        with torch.no_grad():
            normed = self._body(inputs_embeds=hidden, use_cache=False).last_hidden_state
        noted, self._noted = self._noted, []
        return noted, normed


class _SideBySide:
    """What makes a list of blocks a module that runs them; mixed into ``nn.ModuleList`` where torch is imported."""

    def forward(self: Any, entering: Sequence[Tensor], handed: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """Return what blocks make of the states that enter them: the first ones, as many as there are inputs."""
        return [block(hidden, **named) for block, hidden, named in zip(self, entering, handed, strict=False)]


def side_by_side(blocks: Iterable[nn.Module]) -> nn.Module:
    """Return one module of blocks that have inputs of their own: (entering, handed) -> outputs; see ``Frame.run``."""
    from torch import nn

    return type("SideBySide", (_SideBySide, nn.ModuleList), {})(blocks)


def groups(request: RecoveryRequest, positions: Iterable[int], memory: float) -> Iterator[list[int]]:
    """Yield positions of blocks to be trained at once: as many as fit into ``memory`` GiB, at least one."""
    blocks = blocks_of(request.model, request.plan)[1]
    group: list[int] = []
    taken = 0.0
    for position in positions:
        needed = BYTES * sum(p.numel() for p in blocks[position].parameters())
        if group and taken + needed > memory * 2**30:
            yield group
            group, taken = [], 0.0
        group.append(position)
        taken += needed
    yield group


def train_apart(
    request: RecoveryRequest, positions: Sequence[int], options: TrainingOptions, who: str, loss: Loss, measure: Loss
) -> tuple[Trained, dict[str, Tensor]]:
    """Train all parameters of the blocks at these positions; return them by their names in the request's model.

    loss and measure are given a module as ``side_by_side`` makes it, of these blocks in this order. Weights that another
    block lends them are in it too, and stay as they are.
    """
    prefix, blocks = blocks_of(request.model, request.plan)
    lenders = {lender for p in positions if (lender := request.plan.donor(p)) is not None}
    parts = [blocks[p] for p in (*positions, *sorted(lenders))]
    names = [f"{i}.{name}" for i, part in enumerate(parts[: len(positions)]) for name, _ in part.named_parameters()]
    model = working_copy(side_by_side(parts), names, request.dtype)
    trained = train(request, model, options, who, loss, measure)
    tensors = {}
    for name, tensor in trainable(model).items():
        place, _, rest = name.partition(".")
        tensors[f"{prefix}.{positions[int(place)]}.{rest}"] = tensor
    return trained, tensors


def summed(trainings: Sequence[Trained]) -> tuple[tuple[dict[str, float], ...], dict[str, float]]:
    """Return the curve and the facts of groups of blocks that were trained one after another, on the same text.

    Losses are summed; a training that was stopped counts with its last point. Held-out losses are those of the blocks,
    not of a model, and are called ``held_out_block_loss``; groups may keep states of different points, so that the sum over
    what is kept is a fact of its own.
    """
    points = []
    for tokens in sorted({point["tokens"] for t in trainings for point in t.curve}):
        latest = [[point for point in t.curve if point["tokens"] <= tokens][-1] for t in trainings]
        point = {"tokens": tokens, "held_out_block_loss": sum(p["held_out_loss"] for p in latest)}
        if all("loss" in p for p in latest):
            point["loss"] = sum(p["loss"] for p in latest)
        points.append(point)
    facts = {
        "trained_parameters": sum(t.facts["trained_parameters"] for t in trainings),
        "trained_tokens": max(t.facts["trained_tokens"] for t in trainings),
        "kept_tokens": min(t.facts["kept_tokens"] for t in trainings),
        "kept_held_out_block_loss": sum(_kept_loss(t) for t in trainings),
    }
    return tuple(points), facts


def _kept_loss(trained: Trained) -> float:
    losses = {point["tokens"]: point["held_out_loss"] for point in trained.curve}
    return losses[trained.facts["kept_tokens"]]
