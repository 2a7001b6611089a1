"""The corpora that pruning papers use, from a local folder or else from the Hugging Face hub."""

from __future__ import annotations

import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from flexi_plugins.corpora.files import from_the_hub, read_text
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import hookimpl

SECONDS = 3  # to wait for the hub's first answer
FILES = {"calibration": "valid", "held-out": "test"}
RESPONSE = "### Response:\n"


@dataclass(frozen=True)
class Rows:
    """Which rows of a data set on the hub make a part of a corpus."""

    split: str
    start: int = 0
    stop: int | None = None
    files: str | None = None


@dataclass(frozen=True)
class HubCorpus:
    """A data set of the hub, or the text files DATA/text/NAME-valid.txt and NAME-test.txt in its place.

    ``document`` makes the text of a row, ``split_file`` the documents of a local file. response: of instruction data, the
    text in a document behind which its response begins.
    """

    name: str
    licence: str
    dataset: str
    config: str | None
    calibration: Rows
    held_out: Rows
    document: Callable[[Mapping[str, Any]], str]
    split_file: Callable[[str], list[str]]
    join: str = "\n\n"
    local_version: str = "as the user provides them"
    revision: str | None = None
    streaming: bool = False
    response: str | None = None

    @property
    def provenance(self) -> str:
        """Where the text comes from, and that a local file may be another version."""
        return (
            f"hub data set {self.dataset} ({self.config or 'default'}); with --data DIR the files "
            f"{self.name}-valid.txt (calibration) and {self.name}-test.txt (held-out): {self.local_version}"
        )

    def texts(self, split: str, data: Path | None) -> Iterator[str]:
        """Yield the documents of the local file if there is one, else of the hub's data set."""
        path = self._path(split, data)
        if path.is_file():
            yield from self.split_file(read_text(self.name, path))
        else:
            if data:
                self._check_whole(split, data)
            yield from self._hub_texts(split, path)

    def _path(self, split: str, data: Path | None) -> Path:
        return (data or Path("FLEXI_DATA")) / "text" / f"{self.name}-{FILES[split]}.txt"

    def _check_whole(self, split: str, data: Path) -> None:
        """Raise where a folder has one of the two files alone: with the other from the hub, one name would mean two texts."""
        [part] = FILES.keys() - {split}
        missing, other = self._path(split, data), self._path(part, data)
        if other.is_file():
            raise FlexiError(
                f"corpus {self.name!r}: found {other} without {missing.name}; put that beside it, or take "
                "both parts from the hub (another --data)"
            )
        from_the_hub(f"corpus {self.name!r}", missing)

    def _hub_texts(self, split: str, path: Path) -> Iterator[str]:
        rows = {"calibration": self.calibration, "held-out": self.held_out}[split]
        try:
            with quick_hub():
                yield from map(self.document, islice(self._load(rows), rows.start, rows.stop))
        except Exception as error:  # whatever the hub's client raises, the next step is the same
            raise FlexiError(
                f"corpus {self.name!r}: found neither the file {path} nor the hub data set {self.dataset} "
                f"({type(error).__name__}: {error}); connect to the network, or provide that file (FLEXI_DATA is the "
                "folder that --data or the variable FLEXI_DATA names)"
            ) from error

    def _load(self, rows: Rows) -> Any:
        from datasets import load_dataset

        return load_dataset(
            self.dataset,
            self.config,
            split=rows.split,
            data_files={rows.split: rows.files} if rows.files else None,
            revision=self.revision,
            streaming=self.streaming,
        )


@contextmanager
def quick_hub() -> Iterator[None]:
    """Within: if the hub does not answer soon, data sets come from the local cache or fail at once, without retries."""
    import datasets
    import huggingface_hub.constants as hub

    before = datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE
    if not any(before) and not _answers(hub.ENDPOINT):
        datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()  # an error page is an answer
    except OSError as error:  # a certificate that Python does not know is an answer: the hub's client knows others
        return isinstance(getattr(error, "reason", None), ssl.SSLError)
    return True


def text_of(row: Mapping[str, Any]) -> str:
    """Return the text of a row of most data sets."""
    return row["text"]


def sentence_of(row: Mapping[str, Any]) -> str:
    """Return the text of a row of Penn Treebank."""
    return row["sentence"]


def instruction_of(row: Mapping[str, Any]) -> str:
    """Return an instruction with its answer in Alpaca's prompt template."""
    more = ", paired with an input that provides further context" if row["input"] else ""
    given = f"\n\n### Input:\n{row['input']}" if row["input"] else ""
    return (
        f"Below is an instruction that describes a task{more}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{row['instruction']}{given}\n\n{RESPONSE}{row['output']}"
    )


def documents(text: str) -> list[str]:
    """Return the instructions of a file in Alpaca's template, each of which begins like the first."""
    first = text.lstrip().partition("\n")[0].split(",")[0].split(".")[0]  # both forms of the template begin so
    if not first:
        raise FlexiError("corpus 'alpaca': its file is empty; expected instructions in Alpaca's template")
    return [first + part.rstrip("\n") for part in text.split(first)[1:]]


def wikitext_rows(text: str) -> list[str]:
    """Return the lines as the hub's data set has them: with their line break, empty ones without."""
    return [line if line.strip() else "" for line in text.splitlines(keepends=True)]


def paragraphs(text: str) -> list[str]:
    """Return the parts between empty lines."""
    return re.split(r"\n\s*\n", text.strip("\n"))


WIKITEXT2 = HubCorpus(
    name="wikitext2",
    licence="CC BY-SA 3.0",
    dataset="Salesforce/wikitext",
    config="wikitext-2-raw-v1",
    calibration=Rows("train"),
    held_out=Rows("test"),
    document=text_of,
    split_file=wikitext_rows,
    local_version="the word-level version of the same text, with <unk>",
)
C4 = HubCorpus(  # the first shard, and the 1,100 validation documents that perplexity is customarily measured on
    name="c4",
    licence="ODC-BY 1.0",
    dataset="allenai/c4",
    config=None,
    calibration=Rows("train", stop=5_000, files="en/c4-train.00000-of-01024.json.gz"),
    held_out=Rows("validation", stop=1_100, files="en/c4-validation.00000-of-00008.json.gz"),
    document=text_of,
    split_file=paragraphs,
    join=" ",
    streaming=True,
)
PTB = HubCorpus(
    name="ptb",
    licence="LDC user agreement (Penn Treebank)",
    dataset="ptb-text-only/ptb_text_only",
    config=None,
    calibration=Rows("train"),
    held_out=Rows("validation"),
    document=sentence_of,
    split_file=str.splitlines,
    revision="refs/convert/parquet",  # `datasets` 4 runs no loading scripts
)
BOOKCORPUS = HubCorpus(
    name="bookcorpus",
    licence="unknown",
    dataset="bookcorpus/bookcorpus",
    config=None,
    calibration=Rows("train", start=100_000, stop=200_000),
    held_out=Rows("train", stop=100_000),
    document=text_of,
    split_file=str.splitlines,
    join=" ",
    revision="refs/convert/parquet",
    streaming=True,
)
ALPACA = HubCorpus(
    name="alpaca",
    licence="CC BY 4.0",
    dataset="yahma/alpaca-cleaned",
    config=None,
    calibration=Rows("train", start=2_000),
    held_out=Rows("train", stop=2_000),
    document=instruction_of,
    split_file=documents,
    response=RESPONSE,
)


@hookimpl
def corpora() -> list[HubCorpus]:
    """Return the corpora of the pruning literature."""
    return [WIKITEXT2, C4, PTB, BOOKCORPUS, ALPACA]
