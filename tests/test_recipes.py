"""Recipes: every study file is one that runs, and those of published methods plan what their papers say."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import flexi_baselines
import pytest
from flexi_baselines.equal_shares import going
from tiny import family_of

from flexi_plugins import store
from flexi_plugins.budget import check_reach
from flexi_plugins.data import Cell, Measurement, ModelShape, PruningPlan, Record
from flexi_plugins.evaluators import harness
from flexi_plugins.hookspecs import Budget
from flexi_plugins.models import known_config
from flexi_plugins.plugins import Plugins, incompatible, options_json, own_knob
from flexi_plugins.pruner import count_only
from flexi_plugins.recovery.refusal import refusal
from flexi_plugins.reports.published import read_published, side_by_side
from flexi_plugins.studyfile import StudyFile, read_study

FOLDER = Path(__file__).parents[1] / "baselines"
RECIPES = sorted((FOLDER / "recipes").glob("*.toml"))
PUBLISHED = read_published(FOLDER / "published.csv")
SAME_SHAPE = {"meta-llama/Meta-Llama-3-8B": "meta-llama/Llama-3.1-8B"}
SEVEN = {"boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"}


def modules() -> list[ModuleType]:
    """Return the modules of flexi-baselines that contribute plugins."""
    names = sorted(p.stem for p in Path(flexi_baselines.__path__[0]).glob("*.py") if "@hookimpl" in p.read_text())
    return [importlib.import_module(f"flexi_baselines.{name}") for name in names]


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    found = Plugins.load()
    for module in modules():
        if not found.manager.is_registered(module):
            found.add(module)
    return found


@pytest.fixture(autouse=True)
def one_index_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's index of all its tasks takes seconds to make: once is enough."""
    monkeypatch.setattr(harness, "known_tasks", KNOWN_TASKS)


KNOWN_TASKS = cache(harness.known_tasks)
counted = cache(count_only)  # the same sizes are planned for many metrics and recipes


def study_of(name: str, plugins: Plugins) -> StudyFile:
    return read_study(FOLDER / "recipes" / f"{name}.toml", plugins)


def shape_of(study: StudyFile) -> ModelShape:
    config = known_config(SAME_SHAPE.get(study.model, study.model))
    return family_of(config).shape(config)


def plans(name: str, plugins: Plugins) -> list[PruningPlan]:
    """Return what every strategy of a study plans at each of its ratios, from shapes alone."""
    study, made = study_of(name, plugins), []
    for method, ratios in {s: r for _, s, r in study.combinations}.items():
        strategy = plugins.get("strategy", method.name, method.options)
        for ratio in (0.0,) if own_knob(strategy) else ratios:
            made.append(counted(shape_of(study), strategy, ratio))
    return made


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_a_study_that_can_run(path: Path, plugins: Plugins) -> None:
    """Every name and option exists, every metric goes with every strategy, and every ratio is within reach."""
    study = read_study(path, plugins)
    assert study.name == path.stem
    trained = path.stem.startswith("extend-") or path.stem.endswith("-smollm2")
    assert trained or [method.name for method in study.recovery] == ["none"]
    shape = shape_of(study)
    for metric, replacement, ratios in study.combinations:
        strategy = plugins.get("strategy", replacement.name, replacement.options)
        assert incompatible(plugins.get("metric", metric.name, metric.options), strategy) is None
        for ratio in () if own_knob(strategy) else ratios:
            check_reach(strategy.name, Budget(shape.parameters, ratio), strategy.reach(shape))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_says_where_its_settings_are_from(path: Path) -> None:
    first, *_ = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recovery_of_a_recipe_has_something_to_train(path: Path, plugins: Plugins) -> None:
    study = read_study(path, plugins)
    for method in study.recovery:
        recovery = plugins.get("recovery", method.name, method.options)
        for _, replacement, ratios in study.combinations:
            strategy = plugins.get("strategy", replacement.name, replacement.options)
            plan = count_only(shape_of(study), strategy, 0.0 if own_knob(strategy) else ratios[0])
            assert refusal(recovery, plan, strategy) is None


