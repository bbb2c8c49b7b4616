"""Make a language model leave its own unsafe answers, and prove what changed.

    import safecli
    collected = safecli.collect(safecli.CollectOptions(model="demo"))
    trained = safecli.train(safecli.TrainOptions(cost="faiss"))
    found = safecli.evaluate(safecli.EvalOptions())

Every function takes the options of its stage, and an optional `Reporter` that is told what happens.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from safecli.config import CollectOptions, CostOptions, EvalOptions, TrainOptions
    from safecli.errors import SafecliError
    from safecli.stages import Reporter
    from safecli.stages.collect import collect
    from safecli.stages.cost import build_cost
    from safecli.stages.evaluate import evaluate
    from safecli.stages.run import run
    from safecli.stages.train import train

_HOMES = {
    "CollectOptions": "config",
    "CostOptions": "config",
    "EvalOptions": "config",
    "TrainOptions": "config",
    "SafecliError": "errors",
    "Reporter": "stages",
    "build_cost": "stages.cost",
    "collect": "stages.collect",
    "evaluate": "stages.evaluate",
    "run": "stages.run",
    "train": "stages.train",
}

__all__ = [
    "CollectOptions",
    "CostOptions",
    "EvalOptions",
    "Reporter",
    "SafecliError",
    "TrainOptions",
    "__version__",
    "build_cost",
    "collect",
    "evaluate",
    "run",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a stage when it is first asked for, so that `import safecli` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'safecli' has no attribute '{name}'")
    return getattr(importlib.import_module(f"safecli.{_HOMES[name]}"), name)
