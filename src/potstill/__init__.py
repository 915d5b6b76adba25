"""Potstill: distil a labelled data set into a few synthetic samples on which networks train nearly as well."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .data import Data, load_data
    from .distilling import Run, distill
    from .errors import PotstillError, Stopped
    from .evaluation import evaluate
    from .exchange import DistilledSet, load
    from .export import export_set
    from .judge import Result
    from .recipe import Recipe

_HOMES = {
    "Data": "data",
    "load_data": "data",
    "Run": "distilling",
    "distill": "distilling",
    "PotstillError": "errors",
    "Stopped": "errors",
    "Result": "judge",
    "evaluate": "evaluation",
    "DistilledSet": "exchange",
    "load": "exchange",
    "export_set": "export",
    "Recipe": "recipe",
}

__all__ = [
    "Data",
    "DistilledSet",
    "PotstillError",
    "Recipe",
    "Result",
    "Run",
    "Stopped",
    "distill",
    "evaluate",
    "export_set",
    "load",
    "load_data",
]


def __getattr__(name: str) -> Any:
    """Import a name's home when it is first asked for: `import potstill` alone does not load PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'potstill' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