REMOVED = {  # recipe -> how many blocks each of its strategies leaves out of those of its model
    "come": [4, 7, 10],
    "come-p": [4, 7, 10],
    "shortgpt": [9],
    "prune-and-comp": [7, 7, 9, 9, 7, 9],
    "sleb": [4, 7],
    "mka": [14, 14],
    "shortened-llama": [6, 9, 11],
    "llm-streamline": [8, 7, 9],
    "iterative-layer-pruning": [8, 12, 16],
}


@pytest.mark.parametrize("name", REMOVED)
def test_as_many_blocks_go_as_the_paper_says(name: str, plugins: Plugins) -> None:
    assert [len(p.shape.blocks) - len(p.blocks) for p in plans(name, plugins)] == REMOVED[name]


# Parameters of a model and of one of its blocks: four maps of hidden x hidden (in Llama 3 the key and value maps have a
# quarter of its rows) and three of the MLP, and two norms; twice the vocabulary, and the last norm.
LLAMA_2_7B = 2 * 32000 * 4096 + 4096, 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
LLAMA_3_8B = 2 * 128256 * 4096 + 4096, (2 + 2 / 4) * 4096**2 + 3 * 4096 * 14336 + 2 * 4096
LEFT = {  # recipe -> its model, and how many of the 32 blocks each strategy leaves
    "sleb": (LLAMA_2_7B, [28, 25]),
    "mka": (LLAMA_3_8B, [18, 18]),
    "llm-streamline": (LLAMA_2_7B, [24, 25, 23]),
    "shortgpt": (LLAMA_2_7B, [23]),
    "iterative-layer-pruning": (LLAMA_3_8B, [24, 20, 16]),
}


@pytest.mark.parametrize("name", LEFT)
def test_whole_blocks_are_counted_with_all_their_parameters(name: str, plugins: Plugins) -> None:
    (rest, block), left = LEFT[name]
    assert [p.stored_parameters for p in plans(name, plugins)] == [rest + count * block for count in left]


def test_iterative_layer_pruning_leaves_the_billions_of_its_table(plugins: Plugins) -> None:
    """Of Aya Expanse 8B, which has as many parameters as Llama-3.1-8B to three digits."""
    found = [p.stored_parameters for p in plans("iterative-layer-pruning", plugins)]
    assert [int(count / 1e7) / 100 for count in found] == [6.28, 5.41, 4.54]


def test_laco_leaves_23_blocks_at_27_percent(plugins: Plugins) -> None:
    """Each merge of four blocks leaves one; which T leaves how many is the model's to say."""
    study = study_of("laco", plugins)
    strategies = [plugins.get("strategy", s.name, s.options) for s in study.strategies]
    found = [count_only(shape_of(study), s, 0.27) for s in strategies if not own_knob(s)]
    rest, block = LLAMA_2_7B
    assert [(len(p.blocks), p.stored_parameters) for p in found] == [(32 - 3 * 3, rest + 23 * block)] * 2


def test_flexigpt_replaces_nine_and_twelve_blocks_with_adapters_of_rank_256(plugins: Plugins) -> None:
    """As ratios of what is stored, 30 % and 40 % are more blocks: adapters count."""
    shared, removed = [], []
    for plan in plans("flexigpt", plugins):
        ranks = {r.rank for r in plan.blocks if r.shares is not None}
        assert ranks <= {256}
        replaced = sum(r.shares is not None for r in plan.blocks)
        (shared if ranks else removed).append(replaced or len(plan.shape.blocks) - len(plan.blocks))
    assert shared == [9, 12, 12, 15]
    assert removed == [9, 12, 10, 14]


@pytest.mark.parametrize("name", ["llm-pruner", "llm-pruner-vicuna"])
def test_llm_pruner_leaves_what_its_log_and_its_table_say(name: str, plugins: Plugins) -> None:
    assert [p.stored_parameters for p in plans(name, plugins)] == [5_422_977_024, 3_350_188_032]


