"""Report formats ``markdown`` and ``csv``: the leaderboard, made from records and nothing else."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from flexi_plugins import hookimpl
from flexi_plugins.hookspecs import ReportFormat
from flexi_plugins.reports import ranking
from flexi_plugins.reports.ranking import Row, number

if TYPE_CHECKING:
    import pandas as pd

Column = tuple[str, Callable[[Row], str]]  # heading, cell
WIDTH = 8  # measurements side by side; more go into a further table
LONGEST_REASON = 240
WORDS = (
    "metric",
    "strategy",
    "variant",
    "recovery",
    "status",
    "reason",
    "method",
    "task",
    "our method",
    "source",
    "note",
)
METRIC: Column = ("metric", lambda r: "**dense**" if ranking.is_dense(r) else one_line(r["metric"]))
MACHINE = ("machine", "gpu", "system")  # versions that are not of software

SIZES_EXPLAINED = (
    "Ratio: the share of stored parameters that was to go; true ratio: that is gone. Stored: what a checkpoint holds, "
    "adapters counted and shared weights once; runtime: what a token passes; MACs: multiply-adds with the weights; "
    "M: million. Packed: a checkpoint whose linear maps are quantised, with their scales and zero factors."
)
CHOICES_EXPLAINED = (
    "choice_logprob: mean log-probability of the right choice among the choices; higher is better, and it tells "
    "methods apart before accuracies do."
)
ERRORS_EXPLAINED = (
    "± is the standard error (several seeds: the standard deviation); in brackets stands what guessing gives; `~` "
    "marks what is not two standard errors better than guessing. Accuracies are in percent."
)
SPEEDS_EXPLAINED = (
    "Peak memory: of a process of its own, Python and its libraries included. tok/s: tokens per second at batch "
    "sizes b1, b8, ...; medians on this machine, to be compared with each other only."
)


@hookimpl
def report_formats() -> list[ReportFormat]:
    """Return the formats of this file."""
    return [Markdown(), Csv()]


@dataclass(frozen=True)
class Csv:
    """The leaderboard's rows with every number in full."""

    name: ClassVar[str] = "csv"
    filename: ClassVar[str] = "LEADERBOARD.csv"

    def render(self, rows: pd.DataFrame, title: str) -> str:
        """Render the ranked rows as comma-separated values; CSV has no room for the title."""
        return ranking.ranked(rows).convert_dtypes().to_csv(index=False, lineterminator="\n")


@dataclass(frozen=True)
class Markdown:
    """The leaderboard to read: where it comes from, quality ratio by ratio, size and speed, what has no result."""

    name: ClassVar[str] = "markdown"
    filename: ClassVar[str] = "LEADERBOARD.md"

    def render(self, rows: pd.DataFrame, title: str) -> str:
        """Render the rows as a Markdown page."""
        names = ranking.measured(rows)
        ranked = ranking.ranked(rows).to_dict("records")
        done = [r for r in ranked if r["status"] == "complete"]
        sections = [
            f"# {title}",
            _bullets(_origin(rows, ranked)),
            _bullets(_caveats(rows, done, names)),
            *_quality(done, names),
            *_recovery(ranking.methods(rows), names),
            *_speed(done, names),
            *_missing(ranking.without_result(rows)),
            _bullets(_explanation(names)) if done else "No cell has a result yet.",
        ]
        return "\n\n".join(s for s in sections if s) + "\n"


# ---------------------------------------------------------------------------------------------- head


def _origin(rows: pd.DataFrame, ranked: Sequence[Row]) -> list[str]:
    context, versions = rows.attrs, rows.attrs.get("versions", {})
    software = ", ".join(f"{n} {'/'.join(v)}" for n, v in versions.items() if n not in MACHINE)
    lines = {
        "model": ", ".join(context.get("models", ())),
        "date": " to ".join(dict.fromkeys(d for d in (*context.get("dates", ())[:1], *context.get("dates", ())[-1:]))),
        "machine": "; ".join(m for n in MACHINE for m in versions.get(n, ())),
        "versions": software,
        "code": ", ".join(f"commit {c}" for c in context.get("commits", ())),
        "corpus": ", ".join(context.get("corpora", ())),
        "seeds": ", ".join(str(s) for s in sorted(set(rows["seed"]))),
    } | _options(rows, ranked)
    return [f"{name}: {text}" for name, text in lines.items() if text]


def _options(rows: pd.DataFrame, ranked: Sequence[Row]) -> dict[str, str]:
    """Return the options that all cells with a plugin, or all cells, have in common, by what they belong to.

    Of a metric or strategy also the usual value of what some rows say nothing of.
    """
    said = {}
    for group, options in sorted(ranking.option_values(rows).items()):
        kind, _, name = group.partition(" ")
        variants = [f", {r['variant']}" for r in ranked if r.get(kind) == name]
        left = [k for k, v in options.items() if len(v) > 1 and not all(f", {k}=" in told for told in variants)]
        parts = [", ".join(f"{k} {min(v)}".strip() for k, v in options.items() if len(v) == 1)]
        if left and kind in ("metric", "strategy"):
            parts.append(f"where nothing else is said {', '.join(f'{k} {ranking.usual(options[k])}' for k in left)}")
        said[group] = "; ".join(part for part in parts if part)
    return said


