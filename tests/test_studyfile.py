"""Study files and data: all problems at once, before anything is loaded; what is missing is named with the next step."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from studies import STRATEGIES, make_study, plugins_with, run_study

from flexi_plugins.corpora import hub
from flexi_plugins.data import Scores
from flexi_plugins.errors import FlexiError
from flexi_plugins.plugins import Plugins
from flexi_plugins.pruner import Pruner
from flexi_plugins.studyfile import StudyFile, read_study


def fails(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing was to be run")


@dataclass(frozen=True)
class Needy:
    """A third party's metric that needs a statistic which nobody has."""

    name: ClassVar[str] = "needy"
    paper: ClassVar[str] = ""
    gives: ClassVar[frozenset[str]] = frozenset({"block"})
    needs: ClassVar[frozenset[str]] = frozenset({"jumpy"})

    def score(self, request: Any) -> Scores:
        return Scores()


# ---------------------------------------------------------------------------------------------- study files

WRONG = """
name = "a b"
model = "smollm2-135"
metrics = ["flexgpt", { name = "come", typo = 1 }, 3, "saap", "saap", { name = "come", ratios = [0.9] }]
strategies = ["remove-block", { name = "remove-units", mode = "globl" }, { name = "concat-merge", repeat = "maybe" }]
ratios = [0.2, 1.5, "x"]
seds = [1]
seeds = []
recovery = ["lorra"]
dtype = "float64"
[calibration]
corpus = "wikitxt2"
windws = 3
length = 1
[[evaluation]]
evaluator = "perplexity"
corpus = "python-doc"
window = 1
[[evaluation]]
evaluator = "lm-evall"
[[evaluation]]
evaluator = "efficiency"
repeats = 0
"""
PROBLEMS = [
    "name: it names a folder: expected letters, digits",
    "unknown model 'smollm2-135': did you mean 'smollm2-135m'?",
    "unknown metric 'flexgpt': did you mean 'flexigpt'?",
    "metric 'come': unknown option 'typo'",
    "metrics.2: input should be a table, found 3",
    "metrics: saap is listed twice with the same options",
    "metric 'come': its ratio 0.9 is none of the study's or of a strategy's",
    "unknown strategy 'remove-block': did you mean 'remove-blocks' or 'remove-units'?",
    "strategy 'remove-units': option 'mode': unknown choice 'globl': did you mean 'global'?",
    "strategy 'concat-merge': option 'repeat': expected",
    "ratios: expected a share of the stored parameters between 0 and 1, found 1.5",
    "ratios.2: input should be a valid number",
    "unknown key 'seds': did you mean 'seeds'?",
    "seeds: list should have at least 1 item, not 0, found []",
    "unknown recovery 'lorra'",
    "dtype: input should be 'auto', 'float32', 'bfloat16' or 'float16', found 'float64'",
    "unknown corpus 'wikitxt2': did you mean 'wikitext2'?",
    "calibration: unknown key 'windws': did you mean 'windows'?",
    "calibration.length: input should be greater than or equal to 2, found 1",
    "unknown corpus 'python-doc': did you mean 'python-docs'?",
    "expected a window of at least 2 tokens",
    "unknown evaluator 'lm-evall': did you mean 'lm-eval'?",
    "evaluator 'efficiency': option 'repeats': expected at least 1, found 0",
]


def read(content: str, path: Path) -> StudyFile:
    path.write_text(content)
    return read_study(path, Plugins.load())


def test_all_problems_of_a_study_file_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(FlexiError) as caught:
        read(WRONG, tmp_path / "wrong.toml")
    said = str(caught.value)
    assert [p for p in PROBLEMS if f"\n  - {p}" not in said and p not in said] == []
    assert f"has {len(PROBLEMS)} problems" in said, said
    assert said.count("\n  - ") == len(PROBLEMS)


