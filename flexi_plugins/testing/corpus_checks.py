"""Checks of corpora: where the text comes from, and parts that do not overlap; without a network."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any
from unittest import mock

from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import Corpus
from flexi_plugins.testing.bench import Bench, expect

SPLITS = ("calibration", "held-out")
DOCUMENTS = 2000  # a split is looked at so far
LONG = 40  # characters; shorter documents (empty lines, headings) may come in both splits
REPEATED = 0.01  # share of long documents that may be in both all the same: set phrases


@contextmanager
def no_network() -> Iterator[None]:
    """Within: no connection can be made, so that a check neither downloads nor waits."""

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise OSError("the conformance kit uses no network")

    with (
        mock.patch.object(socket.socket, "connect", refuse),
        mock.patch("socket.create_connection", refuse),
        mock.patch("socket.getaddrinfo", refuse),
    ):
        yield


def says_where_it_comes_from(bench: Bench, corpus: Corpus) -> None:
    """Licence and provenance are said; ``join`` is what stands between two documents."""
    for name in ("licence", "provenance"):
        value = getattr(corpus, name)
        expect(isinstance(value, str) and value.strip(), f"expected {name} to be text, found {value!r}")
    expect(isinstance(corpus.join, str), f"expected join to be text, found {corpus.join!r}")


def splits_do_not_overlap(bench: Bench, corpus: Corpus) -> None:
    """Both splits have text, the same each time, and (next to) no long document is in both.

    Text that is not there without a network is a FlexiError, which says how to get it.
    """
    with no_network():
        try:
            found = {split: [list(islice(corpus.texts(split, None), DOCUMENTS)) for _ in range(2)] for split in SPLITS}
        except FlexiError as error:
            expect(len(str(error)) > 20, f"expected the error to say how to get the text, found {str(error)!r}")
            return
    for split, (once, again) in found.items():
        expect(any(text.strip() for text in once), f"expected text in split {split!r}, found none")
        expect(once == again, f"split {split!r} has another text when it is read again")
    first, second = ({t for t in found[split][0] if len(t) >= LONG} for split in SPLITS)
    both = first & second
    expect(
        len(both) <= REPEATED * min(len(first), len(second)),
        f"{len(both)} documents are in both splits, such as {min(both, default='')[:60]!r}",
    )


CHECKS = (says_where_it_comes_from, splits_do_not_overlap)
