"""Published numbers: the table is what its sources say, and what papers say about sizes follows from shapes."""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest
from flexi_baselines.flap import Flap
from flexi_baselines.flap_structures import linear_weights
from flexi_baselines.wanda_sp import WandaSp
from tiny import family_of
from transformers import AutoConfig

from flexi_plugins.data import ModelShape
from flexi_plugins.models import known_config
from flexi_plugins.pruner import count_only
from flexi_plugins.strategies.concat_merge import ConcatMerge
from flexi_plugins.strategies.remove_blocks import RemoveBlocks
from flexi_plugins.strategies.remove_units import RemoveUnits
from flexi_plugins.strategies.share_lora import ShareLora

TABLE = Path(__file__).parents[1] / "baselines" / "published.csv"
COLUMNS = ["model", "method", "ratio", "recovery", "task", "value", "metric", "source", "note", "counterpart"]
SEVEN = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
FIVE = ("arc_easy", "arc_challenge", "piqa", "winogrande", "hellaswag")
NINE = ("arc_challenge", "arc_easy", "boolq", "copa", "hellaswag", "piqa", "race", "winogrande", "wsc273")
AVERAGES = {"average": SEVEN, "average of 5": FIVE, "average of 9": NINE, "average of 3": ("wikitext2", "c4", "ptb")}

LLAMA_2_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
QWEN_3_8B = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
OTHERS = {
    "meta-llama/Llama-2-13b-hf": {"model_type": "llama", **LLAMA_2_13B},
    "huggyllama/llama-13b": {"model_type": "llama", **LLAMA_2_13B},
    "Qwen/Qwen3-8B": {"model_type": "qwen3", **QWEN_3_8B},
    "meta-llama/Meta-Llama-3-8B": "meta-llama/Llama-3.1-8B",
}

Line = dict[str, str]


def shape_of(name: str) -> ModelShape:
    """Return the shape of a published model from its configuration."""
    other = OTHERS.get(name, name)
    config = known_config(other) if isinstance(other, str) else AutoConfig.for_model(**other)
    return family_of(config).shape(config)


def lines() -> list[Line]:
    with TABLE.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def groups() -> dict[tuple[str, ...], list[Line]]:
    """Return the lines of one row of a source's table together."""
    found = defaultdict(list)
    for line in lines():
        found[line["model"], line["method"], line["ratio"], line["recovery"], line["source"]].append(line)
    return found


def rounding(printed: str) -> float:
    """Return by how much a number may be off by what was rounded away."""
    return 0.5 * 10 ** -len(printed.partition(".")[2])


# --------------------------------------------------------------------------------------------------- the table


def test_every_line_has_its_columns_and_finite_numbers():
    with TABLE.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == COLUMNS
    assert {len(row) for row in rows} == {len(COLUMNS)}
    assert len(rows) > 1200
    for line in lines():
        assert all(line[c] == line[c].strip() for c in COLUMNS)
        assert all(line[c] for c in COLUMNS if c not in ("note", "counterpart")), line
        assert line["counterpart"] or line["method"] == "dense"
        assert 0 <= float(line["ratio"]) < 1
        assert math.isfinite(float(line["value"]))


def test_a_source_gives_one_value_for_one_thing():
    for key, row in groups().items():
        measured = [(line["task"], line["metric"]) for line in row]
        assert len(measured) == len(set(measured)), key


def test_accuracies_are_percentages_and_perplexities_are_above_one():
    for line in lines():
        value = float(line["value"])
        if line["metric"] in ("acc", "acc_norm"):
            assert 10 < value < 100, line
        if line["metric"].startswith("ppl"):
            assert value > 4, line


def cells(row: Iterable[Line], average: Line) -> list[str]:
    """Return the values that an average is over, as printed; [] if the source has not all of them."""
    kind = "ppl" if average["task"] == "average of 3" else "acc"
    tasks = AVERAGES[average["task"]]
    found = {line["task"]: line["value"] for line in row if line["metric"].startswith(kind)}
    return [found[t] for t in tasks] if set(tasks) <= found.keys() else []


def averages() -> list[tuple[Line, list[str]]]:
    return [
        (line, found)
        for row in groups().values()
        for line in row
        if line["task"] in AVERAGES and line["metric"].startswith(("acc", "ppl")) and (found := cells(row, line))
    ]


