"""Corpora: what they yield, what they promise, and how they are cut into windows."""

from __future__ import annotations

import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexi_plugins.corpora import files, hub, python_docs, windows
from flexi_plugins.errors import FlexiError
from flexi_plugins.evaluators.perplexity import Perplexity
from flexi_plugins.plugins import Plugins

SPLITS = ("calibration", "held-out")
DATA = os.environ.get("FLEXI_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="FLEXI_DATA does not name the folder with the data sets")


class Words:
    """A tokenizer with one token a word, which remembers how much text it was given."""

    def __init__(self) -> None:
        self.characters = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        self.characters += len(text)
        return {"input_ids": [len(word) for word in text.split()]}


@dataclass(frozen=True)
class Numbers:
    """A corpus of documents of ten numbered words."""

    documents: int
    name: str = "numbers"
    licence: str = "CC0"
    provenance: str = "made here"
    join: str = " "

    def texts(self, split: str, data: Path | None) -> Iterator[str]:
        for i in range(self.documents):
            yield " ".join("x" * (10 * i + j + 1) for j in range(10))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let nobody answer at the hub's address, and let the cache be empty."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


# ------------------------------------------------------------------------------------------- python-docs


def test_python_docs_halves_are_about_equal_and_repeatable():
    sizes = {split: sum(map(len, python_docs.PythonDocs().texts(split, None))) for split in SPLITS}
    assert min(sizes.values()) > 100_000
    assert max(sizes.values()) < 1.5 * min(sizes.values())
    assert python_docs.PythonDocs().topics("held-out") == python_docs.PythonDocs().topics("held-out")


def test_python_docs_splits_share_no_topic_and_no_paragraph():
    topics = {split: python_docs.PythonDocs().topics(split) for split in SPLITS}
    assert not topics["calibration"].keys() & topics["held-out"].keys()
    paragraphs = {
        split: {p for t in topics[split].values() for p in t.split("\n\n") if len(p) > 40} for split in SPLITS
    }
    assert not paragraphs["calibration"] & paragraphs["held-out"]


def test_no_two_python_docs_topics_across_the_splits_are_nearly_the_same():
    runs = {split: [_runs(t) for t in python_docs.PythonDocs().topics(split).values()] for split in SPLITS}
    for one in runs["calibration"]:
        for other in runs["held-out"]:
            assert len(one & other) < 0.1 * min(len(one), len(other))


def _runs(text: str, length: int = 10) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + length]) for i in range(len(words) - length)}


