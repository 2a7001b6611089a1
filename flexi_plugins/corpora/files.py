"""Corpora by name: those of the catalogue, and ``file:PATH`` for any text file."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flexi_plugins.errors import FlexiError, unknown
from flexi_plugins.hookspecs import Corpus

PREFIX = "file:"


def data_folder(data: Path | str | None) -> Path | None:
    """Return the folder of local texts and tasks; raise where it is none, for all would else come from the hub unsaid."""
    if not data:
        return None
    if Path(data).is_dir():
        return Path(data)
    raise FlexiError(f"data: {str(data)!r} is no folder; --data, or FLEXI_DATA, names one with text/ and tasks/ in it")


@cache
def from_the_hub(what: str, missing: Path) -> None:
    """Say, once, that something is fetched although there is a folder of local data, which has not got it."""
    logging.getLogger("flexi_plugins").warning("%s: there is no %s, so it is taken from the hub", what, missing)


def find_corpus(name: str, corpora: Mapping[str, Corpus]) -> Corpus:
    """Return the corpus of this name: one of the catalogue, or ``file:PATH``."""
    if name.startswith(PREFIX):
        return file_corpus(name.removeprefix(PREFIX))
    if name not in corpora:
        raise FlexiError(unknown("corpus", name, [*corpora, "file:PATH"]))
    return corpora[name]


def file_corpus(path: str | Path) -> FileCorpus:
    """Return the corpus of a text file, which must be there."""
    if not Path(path).is_file():
        raise FlexiError(f"corpus '{PREFIX}{path}': expected a text file, found none; check the path")
    return FileCorpus(Path(path))


@dataclass(frozen=True)
class FileCorpus:
    """A text file: its first half is for calibration, its second half is held out."""

    path: Path
    licence: str = "unknown"
    join: str = "\n\n"

    @property
    def name(self) -> str:
        """``file:PATH`` as it was asked for."""
        return f"{PREFIX}{self.path}"

    @property
    def provenance(self) -> str:
        """The file it is."""
        return f"local file {self.path.name}"

    def texts(self, split: str, data: Path | None) -> Iterator[str]:
        """Yield the half of the file as one document."""
        text = read_text(self.name, self.path)
        middle = _break_after(text, len(text) // 2)
        yield {"calibration": text[:middle], "held-out": text[middle:]}[split]


def read_text(corpus: str, path: Path) -> str:
    """Return the text of a file of this corpus; a file that is no UTF-8 is an error."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FlexiError(f"corpus {corpus!r}: expected UTF-8 text in {path}, found {error}; convert it") from error


def _break_after(text: str, position: int) -> int:
    """Return where the first paragraph, or else line or word, after a position begins."""
    for mark in ("\n\n", "\n", " "):
        found = text.find(mark, position)
        if found >= 0:
            return found + len(mark)
    return position