def test_wanda_sp_removes_whole_heads_of_every_block(plugins: Plugins) -> None:
    """int(0.2 x 32), int(0.3 x 32) and int(0.5 x 32) heads; int(share x 11008) channels."""
    study = study_of("wanda-sp", plugins)
    fractions = [s.options["fraction"] for s in study.strategies]
    assert [going(shape_of(study), 0, f) for f in fractions] == [(6, 2201), (9, 3302), (16, 5504)]


HEAD, CHANNEL = 4 * 128 * 4096, 3 * 4096  # parameters of a unit of LLaMA-7B


def test_wanda_sp_leaves_the_parameters_of_the_heads_and_channels_that_stay(plugins: Plugins) -> None:
    gone = [32 * (heads * HEAD + channels * CHANNEL) for heads, channels in ((6, 2201), (9, 3302), (16, 5504))]
    whole = LLAMA_2_7B[0] + 32 * LLAMA_2_7B[1]  # LLaMA-7B has the same shape
    assert [p.stored_parameters for p in plans("wanda-sp", plugins)] == [whole - g for g in gone]
    assert [g / (32 * (32 * HEAD + 11008 * CHANNEL)) for g in gone] == pytest.approx([0.2, 0.3, 0.5], abs=0.012)


def test_flap_takes_its_fraction_of_the_blocks_weights_and_adds_a_bias_where_units_go(plugins: Plugins) -> None:
    """The authors' threshold may be off by half a head either way, and takes the unit at it as well."""
    study, units = study_of("flap", plugins), 32 * (32 * HEAD + 11008 * CHANNEL)
    for method in study.strategies[:4]:
        plan = count_only(shape_of(study), plugins.get("strategy", method.name, method.options), 0.0)
        found = plan.new_shape.blocks
        gone = sum((32 - b.kv_heads) * HEAD + (11008 - b.channels) * CHANNEL for b in found)
        assert -HEAD / 2 <= gone - method.options["fraction"] * units <= 1.5 * HEAD
        touched = sum((b.kv_heads < 32) + (b.channels < 11008) for b in found) if "bias" not in method.options else 0
        assert plan.stored_parameters == plan.shape.parameters - gone + 4096 * touched


def test_the_structures_of_flap_keep_as_many_heads_and_channels_as_its_script_says(plugins: Plugins) -> None:
    """At half the blocks' weights: the same share, 384 // 32 heads of every block, and 380 heads of all blocks."""
    study = study_of("flap", plugins)
    strategies = [plugins.get("strategy", s.name, s.options) for s in study.strategies]
    uneven = [s for s in strategies if s.structure != "AL-AM"]
    found = {s.structure: count_only(shape_of(study), s, 0.0).new_shape.blocks for s in uneven}
    assert {(b.kv_heads, b.channels) for b in found["UL-UM"]} == {(16, 5504)}
    assert {(b.kv_heads, b.channels) for b in found["UL-MM"]} == {(20, 11008 - 6186)}
    assert sum(32 - b.kv_heads for b in found["AL-MM"]) == 380
    assert sum(11008 - b.channels for b in found["AL-MM"]) == 198_656


def test_blockpruner_removes_twelve_of_sixty_four_sub_layers(plugins: Plugins) -> None:
    for plan in plans("blockpruner", plugins):
        left = sum(bool(b.kv_heads) + bool(b.channels) for b in plan.new_shape.blocks)
        assert 2 * len(plan.shape.blocks) - left == 12


@pytest.mark.parametrize("name", ["flap", "wanda-sp", "llm-pruner", "llm-pruner-vicuna", "saap", "shortened-llama"])
def test_llm_pruners_protocol_is_seven_tasks_and_windows_of_128_tokens(name: str, plugins: Plugins) -> None:
    measures = study_of(name, plugins).evaluation
    assert [set(m.options["tasks"]) for m in measures if m.evaluator == "lm-eval"] == [SEVEN]
    assert {m.options["window"] for m in measures if m.evaluator == "perplexity"} == {128}