def test_a_repeated_topic_and_a_repeated_paragraph_are_left_out():
    long = "\n\n".join(f"Sentence number {i} of the long topic, which is quite long." for i in range(60))
    topics = {"long": long, "copy": long[: len(long) // 2], "mixed": long[:300] + "\n\n" + "Quite new text here. " * 90}
    texts = python_docs.own_text(topics)
    assert set(texts) == {"long", "mixed"}
    assert "number 2" not in texts["mixed"]


def test_prose_is_put_on_one_line_and_code_is_not():
    assert python_docs.clean("   A sentence\n   goes on.") == "A sentence goes on."
    assert python_docs.clean("   def f():\n       return 1") == "def f():\n    return 1"
    assert python_docs.clean("The title\n*********") == "The title"


def test_python_docs_has_no_underlines_left():
    text = "\n\n".join(python_docs.PythonDocs().texts("held-out", None))
    assert not re.search(r"^[*=~^-]{4,}$", text, re.MULTILINE)


# ------------------------------------------------------------------------------------------- files and names


def test_a_file_is_cut_in_two_at_a_paragraph(tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_text("one two\nthree\n\nfour five\n\nsix seven eight nine ten")
    corpus = files.file_corpus(path)
    first, second = ("".join(corpus.texts(split, None)) for split in SPLITS)
    assert first == "one two\nthree\n\nfour five\n\n"
    assert first + second == path.read_text()
    assert corpus.name == f"file:{path}"


def test_corpora_are_found_by_name(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text")
    catalogue = {"python-docs": python_docs.PythonDocs()}
    assert files.find_corpus("python-docs", catalogue) is catalogue["python-docs"]
    assert files.find_corpus(f"file:{tmp_path / 'a.txt'}", catalogue).name.startswith("file:")
    with pytest.raises(FlexiError, match="did you mean 'python-docs'"):
        files.find_corpus("python-doc", catalogue)
    with pytest.raises(FlexiError, match="expected a text file, found none"):
        files.find_corpus("file:/nowhere.txt", catalogue)


def test_text_that_is_no_utf8_is_an_error(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FlexiError, match="expected UTF-8"):
        list(files.file_corpus(tmp_path / "a.txt").texts("held-out", None))


# ------------------------------------------------------------------------------------------- the hub's corpora


def test_the_papers_corpora_say_their_licence_and_origin():
    assert [c.name for c in hub.corpora()] == ["wikitext2", "c4", "ptb", "bookcorpus", "alpaca"]
    assert all(c.licence and c.dataset in c.provenance for c in hub.corpora())


def test_a_local_file_comes_before_the_hub(tmp_path: Path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "wikitext2-valid.txt").write_text(" \n = Title = \n \n Words .\n")
    assert list(hub.WIKITEXT2.texts("calibration", tmp_path)) == ["", " = Title = \n", "", " Words .\n"]
    (tmp_path / "text" / "ptb-test.txt").write_text("a sentence\nanother\n")
    assert list(hub.PTB.texts("held-out", tmp_path)) == ["a sentence", "another"]


def test_half_of_a_corpus_in_a_folder_is_an_error_and_none_of_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(hub.HubCorpus, "_load", lambda *_: [{"text": "of the hub"}])
    monkeypatch.setattr(hub, "_answers", lambda _: True)
    assert list(hub.WIKITEXT2.texts("held-out", None)) == ["of the hub"]
    assert caplog.messages == []
    for _ in range(2):
        assert list(hub.WIKITEXT2.texts("held-out", tmp_path)) == ["of the hub"]
    missing = tmp_path / "text" / "wikitext2-test.txt"
    assert caplog.messages == [f"corpus 'wikitext2': there is no {missing}, so it is taken from the hub"]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "wikitext2-valid.txt").write_text("Words .\n")
    with pytest.raises(
        FlexiError, match=r"found .*wikitext2-valid\.txt without wikitext2-test\.txt; put that beside it"
    ):
        list(hub.WIKITEXT2.texts("held-out", tmp_path))


@pytest.mark.usefixtures("offline")
def test_without_network_and_file_the_error_names_both_and_comes_soon(tmp_path: Path):
    start = time.monotonic()
    with pytest.raises(FlexiError) as caught:
        list(hub.C4.texts("held-out", tmp_path))
    assert time.monotonic() - start < 10
    assert str(tmp_path / "text" / "c4-test.txt") in str(caught.value)
    assert "allenai/c4" in str(caught.value)


@pytest.mark.usefixtures("offline")
def test_the_hub_is_left_as_it_was_found():
    import datasets
    import huggingface_hub.constants

    def state() -> tuple[bool, bool]:
        return datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE

    before = state()
    with hub.quick_hub():
        assert state() == (True, True)
    assert state() == before


@pytest.mark.parametrize(
    ("reason", "answers"), [(ssl.SSLCertVerificationError("unknown issuer"), True), (TimeoutError("too slow"), False)]
)
def test_a_certificate_that_python_does_not_know_is_an_answer(
    reason: OSError, answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own client may know it."""

    def fail(*_: Any, **__: Any) -> Any:
        raise urllib.error.URLError(reason)

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    assert hub._answers("https://hub") == answers


def test_alpaca_rows_are_put_into_its_template():
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert hub.instruction_of(row).endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3")
    assert "Input" not in hub.instruction_of({**row, "input": ""})


def test_instructions_in_a_file_begin_alike_whatever_is_in_front_of_them():
    texts = [hub.instruction_of({"instruction": f"Add {i}.", "input": "", "output": "3"}) for i in range(3)]
    assert hub.documents("\n\n" + "\n\n".join(texts)) == texts
    with pytest.raises(FlexiError, match="its file is empty; expected instructions in Alpaca's template"):
        hub.documents("\n\n")


@needs_data
def test_local_wikitext2_has_two_different_parts():
    data = Path(str(DATA))
    texts = {split: "".join(hub.WIKITEXT2.texts(split, data)) for split in SPLITS}
    assert all(len(text) > 1_000_000 for text in texts.values())
    assert texts["calibration"] != texts["held-out"]


# ------------------------------------------------------------------------------------------- windows


def test_windows_follow_each_other_and_a_remainder_is_dropped():
    found, _ = windows.token_windows(Numbers(3), "held-out", None, Words(), 7, None)
    assert [token for window in found for token in window] == list(range(1, 29))


def test_the_first_windows_need_no_more_text_than_they_are_made_of():
    tokenizer = Words()
    found, _ = windows.token_windows(Numbers(100), "held-out", None, tokenizer, 10, 2)
    assert found == [list(range(1, 11)), list(range(11, 21))]
    assert tokenizer.characters < 0.1 * sum(map(len, Numbers(100).texts("held-out", None)))


def test_seeded_windows_are_drawn_without_replacement_and_repeatably():
    arguments = Numbers(30), "calibration", None, Words(), 10, 20
    one, digest = windows.token_windows(*arguments, seed=1)
    assert len({tuple(window) for window in one}) == 20
    assert windows.token_windows(*arguments, seed=1) == (one, digest)
    assert windows.token_windows(*arguments, seed=2)[1] != digest


def test_the_digest_of_a_text_is_of_all_that_is_read():
    def digest(count, last, **tokens):
        corpus = SimpleNamespace(texts=lambda split, data: iter([*["a" * 1000] * count, last]))
        return windows.text_digest(corpus, "held-out", None, **tokens)

    assert digest(900, "b") != digest(900, "c")
    assert digest(1100, "b") == digest(1100, "c"), "the first million characters"
    assert digest(1100, "b", tokens=1000) == digest(1100, "b")
    assert digest(1100, "b", tokens=200_000) != digest(1100, "c", tokens=200_000)
    assert digest(1100, "b", tokens=None) != digest(1100, "c", tokens=None)
    whole, part = Perplexity("x", tokens="all"), Perplexity("x", tokens=65536)
    texts = [{"x": SimpleNamespace(texts=lambda s, d, end=end: iter(["a" * 1_000_001, end]))} for end in "bc"]
    assert whole.inputs(None, texts[0]) != whole.inputs(None, texts[1])
    assert part.inputs(None, texts[0]) == part.inputs(None, texts[1])


def test_a_text_that_is_too_short_says_how_many_tokens_there_are():
    with pytest.raises(FlexiError, match=r"expected at least 5 windows of 10 tokens \(50 tokens\), found 30 tokens"):
        windows.token_windows(Numbers(3), "held-out", None, Words(), 10, 5)
    with pytest.raises(FlexiError, match="found 30 tokens"):
        windows.token_windows(Numbers(3), "held-out", None, Words(), 31, None)


def test_the_corpora_are_in_the_catalogue():
    modules = ("flexi_plugins.corpora.python_docs", "flexi_plugins.corpora.hub")
    found = Plugins.load(built_in=modules).entries("corpus")
    assert {"alpaca", "bookcorpus", "c4", "ptb", "python-docs", "wikitext2"} <= set(found)
