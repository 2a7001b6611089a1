"""The one exception that users see: who complains, what was expected, what was found, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FlexiError(ValueError):
    """A problem the user can act on; its text is the whole message, without a traceback."""


class OutOfReach(FlexiError):
    """A ratio that a strategy cannot meet on this model; the text gives the reachable range."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the message for an unknown name: similar names first, then what there is."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    return f"unknown {kind} {name!r}: {hint}there is {', '.join(names) or 'none'}"
