"""flexi_plugins: importance metrics and replacement strategies for structured pruning, as interchangeable plugins."""

from flexi_plugins.hookspecs import hookimpl

__all__ = ["hookimpl"]
