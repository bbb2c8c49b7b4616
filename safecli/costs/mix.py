"""Cost mixed of dense backends by weight: `--cost mix:token=0.7,sentence=0.3`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat
from torch import Tensor

from safecli.costs import Vocabulary, unit
from safecli.errors import UsageError
from safecli.registry import COSTS, load_plugin


def _weights(text: Any) -> Any:
    """`token=0.7,sentence=0.3` as a mapping."""
    if not isinstance(text, str):
        return text
    return dict(part.partition("=")[::2] for part in text.split(","))


class MixCost:
    """The weighted mean of other backends' costs, exactly: their unit features, times root weight, side by side."""

    class Options(BaseModel):
        """Options of the backend."""

        model_config = ConfigDict(extra="forbid")
        of: Annotated[dict[str, PositiveFloat], BeforeValidator(_weights)] = Field(
            min_length=1, description="Backends and weights, such as token=0.7,sentence=0.3; weights are scaled to 1."
        )

    def __init__(self, options: Options) -> None:
        self.options = options

    def build(self, vocabulary: Vocabulary, say: Callable[[str], None]) -> Tensor:
        """Features [V, sum of k]; `UsageError` for a backend that has none."""
        whole = sum(self.options.of.values())
        parts = []
        for name, weight in self.options.of.items():
            backend = load_plugin(COSTS, name)
            own = vocabulary.unfinished and vocabulary.unfinished / name
            built = backend(backend.Options()).build(replace(vocabulary, unfinished=own), say)
            if not isinstance(built, Tensor):
                raise UsageError(
                    f"cost 'mix' needs backends with features, and '{name}' gives neighbours: leave it out"
                )
            parts.append(unit(built, vocabulary.meaningless) * (weight / whole) ** 0.5)
        return torch.cat(parts, dim=1)
