"""flexi_plugins: importance metrics and replacement strategies for structured pruning, as interchangeable plugins."""

from flexi_plugins import _auto
from flexi_plugins.hookspecs import hookimpl

__all__ = ["hookimpl"]

_auto.register()  # the one thing done at import: AutoModelForCausalLM then opens our checkpoint folders