def test_averages_are_the_mean_of_their_cells_unless_noted():
    checked = averages()
    assert len(checked) > 100
    for line, found in checked:
        mean = sum(map(float, found)) / len(found)
        within = rounding(line["value"]) + max(map(rounding, found)) + 1e-9
        agrees = abs(mean - float(line["value"])) <= within
        assert agrees != line["note"].startswith("as printed"), (line, mean)


def test_the_two_averages_that_flexigpt_prints_wrong_are_noted_with_the_right_ones():
    noted = {line["value"]: (line, found) for line, found in averages() if line["note"].startswith("as printed")}
    assert set(noted) == {"61.40", "62.68"}
    for line, found in noted.values():
        assert f"is {sum(map(float, found)) / 5:.2f}" in line["note"]


def test_cells_that_are_copies_of_others_are_noted():
    """Prune&Comp's table: WinoGrande equal to WSC in two rows, BoolQ equal to CoPA in one."""
    noted = [line for line in lines() if line["note"].startswith("copy error")]
    assert len(noted) == 3
    for line in noted:
        twin = {"winogrande": "wsc273", "boolq": "copa"}[line["task"]]
        key = tuple(line[c] for c in ("model", "method", "ratio", "recovery", "source"))
        row = groups()[key]
        assert [x["value"] for x in row if x["task"] == twin] == [line["value"]]
        [average] = [x for x in row if x["task"] == "average of 9" and x["metric"] == "acc"]
        assert average["note"].startswith("too high")


def test_retained_percentages_are_of_the_dense_average():
    table = {k: v for k, v in groups().items() if k[-1] == "Prune&Comp appendix Table 2"}
    both = {k: {x["metric"]: x["value"] for x in row if x["task"] == "average of 9"} for k, row in table.items()}
    dense = {k[0]: float(v["acc"]) for k, v in both.items() if k[1] == "dense"}
    assert len(both) > 40
    for key, found in both.items():
        expected = 100 * float(found["acc"]) / dense[key[0]]
        assert float(found["percent of dense"]) == pytest.approx(expected, abs=0.02), key


def test_ratios_of_so_many_blocks_follow_from_shapes():
    """A note says "7/32 blocks": their share of the parameters is the ratio."""
    checked = set()
    for line in lines():
        found = re.search(r"(\d+)/(\d+) blocks", line["note"])
        if found and line["model"] in (*OTHERS, "meta-llama/Llama-2-7b-hf"):
            count, total = map(int, found.groups())
            shape = shape_of(line["model"])
            assert len(shape.blocks) == total
            share = count * shape.block_parameters(shape.blocks[0]) / shape.parameters
            assert float(line["ratio"]) == pytest.approx(share, abs=5e-5), line
            checked.add((line["model"], count))
    assert len(checked) == 8


NARROWING = {"FLAP": Flap, "Wanda-sp": WandaSp}


def test_ratios_of_a_share_of_the_blocks_weights_follow_from_shapes():
    """A note says "0.2 of the weights of the blocks", which is the method's own knob: the ratio is what it removes."""
    checked = set()
    for line in lines():
        found = re.match(r"(?:.*; )?(0\.\d+) of the weights of the blocks", line["note"])
        assert bool(found) == (line["method"] in NARROWING), line
        key = found and (line["model"], line["method"], line["ratio"], float(found[1]))
        if key and key not in checked:
            plan = count_only(shape_of(key[0]), NARROWING[key[1]](fraction=key[3]), 0.0)
            assert float(key[2]) == pytest.approx(plan.ratio, abs=5e-5), line
            checked.add(key)
    assert len(checked) == 8


def test_what_flexigpt_contradicts_is_noted():
    """Section 5.2 and Table 5 differ in the tokens; the times of Table 6 and the parameters of appendix A, in the blocks."""
    told = {"FlexiGPT Table 5": ("1B tokens", "10B"), "FlexiGPT Table 6": ("11 blocks", "fit 9")}
    noted = [x for x in lines() if x["source"] in told and (x["source"].endswith("5") or x["method"] != "dense")]
    assert len(noted) == 25
    assert all(part in line["note"] for line in noted for part in told[line["source"]])


