"""No recovery: the pruned model as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from flexi_plugins.hookspecs import RecoveryMethod, RecoveryRequest, hookimpl

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class NoRecovery:
    """Leave the model as the strategy made it."""

    name: ClassVar[str] = "none"
    paper: ClassVar[str] = ""

    def recover(self, request: RecoveryRequest) -> torch.nn.Module:
        """Return the model unchanged."""
        return request.model


@hookimpl
def recovery_methods() -> list[RecoveryMethod]:
    """Return the method that does nothing."""
    return [NoRecovery()]