def test_problems_are_found_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "wrong.toml").write_text(WRONG)
    code = (
        "import sys\n"
        "from flexi_plugins.plugins import Plugins\n"
        "from flexi_plugins.studyfile import read_study\n"
        "try:\n"
        "    read_study(sys.argv[1], Plugins.load())\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "wrong.toml")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "FLEXI_PLUGINS": ""},
    )
    assert "problems" in done.stdout
    assert done.stdout.splitlines()[-1] == "False False"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "name: field required"),
        (
            "name = 'x'\nmodel = 'smollm2-135m'\nmetrics = ['flexigpt']\nstrategies = ['remove-blocks']\n"
            "evaluation = [{evaluator = 'perplexity'}]",
            "ratios: strategy 'remove-blocks' has none; give the study or the strategy ratios",
        ),
        (
            "name = 'x'\nmodel = 'smollm2-135m'\nratios = [0.2]\nevaluation = [{evaluator = 'perplexity'}]",
            "expected metrics and strategies, or pairs, or all of them",
        ),
        ("pairs = [{metric = 'come'}]", "pairs.0.strategy: field required"),
        ("pairs = [{metrik = 'come'}]", "pairs.0: unknown key 'metrik': did you mean 'metric'?"),
        ("pairs = [{metric = 'com', strategy = 'remove-block'}]", "unknown metric 'com': did you mean 'come'?"),
        ("x = ", "is not TOML"),
        ("metrics = 'come'", "metrics: input should be a valid list, found 'come'"),
        ("calibration = 3", "calibration: input should be a table, found 3"),
        ("evaluation = [{corpus = 'python-docs'}]", "evaluation.0.evaluator: field required"),
        ("[calibration]\ncorpus = 'file:/no/such.txt'", "corpus 'file:/no/such.txt': expected a text file, found none"),
    ],
)
def test_a_study_file_of_the_wrong_form_is_told_so(tmp_path: Path, content: str, problem: str) -> None:
    with pytest.raises(FlexiError) as caught:
        read(content, tmp_path / "wrong.toml")
    assert problem in str(caught.value)


def test_no_recovery_at_all_is_a_problem(tmp_path: Path) -> None:
    """No cell would be left; "none" is a recovery."""
    content = 'name = "s"\nmodel = "smollm2-135m"\nmetrics = ["come"]\nstrategies = ["remove-blocks"]\nratios = [0.2]\n'
    with pytest.raises(FlexiError, match="recovery: list should have at least 1 item"):
        read(f'{content}recovery = []\n[[evaluation]]\nevaluator = "perplexity"\n', tmp_path / "s.toml")


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (
            'evaluator = "lm-eval"\ntasks = ["piqa"]',
            'evaluator = "lm-eval"\ntasks = ["boolq", "piqa"]',
            "lm-eval measures piqa",
        ),
        (
            'evaluator = "perplexity"\ntokens = 512',
            'evaluator = "perplexity"\ntokens = 1024',
            "perplexity measures python-docs",
        ),
        ('evaluator = "perplexity"\nwindow = 128', 'evaluator = "perplexity"\nwindow = 256', ""),
        ('evaluator = "lm-eval"\ntasks = ["piqa"]', 'evaluator = "lm-eval"\ntasks = ["boolq"]', ""),
    ],
)
def test_what_would_be_measured_twice_by_one_name_is_refused(
    tmp_path: Path, first: str, second: str, said: str
) -> None:
    study = 'name = "s"\nmodel = "smollm2-135m"\nmetrics = ["come"]\nstrategies = ["remove-blocks"]\nratios = [0.2]\n'
    content = f"{study}\n[[evaluation]]\n{first}\n\n[[evaluation]]\n{second}\n"
    if not said:
        assert len(read(content, tmp_path / "s.toml").evaluation) == 2
        return
    with pytest.raises(FlexiError, match=f"evaluation: {said} twice, with other options and by one name; put one of"):
        read(content, tmp_path / "s.toml")