# ----------------------------------------------------------------------------------------- sizes that papers state


def test_published_models_have_their_published_number_of_parameters():
    assert shape_of("meta-llama/Llama-2-13b-hf").parameters == 13_015_864_320
    assert shape_of("Qwen/Qwen3-8B").parameters == 8_190_735_360
    assert shape_of("meta-llama/Meta-Llama-3-8B").parameters == 8_030_261_248


@pytest.mark.parametrize(
    ("fraction", "first", "last", "left"), [(0.25, 4, 29, 5_422_977_024), (0.6, 3, 30, 3_350_188_032)]
)
def test_llm_pruners_fractions_of_groups(fraction, first, last, left):
    """The first is in the authors' log; the second is the 3.35 billion of their table."""
    strategy = RemoveUnits(mode="uniform", fraction=fraction, first=first, last=last)
    assert count_only(shape_of("huggyllama/llama-7b"), strategy, 0.5).stored_parameters == left


def test_a_head_costs_512_thirds_of_a_channel_on_llama_7b():
    """FLAP's constant; with grouped queries a KV head costs (2 + 2 x group) x head size / 3 channels."""
    shape = shape_of("huggyllama/llama-7b")
    assert 3 * shape.head_cost(shape.blocks[0]) == 512 * shape.channel_cost()
    grouped = shape_of("meta-llama/Llama-3.1-8B")
    assert 3 * grouped.head_cost(grouped.blocks[0]) == (2 + 2 * 4) * 128 * grouped.channel_cost()


@pytest.mark.parametrize(("bias", "left"), [(False, 3_500_412_928), (True, 3_500_675_072)])
def test_half_of_every_blocks_units_is_half_of_the_linear_weights(bias, left):
    """FLAP's UL-UM at 0.5; with its biases, two vectors a block more."""
    shape = shape_of("huggyllama/llama-7b")
    plan = count_only(shape, Flap(structure="UL-UM", fraction=0.5, bias=bias), 0.0)
    assert plan.stored_parameters == left
    assert shape.parameters - left == linear_weights(shape) // 2 - bias * 2 * 32 * 4096


FLEXIGPT = [  # blocks of Llama-2-7B, then in percent: gone without adapters, more with them, gone with them
    (9, 27.03, 3.66, 24.36),
    (10, 30.03, 4.24, 27.07),
    (11, 33.04, 4.87, 29.77),
    (12, 36.04, 5.57, 32.48),
    (13, 39.04, 6.33, 35.19),
    (14, 42.05, 7.17, 37.90),
    (15, 45.05, 8.10, 40.60),
]


@pytest.mark.parametrize(("count", "removed", "more", "net"), FLEXIGPT)
def test_what_flexigpts_adapters_store(count, removed, more, net):
    """Rank 256 on all seven maps; the norms, which these percentages leave out, are less than a hundredth."""
    shape = shape_of("meta-llama/Llama-2-7b-hf")
    without = count_only(shape, RemoveBlocks(blocks=count), 0.5)
    shared = count_only(shape, ShareLora(blocks=count, rank=256), 0.5)
    assert 100 * without.ratio == pytest.approx(removed, abs=0.006)
    assert 100 * (shared.stored_parameters / without.stored_parameters - 1) == pytest.approx(more, abs=0.01)
    assert 100 * shared.ratio == pytest.approx(net, abs=0.01)


@pytest.mark.parametrize(("merges", "percent"), [(3, 9.0), (4, 12.0), (7, 21.0), (10, 30.0)])
def test_comes_merges_of_llama_2_7b(merges, percent):
    plan = count_only(shape_of("meta-llama/Llama-2-7b-hf"), ConcatMerge(merges=merges), 0.5)
    assert len(plan.blocks) == 32 - merges
    assert 100 * plan.ratio == pytest.approx(percent, abs=0.05)


@pytest.mark.parametrize(("blocks", "billion"), [(6, 5.5), (9, 4.9), (11, 4.5)])
def test_the_names_of_shortened_llamas_models_are_their_sizes(blocks, billion):
    plan = count_only(shape_of("huggyllama/llama-7b"), RemoveBlocks(blocks=blocks), 0.5)
    assert plan.stored_parameters / 1e9 == pytest.approx(billion, abs=0.05)
