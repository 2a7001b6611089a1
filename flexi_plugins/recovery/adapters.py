"""FlexiGPT's recovery (arXiv 2501.14713, section 4.1): what replaced blocks have of their own is trained.

That is the adapters of every linear map that runs with another block's weight, and the gains of the output norms. From the
paper: learning rate 0.004 and a cosine schedule. It does not say whether the kept blocks are trained; that its parameters
exceed ShortGPT's by the adapters alone leaves two readings: they are frozen, or have LoRA that is merged at the end, as its
baseline ShortGPT + LoRA must (``kept``). Ours, since the paper has no alpha and no dropout: scale 1 and none, for the kept
blocks the rank of the replaced ones, AdamW without weight decay, no warm-up, and small steps (the paper's have 480 texts).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import Recovered, RecoveryMethod, RecoveryRequest, hookimpl
from flexi_plugins.recovery.lora import add_lora, linear_maps, merged, only, own_adapters
from flexi_plugins.recovery.training import TrainingOptions, seeded, train, trainable, working_copy


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

    def recover(self, request: RecoveryRequest) -> Recovered:
        """Return the model with trained adapters and gains; raise a FlexiError where no block has any."""
        gains = [name for name, _ in request.model.named_parameters() if name.endswith(".output_norm.weight")]
        own = own_adapters(request.model) + gains
        if not own:
            raise FlexiError(
                f"{self.name}: expected blocks that run with another's weights and have adapters or output norms, found none "
                "in this plan; make one with the strategy share-lora, or recover it by lora or full"
            )
        names = linear_maps(request.model) if self.kept == "lora" else []
        rank = self.rank or max(recipe.rank for recipe in request.plan.blocks)
        model = working_copy(request.model, own, request.dtype)
        with seeded(request.seed, request.device):
            layers = add_lora(model, names, rank, alpha=rank, dropout=0.0)
        trained = train(request, model, self, self.name)
        return trained.recovered(request.model, merged(request.model, layers) | only(trainable(model), own))


@hookimpl
def recovery_methods() -> list[RecoveryMethod]:
    """Return the adapters method."""
    return [Adapters()]
