"""What the command line prints: plans, catalogues, outcomes, leaderboards."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from flexi_plugins.checkpoint import Checkpoint
    from flexi_plugins.data import BlockRecipe, PruningPlan
    from flexi_plugins.plugins import Plugins


def plan_summary(made: PruningPlan) -> dict[str, Any]:
    """Return what a plan comes to, as JSON values."""
    return {
        "original_parameters": made.shape.parameters,
        "stored_parameters": made.stored_parameters,
        "runtime_parameters": made.runtime_parameters,
        "macs_per_token": made.macs_per_token,
        "ratio": made.ratio,
        "blocks": plan_rows(made),
        "notes": list(made.origin.get("notes", ())),
    }


def plan_rows(plan: PruningPlan) -> list[dict[str, Any]]:
    """Return what becomes of each block, for people: one mapping a block of the new model, and one a removed block."""
    rows = [_plan_row(plan, position) for position in range(len(plan.blocks))]
    used = {s for r in plan.blocks for s in r.sources}
    for source in range(len(plan.shape.blocks)):
        if source not in used:
            rows.append(
                {"block": "-", "from": str(source), "what": "removed", "kv_heads": 0, "channels": 0, "parameters": 0}
            )
    return rows


def _plan_row(plan: PruningPlan, position: int) -> dict[str, Any]:
    recipe = plan.blocks[position]
    shape = plan.block_shape(recipe)
    return {
        "block": str(position),
        "from": " + ".join(map(str, recipe.sources)),
        "what": _what(plan, position),
        "kv_heads": shape.kv_heads,
        "channels": shape.channels,
        "parameters": plan.stored_in(recipe),
    }


def _what(plan: PruningPlan, position: int) -> str:
    recipe = plan.blocks[position]
    said = [_made_of(plan, recipe)]
    said += [f"gain {recipe.gain:g}"] if recipe.gain != 1.0 else []
    said += [f"new {', '.join(recipe.own)}"] if recipe.own else []
    return "; ".join(text for text in said if text) or "unchanged"


def _made_of(plan: PruningPlan, recipe: BlockRecipe) -> str:
    """Say which units a block has; nothing of one that is whole."""
    if recipe.shares is not None:
        return f"weights of block {recipe.shares}, adapters of rank {recipe.rank}"
    if recipe.mix:
        return "weighted sum"
    if len(recipe.parts) > 1 or len(recipe.norm_weights) > 1:
        pieces = [f"{_units(p.kv_heads)} heads + {_units(p.channels)} channels of {p.source}" for p in recipe.parts]
        return "merged: " + ", ".join(pieces)
    part = recipe.parts[0]
    if part.kv_heads is None and part.channels is None:
        return ""
    old, new = plan.shape.blocks[part.source], plan.block_shape(recipe)
    return f"narrowed by {old.kv_heads - new.kv_heads} KV heads, {old.channels - new.channels} channels"


def _units(units: tuple[int, ...] | None) -> str:
    return "all" if units is None else str(len(units))


def totals(made: PruningPlan) -> str:
    """Return a plan's parameters in one line."""
    added = f", {-made.ratio:.2%} more than the original" if made.ratio < 0 else f" ({made.ratio:.2%})"
    return (
        f"stored {made.stored_parameters:,} of {made.shape.parameters:,} parameters: ratio {made.ratio:.4f}{added}; at run "
        f"time {made.runtime_parameters:,} parameters, {made.macs_per_token:,} MACs a token"
    )


def show_plan(made: PruningPlan) -> None:
    """Print what becomes of each block."""
    summary = plan_summary(made)
    show_table(("block", "from", "what", "kv_heads", "channels", "parameters"), summary["blocks"])
    for note in summary["notes"]:
        typer.echo(f"note: {note}")
    typer.echo(totals(made))


def show_table(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table; of what is no terminal as wide as it needs."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        numeric = bool(rows) and isinstance(rows[0].get(column), int | float)
        table.add_column(column.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        cells = [row.get(c, "") for c in columns]
        table.add_row(*(f"{c:,}" if isinstance(c, int) else str(c) for c in cells))
    width = None if sys.stdout.isatty() else 200
    Console(width=width, markup=False, highlight=False).print(table)


def show_list(described: Sequence[dict[str, Any]], refused: Sequence[dict[str, str]]) -> None:
    """Print the catalogue, and the pairs that cannot work, a line a reason."""
    rows = [{**d, "options": ", ".join(f"{k}={v}" for k, v in d["options"].items())} for d in described]
    show_table(("kind", "name", "paper", "distribution", "version", "options"), rows)
    together: dict[tuple[str, str], list[str]] = {}
    for pair in refused:
        together.setdefault((pair["strategy"], pair["reason"]), []).append(pair["metric"])
    for (strategy, reason), metrics in together.items():
        typer.echo(f"incompatible: {', '.join(metrics)} x {strategy}: {reason}")
    if not refused:
        typer.echo("every metric works with every strategy")


def show_outcomes(outcomes: Sequence[Any], as_json: bool) -> None:
    """Print measurements; a failure ends the command with status 1."""
    from dataclasses import asdict

    measurements = [m for o in outcomes for m in o.measurements]
    failures = [o.failure for o in outcomes if o.failure]
    if as_json:
        print_json({"measurements": [asdict(m) for m in measurements], "failures": failures})
    else:
        for m in measurements:
            error = f" ± {m.standard_error:.4f}" if m.standard_error is not None else ""
            chance = f" (chance {m.chance:.4f})" if m.chance is not None else ""
            typer.echo(f"{m.name}: {m.value:,.4f}{error}{chance}")
        for failure in failures:
            typer.echo(f"failed: {failure}", err=True)
    if failures:
        raise typer.Exit(1)


def show_reports(plugins: Plugins, folder: Path) -> None:
    """Print the leaderboard, and where everything is."""
    from flexi_plugins.report import PAIRED, board_of

    named = [*(folder / e.object.filename for e in plugins.entries("report").values()), folder / PAIRED]
    files = [file for file in named if file.exists()]
    board = board_of(plugins, folder)
    if board in files:
        typer.echo(board.read_text(encoding="utf-8"))
    typer.echo("files: " + ", ".join(str(f) for f in files) + f", {folder / 'records'}/")


def show_recovery(recovery: Mapping[str, Any]) -> None:
    """Print what a training was: its tokens, and the held-out loss at its start and of the state that was kept."""
    from flexi_plugins.recovery.course import course_of

    typer.echo(course_of(recovery))
    for note in recovery["notes"]:
        typer.echo(f"note: {note}")


def show_written(made: PruningPlan, checkpoint: Checkpoint, output: Path, as_json: bool) -> None:
    """Say what model was written where, and whether transformers loads it by itself."""
    from flexi_plugins.rewrite import plain_reason

    reason = plain_reason(made, checkpoint)
    recovery = made.origin.get("recovery")
    if as_json:
        summary = {**plan_summary(made), "folder": str(output), "plain": reason is None, "not_plain_because": reason}
        print_json({**summary, **({"recovery": recovery} if recovery else {})})
        return
    typer.echo(totals(made))
    if recovery:
        show_recovery(recovery)
    typer.echo(
        f"written to {output}: "
        + ("a plain transformers folder" if reason is None else f"FlexiForCausalLM, since {reason}")
    )


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    from flexi_plugins.store import to_text

    typer.echo(to_text(value, indent=1))
