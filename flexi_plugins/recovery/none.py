"""No recovery: the pruned model as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flexi_plugins.data import PruningPlan
from flexi_plugins.hookspecs import Recovered, RecoveryMethod, RecoveryRequest, hookimpl


@dataclass(frozen=True)
class NoRecovery:
    """Leave the model as the strategy made it."""

    name: ClassVar[str] = "none"
    paper: ClassVar[str] = ""

    interleaved: ClassVar[bool] = False

    def check(self) -> None:
        """Accept all options: there are none."""

    def refuses(self, plan: PruningPlan) -> str | None:
        """Accept every plan."""
        return None

    def recover(self, request: RecoveryRequest) -> Recovered:
        """Return the model unchanged."""
        return Recovered(request.model, facts={"trained_tokens": 0, "kept_tokens": 0})


@hookimpl
def recovery_methods() -> list[RecoveryMethod]:
    """Return the method that does nothing."""
    return [NoRecovery()]
