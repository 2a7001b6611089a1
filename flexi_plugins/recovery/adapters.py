"""FlexiGPT's recovery (arXiv 2501.14713, section 4.1): what replaced blocks have of their own is trained.

That is the adapters of every linear map that runs with another block's weight, and the gains of the output norms. From the
paper: learning rate 0.004 and a cosine schedule. It does not say whether the kept blocks are trained; that its parameters
exceed ShortGPT's by the adapters alone leaves two readings: they are frozen, or have LoRA that is merged at the end, as its
baseline ShortGPT + LoRA must (``kept``). Ours, since the paper has no alpha and no dropout: scale 1 and none, for the kept
blocks the rank of the replaced ones, AdamW without weight decay, gradients clipped to 1, no
warm-up, and small steps (the paper's have 480 texts).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from flexi_plugins.data import PruningPlan
from flexi_plugins.hookspecs import Recovered, RecoveryMethod, RecoveryRequest, hookimpl
from flexi_plugins.recovery.copies import trainable, working_copy
from flexi_plugins.recovery.lora import add_lora, linear_maps, merged, only, output_gains, own_adapters
from flexi_plugins.recovery.options import TrainingOptions
from flexi_plugins.recovery.training import seeded, train


@dataclass(frozen=True)
class Adapters(TrainingOptions):
    """Train adapters and output gains of the blocks that run with another's weights.

    kept: whether the maps of all other blocks, the donors' among them, have LoRA too, which is merged into their weights
    at the end. rank: that LoRA's; None: the rank of the plan's adapters.
    """

    kept: Literal["frozen", "lora"] = "frozen"
    rank: int | None = None
    learning_rate: float = 0.004

    name: ClassVar[str] = "adapters"
    paper: ClassVar[str] = "FlexiGPT, arXiv 2501.14713"

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with each option."""
        yield from super().problems()
        if self.rank is not None and self.rank < 1:
            yield f"rank = {self.rank}, expected 1 or more, or none for that of the plan's adapters"

    def refuses(self, plan: PruningPlan) -> str | None:
        """Return why there is nothing to train where no block runs with another's weights."""
        if any(recipe.shares is not None and (recipe.rank or recipe.output_norm) for recipe in plan.blocks):
            if self.kept == "lora" and not self._rank(plan):
                return (
                    f"{self.name}: kept = 'lora', but this plan's blocks have no adapters to take the rank of; set rank"
                )
            return None
        return (
            f"{self.name} trains what blocks have that run with another's weights, and this plan has no such blocks; take a "
            "plan of share-lora or extend, or recover this one by lora or full"
        )

    def recover(self, request: RecoveryRequest) -> Recovered:
        """Return the model with trained adapters and gains."""
        own = own_adapters(request.model) + output_gains(request.model)
        names = linear_maps(request.model) if self.kept == "lora" else []
        rank = self._rank(request.plan)
        model = working_copy(request.model, own, request.dtype)
        with seeded(request.seed, request.device):
            layers = add_lora(model, names, rank, alpha=rank, dropout=0.0)
        trained = train(request, model, self, self.name)
        return trained.recovered(request, merged(request.model, layers) | only(trainable(model), own))

    def _rank(self, plan: PruningPlan) -> int:
        return self.rank or max(recipe.rank for recipe in plan.blocks)


@hookimpl
def recovery_methods() -> list[RecoveryMethod]:
    """Return the adapters method."""
    return [Adapters()]