def _caveats(rows: pd.DataFrame, done: Sequence[Row], names: Sequence[str]) -> list[str]:
    context, versions = rows.attrs, rows.attrs.get("versions", {})
    compared = [(r, n) for r in done for n in ranking.accuracies(names) if not math.isnan(number(r, f"{n}_chance"))]
    lost = sum(ranking.at_chance(r, n) for r, n in compared)
    mixed = [n for n, found in versions.items() if len(found) > 1] + ["commit"] * (len(context.get("commits", ())) > 1)
    several = any(" " in r["seeds"] for r in done)
    without = sum(status != "complete" for status in rows["status"])
    changed = any("changes" in c for c in context.get("commits", ()))
    unfinished = context.get("unfinished", 0)
    most = max((len(texts) for texts in ranking.training_texts(rows).values()), default=0)
    said = [
        (
            f"{lost} of {len(compared)} accuracies are not two standard errors above guessing (marked `~`): "
            "they tell no method from another",
            lost,
        ),
        (f"the records differ in {', '.join(mixed)}: compare speeds and small differences with care", mixed),
        ("some records were made with changes that are not committed", changed),
        (f"models of one seed were trained on {most} different texts or selections of text", most > 1),
        *(
            (f"{_label(r)} was not trained as it was to be: {one_line(r['recovery_shortfall'])}", True)
            for r in done
            if isinstance(r.get("recovery_shortfall"), str)
        ),
        ("one seed: how far results vary between seeds is not shown", done and not several),
        (f"{unfinished} cells of the study have no finished record yet, and do not stand here", unfinished),
        (f"{without} of {len(rows)} cells have no result; they stand at the end with the reason", without),
    ]
    return [f"**Note:** {text}" for text, holds in said if holds]


# -------------------------------------------------------------------------------------------- tables