PUBLISHED_RECIPES = {  # recipe -> methods of the published table that have a pair in it; the others have none
    "flap": {"FLAP"},
    "flexigpt": {"ShortGPT", "ShortGPT (CosSim(BI))"},  # FlexiGPT before recovery is published on MiniPile only
    "llm-pruner": {
        *(f"LLM-Pruner {form}" for form in ("Element1", "Element2", "Parameter1+2", "Vector")),
        "LLM-Pruner",  # as FLAP has it, whose form is not said
    },
    "llm-pruner-vicuna": {"LLM-Pruner Element1", "LLM-Pruner Element2", "LLM-Pruner Vector"},
    "llm-streamline": {"LLM-Streamline (CosSim(CL))"},
    "prune-and-comp": {
        *(f"Prune&Comp ({m})" for m in ("CosSim(BI)", "CosSim(CL)", "PPL", "Taylor+", "Mag+")),
        "ShortGPT (CosSim(BI))",
        "ShortGPT",  # nine blocks, as FlexiGPT and ModHiFi have it
        "SLEB (PPL)",
        "Taylor (Taylor+)",
        "Magnitude (Mag+)",
    },
    "shortgpt": {"ShortGPT", "ShortGPT (CosSim(BI))"},
    "sleb": {"SLEB (PPL)"},
    "wanda-sp": {"Wanda-sp"},
}
PUBLISHED_MODELS = {line.model for line in PUBLISHED}


def measured(study: StudyFile) -> set[str]:
    """Return the names of what a study measures, as its evaluators give them."""
    names = set()
    for method in study.evaluation:
        if method.evaluator == "perplexity":
            names.add(f"{method.options['corpus']}_ppl@{method.options['window']}")
        names |= {f"{task}_{accuracy}" for task in method.options.get("tasks", ()) for accuracy in ("acc", "acc_norm")}
    return names


@pytest.mark.parametrize("name", [p.stem for p in RECIPES])
def test_a_recipe_has_its_own_published_numbers_beside_it_and_no_others(name: str, plugins: Plugins) -> None:
    study = study_of(name, plugins)
    if study.model not in PUBLISHED_MODELS:
        assert name not in PUBLISHED_RECIPES
        return
    own = [line for line in PUBLISHED if line.recovery == "none" and line.ratio]
    measurements = tuple(Measurement(n, 1.0, False) for n in sorted(measured(study)))
    records = []
    for metric, method, ratios in study.combinations:
        scored = plugins.entry("metric", metric.name, metric.options)
        strategy = plugins.entry("strategy", method.name, method.options)
        options = {"metric": options_json(scored.object), "strategy": options_json(strategy.object)}
        for ratio in (0.0,) if own_knob(strategy.object) else ratios:
            plan = counted(shape_of(study), strategy.object, ratio)
            cell = Cell(study.model, "f" * 64, "c" * 64, metric.name, method.name, ratio, "none", 0, "", ())
            cell = replace(cell, options=json.dumps(options), plugins=(scored.provenance, strategy.provenance))
            records.append(Record(cell, "complete", measurements=measurements, plan=plan))
    pairs = side_by_side(store.rows(records), own, {})
    assert {pair["method"] for pair in pairs} == PUBLISHED_RECIPES.get(name, set())


def test_every_counterpart_is_a_metric_and_a_strategy_with_options_that_there_are(plugins: Plugins) -> None:
    """A misspelt counterpart would stand beside nothing, and nobody would see it."""
    for told in {line.counterpart for line in PUBLISHED} - {"", "-"}:
        method, *options = told.split(", ")
        pair = [plugins.get(k, n) for k, n in zip(("metric", "strategy"), method.split(" x "), strict=True)]
        assert incompatible(*pair) is None, told
        for name, value in (option.split("=") for option in options):
            [(kind, owner)] = [(k, p) for k, p in zip(("metric", "strategy"), pair, strict=True) if hasattr(p, name)]
            default = options_json(owner)[name]
            given = json.loads(value) if isinstance(default, bool) else value
            set_ = options_json(plugins.get(kind, owner.name, {name: given}))[name]
            assert value == (set_ if isinstance(set_, str) else json.dumps(set_)), told
