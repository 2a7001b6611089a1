"""The corpus ``python-docs``: the language reference that every Python carries, so that no download is needed."""

from __future__ import annotations

import hashlib
import platform
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from flexi_plugins.hookspecs import hookimpl

SHORTEST_TOPIC = 1000  # characters; shorter topics mostly repeat each other
SHORTEST_REPEAT = 40  # characters; a shorter paragraph may come twice
UNDERLINE = re.compile(r"([*=~^\"#-])\1{2,}")


def own_text(topics: Mapping[str, str]) -> dict[str, str]:
    """Return the topics without paragraphs that a longer topic has too, and without topics that are mostly repeats."""
    seen: set[str] = set()
    texts = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = [clean(p) for p in re.split(r"\n\s*\n", topics[name].strip("\n"))]
        own = [p for p in paragraphs if p and (len(p) < SHORTEST_REPEAT or p not in seen)]
        seen.update(own)
        text = "\n\n".join(own)
        if len(text) >= max(SHORTEST_TOPIC, len(topics[name]) / 2):
            texts[name] = text
    return texts


def clean(paragraph: str) -> str:
    """Return a paragraph without indentation and underlines; prose is put on one line."""
    lines = [line for line in textwrap.dedent(paragraph).splitlines() if not UNDERLINE.fullmatch(line)]
    return (" " if is_prose(lines) else "\n").join(lines).strip()


def is_prose(lines: list[str]) -> bool:
    """Whether these lines are a paragraph of sentences and no code, grammar, table or list."""
    starts = (" ", ">>>", "...", "* ", "| ", "+-")
    return (
        bool(lines) and lines[-1].endswith((".", ":", "?", "!", ")")) and not any(s.startswith(starts) for s in lines)
    )


def split_topics(texts: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the topics of each split: in the order of a hash, each goes where there is less text so far."""
    splits: dict[str, list[str]] = {"calibration": [], "held-out": []}
    for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        smaller = min(splits, key=lambda split: sum(len(texts[n]) for n in splits[split]))
        splits[smaller].append(name)
    return splits


@dataclass(frozen=True)
class PythonDocs:
    """The language reference as ``pydoc`` shows it, split by topic; no paragraph is in both parts."""

    name: ClassVar[str] = "python-docs"
    licence: ClassVar[str] = "PSF-2.0"
    join: ClassVar[str] = "\n\n"

    @property
    def provenance(self) -> str:
        """The Python that it comes from."""
        return f"pydoc_data.topics of CPython {platform.python_version()}"

    def topics(self, split: str) -> dict[str, str]:
        """Return the texts of a split by topic."""
        from pydoc_data.topics import topics

        texts = own_text(topics)
        return {name: texts[name] for name in split_topics(texts)[split]}

    def texts(self, split: str, data: Path | None) -> Iterator[str]:
        """Yield one document a topic."""
        yield from self.topics(split).values()


@hookimpl
def corpora() -> list[PythonDocs]:
    """Return the corpus that is always there."""
    return [PythonDocs()]
