"""Why a recovery method cannot train a plan's model: what is known before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexi_plugins.data import PruningPlan
    from flexi_plugins.hookspecs import RecoveryMethod, ReplacementStrategy


def refusal(method: RecoveryMethod, plan: PruningPlan, strategy: ReplacementStrategy | None) -> str | None:
    """Return why a recovery method cannot train a plan's model, and what to do; None where it can.

    strategy: by which the plan is made, where that is known.
    """
    if not method.interleaved:
        return method.refuses(plan)
    who = f"{method.name} with these options trains behind every step of a progressive strategy"
    if not (strategy and strategy.progressive):
        found = f"{strategy.name} plans in one step" if strategy else "a plan that is made has none left to come"
        return f"{who}, and {found}; name a metric and such a strategy in the place of a plan, or train once at the end"
    if getattr(strategy, "remerges", False):
        return (
            f"{who}, and {strategy.name} with these options merges a block again that was merged and trained before, whose "
            "weights are those of no old block any more; train once at the end, or have every block merged once"
        )
    return method.refuses(plan)