def test_pairs_stand_beside_the_grid(tmp_path: Path) -> None:
    content = """
        name = "x"
        model = "smollm2-135m"
        metrics = [{ name = "come", ratios = [0.1] }, "saap"]
        strategies = ["remove-units"]
        ratios = [0.1, 0.2]
        pairs = [
          { metric = "greedy", strategy = { name = "remove-blocks", progressive = true } },
          { metric = { name = "greedy", measure = "chrf" }, strategy = "remove-blocks", ratios = [0.3] },
        ]
        [[evaluation]]
        evaluator = "perplexity"
    """
    found = [
        (m.name, s.name, {**m.options, **s.options}, r) for m, s, r in read(content, tmp_path / "x.toml").combinations
    ]
    assert found == [
        ("come", "remove-units", {}, (0.1,)),
        ("saap", "remove-units", {}, (0.1, 0.2)),
        ("greedy", "remove-blocks", {"progressive": True}, (0.1, 0.2)),
        ("greedy", "remove-blocks", {"measure": "chrf"}, (0.3,)),
    ]


def test_a_study_file_that_is_not_there_is_told_so(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(FlexiError, match=f"study file '{path}'"):
            read_study(path, Plugins.load())


def test_a_statistic_that_nobody_offers_is_a_problem_of_the_study_file(tmp_path: Path, model: Path, text: Path) -> None:
    file = make_study(tmp_path / "s.toml", model, text, ["needy"])
    with pytest.raises(FlexiError, match="metric 'needy': it needs an unknown statistic 'jumpy'"):
        read_study(file, plugins_with(importance_metrics=[Needy()]))


def test_ratios_out_of_reach_are_named_together_before_anything_is_run(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pruner, "plan", fails)
    monkeypatch.setattr(Pruner, "texts", property(fails))
    narrow = '{ name = "remove-units", protect_first = 3, protect_last = 3 }'
    file = make_study(tmp_path / "s.toml", model, text, ["come"], [*STRATEGIES, narrow], "[0.2, 0.9]")
    with pytest.raises(FlexiError) as caught:
        run_study(file, tmp_path / "run")
    lines = str(caught.value).splitlines()
    assert len(lines) == 5, "those that reach 0.2 are not named for it"
    for strategy, line in zip(STRATEGIES, lines, strict=False):
        assert re.search(rf"{strategy}: ratio 0.9 is out of reach .*up to 0\.\d+", line), line
    assert "remove-units: blocks 3..2 are not a range" in lines[4]


# ---------------------------------------------------------------------------------------------- missing data


def test_missing_text_is_an_error_that_names_the_file_and_the_option(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_answers", lambda address: False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    file = make_study(tmp_path / "s.toml", model, text)
    file.write_text(file.read_text().replace(f"file:{text}", "wikitext2"))
    with pytest.raises(FlexiError) as caught:
        run_study(file, tmp_path / "run")
    assert re.search(r"wikitext2-(valid|test)\.txt", str(caught.value))
    assert "--data" in str(caught.value)
    data = tmp_path / "data"
    (data / "text").mkdir(parents=True)
    for part in ("valid", "test"):
        (data / "text" / f"wikitext2-{part}.txt").write_text(text.read_text())
    [record, *_] = run_study(file, tmp_path / "run", data=data)
    assert record.measurements[0].name == "wikitext2_ppl@128"


@pytest.mark.parametrize(("before", "after"), [("windows = 4", "windows = 4000"), ("tokens = 512", "tokens = 1280000")])
def test_a_text_that_is_too_short_says_how_many_tokens_there_are(
    model: Path, text: Path, tmp_path: Path, before: str, after: str
) -> None:
    file = make_study(tmp_path / "s.toml", model, text)
    file.write_text(file.read_text().replace(before, after))
    with pytest.raises(FlexiError, match=r"expected at least \d+ windows .* found 1\d{4} tokens; ask for at most"):
        run_study(file, tmp_path / "run")
