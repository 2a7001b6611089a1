"""Training of all weights: the upper end of what recovery can change.

No paper of ours defines it (FlexiGPT's baseline on OPT, "ShortGPT + FT", is not explained). Learning rate, cosine and warm-up
are what Stanford Alpaca's recipe for the 7B LLaMA made customary: 2e-5 and 3 % of the steps, without weight decay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flexi_plugins.hookspecs import Recovered, RecoveryMethod, RecoveryRequest, hookimpl
from flexi_plugins.recovery.copies import trainable, working_copy
from flexi_plugins.recovery.options import TrainingOptions
from flexi_plugins.recovery.training import train


@dataclass(frozen=True)
class Full(TrainingOptions):
    """Train every parameter, embedding and head included; weights that are shared or tied stay so."""

    learning_rate: float = 2e-5
    warm_up: float = 0.03

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = ""

    def recover(self, request: RecoveryRequest) -> Recovered:
        """Return the model with all its parameters trained."""
        names = [name for name, _ in request.model.named_parameters()]
        model = working_copy(request.model, names, request.dtype)
        trained = train(request, model, self, self.name)
        return trained.recovered(request, trainable(model))


@hookimpl
def recovery_methods() -> list[RecoveryMethod]:
    """Return the full method."""
    return [Full()]
