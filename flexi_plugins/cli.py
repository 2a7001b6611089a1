"""The command line: flexi run | plan | prune | extend | recover | eval | report | list | check."""

from __future__ import annotations

import os
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexi_plugins.errors import FlexiError
from flexi_plugins.show import (
    plan_summary,
    print_json,
    show_list,
    show_outcomes,
    show_plan,
    show_reports,
    show_written,
)

if TYPE_CHECKING:
    from flexi_plugins.data import PruningPlan
    from flexi_plugins.machine import Machine
    from flexi_plugins.plugins import Plugins
    from flexi_plugins.progress import Progress
    from flexi_plugins.pruner import Pruner
    from flexi_plugins.studyfile import Measure

INTERRUPTED = 130

app = typer.Typer(
    name="flexi",
    help="Structured pruning of LLMs, taken apart: any importance metric with any replacement strategy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[
    str, typer.Option("--model", help="smollm2-135m, a checkpoint folder, or a hub name OWNER/NAME[@REVISION].")
]
Metric = Annotated[str | None, typer.Option("--metric", help="Importance metric; see `flexi list`.")]
Strategy = Annotated[str | None, typer.Option("--strategy", help="Replacement strategy; see `flexi list`.")]
Ratio = Annotated[
    float | None, typer.Option("--ratio", help="Share of the stored parameters to remove, between 0 and 1.")
]
MetricOptions = Annotated[list[str] | None, typer.Option("--metric-option", help="KEY=VALUE, repeatable.")]
StrategyOptions = Annotated[list[str] | None, typer.Option("--strategy-option", help="KEY=VALUE, repeatable.")]
Corpus = Annotated[str, typer.Option("--corpus", help="Calibration text: a corpus name or file:PATH.")]
TrainingCorpus = Annotated[str, typer.Option("--training-corpus", help="Text to train on: a corpus name or file:PATH.")]
Seed = Annotated[
    int, typer.Option("--seed", help="Seed of the calibration sample, and of all that is drawn or trained.")
]
Data = Annotated[Path | None, typer.Option("--data", envvar="FLEXI_DATA", help="Folder with local tasks/ and text/.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Compute dtype: auto, float32, bfloat16, float16.")]
Memory = Annotated[
    str | None, typer.Option("--memory", help="Most the process may take, such as 4GiB; default: what is free.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]


@app.command()
def run(
    study: Annotated[Path, typer.Argument(help="Study file (TOML).")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the study; default runs/NAME.")] = None,
    data: Data = None,
    device: Device = "auto",
    memory: Memory = None,
    as_json: Json = False,
) -> None:
    """Run a study, or what is left of it, and write its leaderboard.

    \b
    Example: flexi run baselines/recipes/demo.toml
    """
    from flexi_plugins.study import Study
    from flexi_plugins.studyfile import read_study

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise FlexiError(
            "run: a study runs in one process; `flexi recover` can be run by torchrun, to train in several"
        )
    plugins = _plugins()
    file = read_study(study, plugins)
    folder = out or Path("runs") / file.name
    records = Study(file, folder, data, plugins, _progress(), _machine(device, memory)).run()
    failed = [r for r in records if r.status == "failed"]
    if as_json:
        print_json([r.to_json() for r in records])
    else:
        show_reports(plugins, folder)
    for record in failed:
        typer.echo(f"failed: {record.cell.label}: {record.reason}", err=True)
    if failed:
        raise typer.Exit(1)


@app.command()
def plan(
    model: Model = "smollm2-135m",
    metric: Metric = None,
    strategy: Strategy = None,
    ratio: Ratio = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the plan as JSON.")] = None,
    metric_option: MetricOptions = None,
    strategy_option: StrategyOptions = None,
    corpus: Corpus = "python-docs",
    seed: Seed = 0,
    data: Data = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    memory: Memory = None,
    count_only: Annotated[
        bool, typer.Option("--count-only", help="Parameters alone, from the configuration: no weights, no metric.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print what would become of each block, and the exact parameters, before any weight is changed.

    \b
    Example: flexi plan --metric come --strategy concat-merge --ratio 0.2 -o plan.json

    \b
    Example: flexi plan --count-only --model huggyllama/llama-7b --strategy remove-blocks --strategy-option blocks=10
    """
    if count_only:
        if output:
            raise FlexiError("plan: --count-only chooses units without meaning, so its plan is not written; drop -o")
        made = _counted(model, strategy, ratio, strategy_option)
    else:
        method = _method(metric, strategy, ratio, metric_option, strategy_option)
        from flexi_plugins.planfiles import searching, write_plan

        if output:
            _check_new(output)
        with searching(output) as search:
            pruner = _pruner(model, corpus, seed, data, dtype, device, memory, search)
            planned = pruner.steps(*method, pruner.progress.say)
            if output:
                write_plan(output, planned)
        made = planned.plan
    if as_json:
        print_json(plan_summary(made))
    else:
        show_plan(made)


@app.command()
def prune(
    output: Annotated[Path, typer.Option("-o", "--output", help="Checkpoint folder to write.")],
    model: Model = "smollm2-135m",
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="A plan file, in the place of metric, strategy, ratio.")
    ] = None,
    metric: Metric = None,
    strategy: Strategy = None,
    ratio: Ratio = None,
    metric_option: MetricOptions = None,
    strategy_option: StrategyOptions = None,
    corpus: Corpus = "python-docs",
    seed: Seed = 0,
    data: Data = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    memory: Memory = None,
    as_json: Json = False,
) -> None:
    """Write a pruned model as a checkpoint folder, with its plan beside the weights.

    \b
    Example: flexi prune --metric flexigpt --strategy remove-blocks --ratio 0.2 -o pruned/

    \b
    Example: flexi prune --plan plan.json -o pruned/
    """
    _check_new(output)
    asked = _asked(plan_file, metric, strategy, ratio, metric_option, strategy_option)
    _write_model(asked, output, as_json, (model, corpus, seed, data, dtype, device, memory))


@app.command()
def extend(
    output: Annotated[Path, typer.Option("-o", "--output", help="Checkpoint folder to write.")],
    model: Model = "smollm2-135m",
    blocks: Annotated[int | None, typer.Option("--blocks", help="How many blocks the extended model has.")] = None,
    start: Annotated[int | None, typer.Option("--start", help="First block of the span that is repeated.")] = None,
    end: Annotated[int | None, typer.Option("--end", help="Last block of the span.")] = None,
    repetitions: Annotated[
        int | None, typer.Option("--repetitions", help="How often each block of the span runs.")
    ] = None,
    order: Annotated[
        str, typer.Option("--order", help="block (each in place) or sequential (the whole span).")
    ] = "block",
    rank: Annotated[int | None, typer.Option("--rank", help="Rank of the adapters; default hidden / 16.")] = None,
    output_gain: Annotated[
        str, typer.Option("--output-gain", help="Start of the output norms, or calibrated.")
    ] = "calibrated",
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Share by which a calibrated gain may raise the perplexity.")
    ] = 0.01,
    corpus: Corpus = "python-docs",
    seed: Seed = 0,
    data: Data = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    memory: Memory = None,
    as_json: Json = False,
) -> None:
    """Repeat a span of blocks with shared weights, adapters and output norms of their own; to be trained afterwards.

    \b
    Example: flexi extend --blocks 36 -o extended/
    To train it: flexi recover --plan extended/plan.json --method adapters -o trained/
    """
    from flexi_plugins.plugins import Plugins

    _check_new(output)
    given: dict[str, Any] = {"blocks": blocks, "start": start, "end": end, "repetitions": repetitions, "rank": rank}
    given |= {"order": order, "output_gain": output_gain, "tolerance": tolerance}
    options = {name: value for name, value in given.items() if value is not None}
    plugins = Plugins.load()
    asked = plugins.get("metric", "none"), plugins.get("strategy", "extend", options), 0.0
    _write_model(asked, output, as_json, (model, corpus, seed, data, dtype, device, memory))


@app.command()
def recover(
    output: Annotated[Path, typer.Option("-o", "--output", help="Checkpoint folder to write.")],
    method: Annotated[str, typer.Option("--method", help="Recovery method; see `flexi list`.")],
    model: Model = "smollm2-135m",
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="A plan file, in the place of metric, strategy, ratio.")
    ] = None,
    metric: Metric = None,
    strategy: Strategy = None,
    ratio: Ratio = None,
    metric_option: MetricOptions = None,
    strategy_option: StrategyOptions = None,
    recovery_option: Annotated[
        list[str] | None, typer.Option("--recovery-option", help="KEY=VALUE, repeatable.")
    ] = None,
    training_corpus: TrainingCorpus = "python-docs",
    length: Annotated[int, typer.Option("--length", help="Tokens of a training window.")] = 256,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens to train on.")] = 24_576,
    held_out: Annotated[int, typer.Option("--held-out", help="Windows to measure the loss on meanwhile.")] = 16,
    corpus: Corpus = "python-docs",
    seed: Seed = 0,
    data: Data = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    memory: Memory = None,
    as_json: Json = False,
) -> None:
    """Prune a model, train what is left of it, and write it; a training that was stopped goes on where it was.

    --plan takes a plan file, also that of a folder that was written before (FOLDER/plan.json). Without a plan, a metric and
    a strategy the model itself is trained. Under torchrun several processes train together.

    \b
    Example: flexi recover --plan plan.json --method lora --tokens 24576 -o recovered/
    """
    from flexi_plugins.corpora.files import find_corpus
    from flexi_plugins.machine import first_process, take_own_gpu
    from flexi_plugins.planfiles import kept_plan, training_beside, write_trained
    from flexi_plugins.plugins import Plugins
    from flexi_plugins.pruner import Training

    _check_new(output)
    whole = not (plan_file or metric or strategy or ratio is not None or metric_option or strategy_option)
    asked = None if whole else _asked(plan_file, metric, strategy, ratio, metric_option, strategy_option)
    plugins = Plugins.load()
    chosen = plugins.get("recovery", method, _options(recovery_option))
    chosen.check()
    find_corpus(training_corpus, {n: e.object for n, e in plugins.entries("corpus").items()})
    setting = Training(training_corpus, length, tokens, held_out)
    take_own_gpu(device)
    with training_beside(output) as checkpoints:
        pruner = _pruner(model, corpus, seed, data, dtype, device, memory, checkpoints)
        pruner.check_recovery(chosen)
        made, by = kept_plan(pruner, asked, checkpoints)
        of_method = checkpoints / "training" / method
        trained = pruner.recover(made, chosen, setting, of_method, by)
        if first_process():
            write_trained(pruner, trained, checkpoints, of_method, output)
            show_written(trained.plan, pruner.checkpoint, output, as_json)


@app.command("eval")
def evaluate(
    model: Model = "smollm2-135m",
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Evaluate the model of this plan of --model.")
    ] = None,
    tasks: Annotated[
        str, typer.Option("--tasks", help="Comma-separated lm-eval tasks; empty for none.")
    ] = "docs_cloze",
    limit: Annotated[int | None, typer.Option("--limit", help="Documents a task.")] = None,
    perplexity: Annotated[
        str, typer.Option("--perplexity", help="Corpus for perplexity; empty for none.")
    ] = "python-docs",
    window: Annotated[int, typer.Option("--window", help="Perplexity window, tokens.")] = 512,
    tokens: Annotated[int, typer.Option("--tokens", help="Perplexity tokens.")] = 8192,
    efficiency: Annotated[bool, typer.Option("--efficiency", help="Measure speed and memory on the CPU.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="JSON file to write; what is measured is kept until it is there."),
    ] = None,
    data: Data = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    memory: Memory = None,
    as_json: Json = False,
) -> None:
    """Measure one model: perplexity, lm-eval tasks, efficiency; with an output, what was stopped goes on where it was.

    \b
    Example: flexi eval --plan plan.json --tasks piqa,arc_easy --limit 100 --perplexity wikitext2 --data DIR
    """
    from flexi_plugins.data import PruningPlan
    from flexi_plugins.evaluation import Measurer, write_outcomes
    from flexi_plugins.execution.sweep import Planned
    from flexi_plugins.hookspecs import Candidate
    from flexi_plugins.planfiles import kept_beside, read_plan
    from flexi_plugins.store import Journal

    if output:
        _check_new(output)
    measures = []
    if perplexity:
        measures.append({"evaluator": "perplexity", "corpus": perplexity, "window": window, "tokens": tokens})
    if tasks:
        measures.append({"evaluator": "lm-eval", "tasks": [t.strip() for t in tasks.split(",")], "limit": limit})
    if efficiency:
        measures.append({"evaluator": "efficiency"})
    chosen = _measures(measures)
    pruner = _pruner(model, "python-docs", 0, data, dtype, device, memory)
    shape = pruner.checkpoint.shape
    planned = read_plan(plan_file, pruner) if plan_file else Planned(PruningPlan.identity(shape))
    candidate = Candidate(model, planned.plan)
    beside = output or Path(tempfile.gettempdir()) / f"flexi-{uuid.uuid4().hex[:8]}"
    with kept_beside(beside, "eval") as folder:  # it stays where a measurement failed, with the traceback in it
        journal = Journal(folder) if output else None
        with Measurer(pruner, journal, folder, [planned]) as measurer:
            outcomes = [next(measurer.run(measure, [candidate])) for measure in chosen]
        show_outcomes(outcomes, as_json)
        if output:
            write_outcomes(output, pruner, candidate, chosen, outcomes)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A study's folder, such as runs/demo.")],
    publish_to: Annotated[
        Path | None, typer.Option("--publish", help="Copy finished records and reports there.")
    ] = None,
    into: Annotated[
        Path | None, typer.Option("--into", help="Markdown page to put the tables in, between its leaderboard marks.")
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Write PUBLISHED.md as well: published numbers beside these.")
    ] = False,
    published_file: Annotated[
        Path | None,
        typer.Option("--published-file", help="CSV of published numbers; default: baselines/published.csv."),
    ] = None,
    paired_with: Annotated[
        str,
        typer.Option(help="What PAIRED.md has every method beside: best (of its ratio), dense, or METRIC-STRATEGY."),
    ] = "best",
    as_json: Json = False,
) -> None:
    """Write the leaderboard of a study again from its records, publish it, or put published numbers beside it.

    Where the folder has the outcomes of single documents, PAIRED.md says which methods they tell apart.

    \b
    Example: flexi report runs/demo --publish results/demo

    \b
    Example: flexi report results/demo --into README.md

    \b
    Example: flexi report runs/llama-7b --published --paired-with dense
    """
    from flexi_plugins import report as writing
    from flexi_plugins.store import Store

    plugins = _plugins()
    if not (folder / "records").is_dir():
        raise FlexiError(f"report: {str(folder)!r} is no study's folder: it has no records/; run the study first")
    store = Store(folder)
    records = store.records()
    for problem in store.problems:
        typer.echo(problem, err=True)
    title = folder.resolve().name
    target = publish_to or folder
    files = writing.write_again(plugins, store, records, publish_to)
    if into:
        writing.insert_leaderboard(writing.board_of(plugins, target), into)
    written, apart = writing.write_paired(store, records, target, title, paired_with)
    files, beside = [*files, *([written] if written else [])], {"paired": apart}
    if published or published_file:
        file, pairs = writing.write_published(plugins, records, target, title, published_file)
        files, beside = [*files, file], {**beside, "published": pairs}
    if as_json:
        print_json({"records": [r.to_json() for r in records], "files": [str(f) for f in files], **beside})
    else:
        for file in files:
            typer.echo(str(file))


@app.command("list")
def list_plugins(as_json: Json = False) -> None:
    """List every plugin with its paper, options and distribution, and the pairs that cannot work together.

    \b
    Example: flexi list --json
    """
    from flexi_plugins.plugins import KINDS, WITH_OPTIONS, incompatible, options_json

    plugins = _plugins()
    found = {kind: plugins.entries(kind) for kind in KINDS}
    pairs = [
        (m, s, incompatible(found["metric"][m].object, found["strategy"][s].object))
        for m in found["metric"]
        for s in found["strategy"]
    ]
    described = [
        {
            "kind": kind,
            "name": name,
            "paper": getattr(entry.object, "paper", ""),
            "distribution": entry.distribution,
            "version": entry.version,
            "options": {**options_json(entry.object)} if kind in WITH_OPTIONS else {},
        }
        for kind, entries in found.items()
        for name, entry in entries.items()
    ]
    described += [
        {"kind": "family", "name": name, "paper": "", "distribution": distribution, "version": number, "options": {}}
        for name, (distribution, number) in plugins.families().items()
    ]
    refused = [{"metric": m, "strategy": s, "reason": r} for m, s, r in pairs if r]
    if as_json:
        print_json({"plugins": described, "incompatible": refused, "problems": list(plugins.problems)})
    else:
        show_list(described, refused)


@app.command()
def check(
    studies: Annotated[list[Path] | None, typer.Argument(help="Study files to check; none: check the plugins.")] = None,
    as_json: Json = False,
) -> None:
    """Check study files without running them; or run the conformance kit on every installed plugin.

    \b
    Example: flexi check baselines/recipes/*.toml
    """
    plugins = _plugins()
    problems = list(plugins.problems)
    if studies:
        from flexi_plugins.studyfile import read_study

        for path in studies:
            try:
                read_study(path, plugins)
            except FlexiError as error:
                problems.append(str(error))
    else:
        from flexi_plugins.testing.conformance import check_all

        problems += check_all(plugins, _progress())
    if as_json:
        print_json({"problems": problems})
    else:
        for problem in problems:
            typer.echo(problem)
        typer.echo(f"{len(problems)} problems" if problems else "no problems")
    if problems:
        raise typer.Exit(1)


# ---------------------------------------------------------------------------------------------- helpers


def _plugins() -> Plugins:
    from flexi_plugins.plugins import Plugins

    plugins = Plugins.load()
    for problem in plugins.problems:
        typer.echo(problem, err=True)
    return plugins


def _measures(chosen: Sequence[dict[str, Any]]) -> list[Measure]:
    """Return what is to be measured; what cannot work is one error, before anything is loaded."""
    from flexi_plugins.plugins import Plugins
    from flexi_plugins.studyfile import Measure, measure_problems

    if not chosen:
        raise FlexiError("eval: nothing to measure; give --perplexity CORPUS, --tasks NAMES or --efficiency")
    measures = [Measure.model_validate(m) for m in chosen]
    plugins = Plugins.load()
    problems = [p for m in measures for p in measure_problems(m, plugins)]
    if problems:
        raise FlexiError("\n".join(problems))
    return measures


def _progress() -> Progress:
    from flexi_plugins.machine import first_process
    from flexi_plugins.progress import Progress

    return Progress(quiet=not first_process())


def _machine(device: str, memory: str | None) -> Machine:
    from flexi_plugins.machine import Machine, parse_memory

    return Machine(device, parse_memory(memory) if memory else None)


def _pruner(
    model: str,
    corpus: str,
    seed: int,
    data: Path | None,
    dtype: str,
    device: str,
    memory: str | None,
    search: Path | None = None,
) -> Pruner:
    """Return a pruner by its options. search: a folder that keeps what searches try."""
    from flexi_plugins.corpora.files import find_corpus
    from flexi_plugins.pruner import Calibration, Pruner
    from flexi_plugins.store import Journal

    machine = _machine(device, memory)
    machine.dtype(dtype)  # refused before anything is loaded
    plugins = _plugins()
    find_corpus(corpus, {n: e.object for n, e in plugins.entries("corpus").items()})
    calibration = Calibration(corpus=corpus)
    return Pruner(
        model,
        calibration,
        seed=seed,
        data=data,
        dtype=dtype,
        device=machine.device,
        memory=machine.memory,
        plugins=plugins,
        progress=_progress(),
        journal=Journal(search) if search else None,
    )


def _options(pairs: Sequence[str] | None) -> dict[str, str]:
    options = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise FlexiError(f"option {pair!r}: expected KEY=VALUE")
        options[key.replace("-", "_")] = value
    return options


def _asked_ratio(strategy: Any, ratio: float | None) -> float:
    from flexi_plugins.plugins import own_knob

    if ratio is None and not own_knob(strategy):
        raise FlexiError(f"strategy {strategy.name!r}: give --ratio, the share of the stored parameters to remove")
    if ratio is not None and own_knob(strategy):
        raise FlexiError(
            f"strategy {strategy.name!r}: its option {' or '.join(strategy.knobs)} says how much goes; give it or --ratio"
        )
    return 0.0 if ratio is None else ratio


def _method(
    metric: str | None,
    strategy: str | None,
    ratio: float | None,
    metric_option: Sequence[str] | None,
    strategy_option: Sequence[str] | None,
) -> tuple[Any, Any, float]:
    """Return the metric, the strategy and the ratio, looked up before anything is loaded."""
    from flexi_plugins.plugins import Plugins

    plugins = Plugins.load()
    for kind, name in (("metric", metric), ("strategy", strategy)):
        if not name:
            raise FlexiError(f"give --{kind}: there is {', '.join(plugins.entries(kind))}")
    chosen = plugins.get("metric", str(metric), _options(metric_option))
    replacement = plugins.get("strategy", str(strategy), _options(strategy_option))
    return chosen, replacement, _asked_ratio(replacement, ratio)


def _counted(model: str, strategy: str | None, ratio: float | None, options: Sequence[str] | None) -> PruningPlan:
    from flexi_plugins.models import known_config
    from flexi_plugins.pruner import count_only

    plugins = _plugins()
    if not strategy:
        raise FlexiError(f"give --strategy: there is {', '.join(plugins.entries('strategy'))}")
    chosen = plugins.get("strategy", strategy, _options(options))
    config = known_config(model)
    return count_only(plugins.family(config).shape(config), chosen, _asked_ratio(chosen, ratio))


def _check_new(output: Path) -> None:
    if output.exists():
        raise FlexiError(f"output {str(output)!r} exists already; name another one or remove it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlexiError(f"output {str(output)!r}: cannot be written: {error}; name another one") from None


def _asked(
    plan_file: Path | None,
    metric: str | None,
    strategy: str | None,
    ratio: float | None,
    metric_option: Sequence[str] | None,
    strategy_option: Sequence[str] | None,
) -> Path | tuple[Any, Any, float]:
    """Return the plan file, or the methods and the ratio in its place; both or neither is an error."""
    if not plan_file:
        return _method(metric, strategy, ratio, metric_option, strategy_option)
    if metric or strategy or ratio is not None or metric_option or strategy_option:
        raise FlexiError("give either --plan, or --metric, --strategy, --ratio and their options")
    return plan_file


def _write_model(
    asked: Path | tuple[Any, Any, float],
    output: Path,
    as_json: bool,
    setting: tuple[str, str, int, Path | None, str, str, str | None],
) -> None:
    """Write a plan's model, and say what it is; what a search tried is kept until then. setting: see ``_pruner``."""
    from flexi_plugins.planfiles import make_plan, searching

    with searching(output) as search:
        pruner = _pruner(*setting, search)
        planned = make_plan(pruner, asked)
        pruner.write(planned, output)
    show_written(planned.plan, pruner.checkpoint, output, as_json)


def main() -> None:
    """Run the command line; a user's error is one message and exit status 2, an interrupt is 130."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads cost a shared machine several times the work
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except FlexiError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as end:  # typer makes this of a KeyboardInterrupt, and says nothing
        if end.code == INTERRUPTED:
            _interrupted()
        raise


def _interrupted() -> None:
    typer.echo(
        "interrupted: what studies, trainings and searches with an output have done is kept; run the same command again",
        err=True,
    )
    sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