def _quality(done: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Return the tables of each model and ratio, the dense model on top of every one."""
    speeds = ranking.speeds(names)
    order = (ranking.perplexities, ranking.averages, ranking.choices, ranking.accuracies)
    kinds = [n for kind in order for n in kind(names)]
    shown = list(dict.fromkeys([*kinds, *names]))
    columns = [_measurement(n, n in ranking.accuracies(names)) for n in shown if n not in speeds]
    several = len({r["model"] for r in done}) > 1
    sections = []
    for model, alike in dict.fromkeys((r["model"], ranking.rank_group(r)) for r in done if not ranking.is_dense(r)):
        group = [r for r in done if r["model"] == model and (ranking.is_dense(r) or ranking.rank_group(r) == alike)]
        sections.append(f"## Quality at {size(*alike)}" + f" of {model}" * several)
        sections += tables(group, identity(done), columns)
    if not sections and done:
        sections = ["## Quality", *tables(done, identity(done), columns)]
    return sections


def _recovery(done: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Return what recovery changed, method by method, and where it made perplexity no lower."""
    pairs, perplexities = ranking.before_and_after(done), ranking.perplexities(names)[:1]
    if not pairs or not perplexities:
        return []
    (first,) = perplexities
    rows = [{**after, "before": before} for before, after in pairs]

    def earlier(name: str) -> Callable[[Row], str]:
        return lambda row: _number(name, figure)(row["before"])

    def times(row: Row) -> str:
        return figure(number(row, first) / number(row["before"], first))

    worse = [r for r in rows if not number(r, first) < number(r["before"], first)]
    said = [f"Recovery lowers {first} in {len(rows) - len(worse)} of {len(rows)} cells."]
    said += [f"Not in {_label(r)}: {one_line(r['recovery_reason'])}; {one_line(r['recovery_note'])}." for r in worse]
    uneven = [r for r in rows if r["seeds"] != r["before"]["seeds"]]
    said += [f"{_label(r)}: before is the mean of seeds {r['before']['seeds']}, after of {r['seeds']}." for r in uneven]
    columns: list[Column] = [c for c in identity(done) if c[0] not in ("#", "stored M", "bits a weight", "packed MiB")]
    for name in (first, *ranking.choices(names)):
        columns += [(f"{name} before", earlier(name)), (f"{name} after", _number(name, figure))]
        columns += [("after / before", times)] if name == first else []
    return ["## Before and after recovery", _bullets(said), markdown_table(rows, columns)]


def size(ratio: float, gone: float = 0.0) -> str:
    """Return what the methods of a table have in common (see ``ranking.rank_group``)."""
    return f"ratio {ratio:g}" if ratio else "sizes that options set" + f", about {gone:g} gone" * bool(gone)


def method(row: Row) -> str:
    """Return what a method is made of, in words; recovery where there was one."""
    parts = (row["metric"], row["strategy"], row["variant"], row["recovery"].removeprefix("none"))
    return " x ".join(one_line(part) for part in parts if isinstance(part, str) and part)


def _label(row: Row) -> str:
    return f"{method(row)} at {row['ratio']:g}"


def _speed(done: Sequence[Row], names: Sequence[str]) -> list[str]:
    sizes: list[Column] = [
        ("true ratio", _number("true_ratio", figure)),
        ("runtime M", _millions("runtime_parameters")),
        ("MACs/token M", _millions("macs_per_token")),
    ]
    columns = [*identity(done), *sizes, *((_heading(n), _number(n, figure)) for n in ranking.speeds(names))]
    return ["## Size and speed", markdown_table(done, columns)] if done else []


def _missing(left: Sequence[Row]) -> list[str]:
    names = ["strategy", "variant", "ratio", "recovery", "seed", "status", "reason"]
    if not any(r["variant"] for r in left):
        names.remove("variant")
    columns = [METRIC, *((name, _words(name)) for name in names)]
    return ["## Without a result", markdown_table(left, columns)] if left else []


def identity(done: Sequence[Row]) -> list[Column]:
    """Return the columns that say which method a row is; those that are the same everywhere are left out."""
    columns: list[Column] = [
        ("#", lambda r: "" if ranking.is_dense(r) else f"{r['rank']:.0f}"),
        METRIC,
        ("strategy", lambda r: "" if ranking.is_dense(r) else one_line(r["strategy"])),
    ]
    columns += [(n, _words(n)) for n in ("variant", "recovery") if any(r[n] not in ("", "none") for r in done)]
    if any(" " in r["seeds"] for r in done):
        columns.append(("seeds", lambda r: str(len(r["seeds"].split()))))
    ratio: Column = ("ratio", lambda r: f"{r['ratio']:g}" if r["ratio"] else "")
    columns += [ratio, ("stored M", _millions("stored_parameters"))]
    if any("packed_mib" in r and not math.isnan(number(r, "packed_mib")) for r in done):
        columns += [
            ("bits a weight", _number("bits_per_weight", figure)),
            ("packed MiB", _number("packed_mib", figure)),
        ]
    return columns


def tables(rows: Sequence[Row], first: Sequence[Column], columns: Sequence[Column]) -> list[str]:
    """Return Markdown tables of WIDTH columns each, every one behind the first columns."""
    starts = range(0, max(len(columns), 1), WIDTH)
    return [markdown_table(rows, [*first, *columns[start : start + WIDTH]]) for start in starts]


def markdown_table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Return rows as a Markdown table; what is in WORDS stands at the left, numbers at the right."""
    lines = [[heading for heading, _ in columns], [":--" if h in WORDS else "--:" for h, _ in columns]]
    lines += [[cell(row) for _, cell in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --------------------------------------------------------------------------------------------- cells


def _measurement(name: str, percent: bool) -> Column:
    return (f"{name} %", _number(name, _percent)) if percent else (name, _number(name, figure))


def _number(name: str, show: Callable[[float], str]) -> Callable[[Row], str]:
    """Return a cell such as ``~41.2 ± 2.1 (25)``: value, standard error (over seeds: deviation), guessing."""

    def cell(row: Row) -> str:
        chance = number(row, f"{name}_chance")
        error = number(row, f"{name}_sd" if " " in row["seeds"] else f"{name}_stderr")
        text = show(number(row, name)) + ("" if math.isnan(error) else f" ± {show(error)}")
        return (
            "~" * ranking.at_chance(row, name)
            + text
            + ("" if math.isnan(chance) else f" ({show(chance).removesuffix('.0')})")
        )

    return cell


def _percent(value: float) -> str:
    return figure(100 * value, 1)


def _words(name: str) -> Callable[[Row], str]:
    return lambda row: one_line(row[name])


def _millions(name: str) -> Callable[[Row], str]:
    return lambda row: figure(number(row, name) / 1e6)


def figure(value: float, decimals: int | None = None) -> str:
    """Return a number to about four figures, or with so many decimals."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞"
    size = abs(value)
    if decimals is None:
        decimals = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3
    return f"{value:,.{decimals}f}"


def one_line(value: Any) -> str:
    """Return a value on one line that cannot break a table."""
    text = "" if value is None or value != value else f"{value:g}" if isinstance(value, float) else str(value)
    text = re.sub(r"\s+", " ", text).replace("|", "\\|")
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + "…"


def _heading(name: str) -> str:
    return name.replace("tokens_per_second", "tok/s").replace("_mib", " MiB").replace("_", " ").replace("@", " ")


# -------------------------------------------------------------------------------------------- footer


def _explanation(names: Sequence[str]) -> list[str]:
    order = ranking.quality_order(names)
    choices = ranking.choices(order)
    others = [name for name in order if name not in (*ranking.perplexities(order), *choices)]
    rest = ["the mean of all accuracies"] if len(others) > 1 else others
    by = " then ".join([*ranking.perplexities(order), *(["choice_logprob"] if choices else []), *rest])
    said = [
        (f"Rank: within one ratio, by {by}.", by),
        (SIZES_EXPLAINED, True),
        ("Perplexity: lower is better.", ranking.perplexities(names)),
        (CHOICES_EXPLAINED, ranking.choices(names)),
        (ERRORS_EXPLAINED, True),
        (SPEEDS_EXPLAINED, ranking.speeds(names)),
    ]
    return [text for text, holds in said if holds]


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
