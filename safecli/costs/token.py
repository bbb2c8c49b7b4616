"""Cost from the model's own token embeddings."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from safecli.costs import Vocabulary


class TokenCost:
    """Cosine distance of the model's input embeddings."""

    class Options(BaseModel):
        """Options of the backend."""

        model_config = ConfigDict(extra="forbid")
        center: bool = Field(False, description="Subtract the mean embedding first: raw ones share a direction.")

    def __init__(self, options: Options) -> None:
        self.options = options

    def build(self, vocabulary: Vocabulary, say: Callable[[str], None]) -> Tensor:
        """Embeddings [V, d]."""
        embeddings = vocabulary.embeddings.clone()
        if self.options.center:
            embeddings -= embeddings[~vocabulary.meaningless].mean(0)
        return embeddings
