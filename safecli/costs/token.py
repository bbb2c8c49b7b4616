"""Cost from the model's own token embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from safecli.costs import Vocabulary


class TokenCost:
    """Cosine distance of the model's token embeddings, as they are, centred, or whitened.

    Raw embeddings share a direction, and a few more hold little but how often a token occurs. `whitened` is
    all-but-the-top: the mean and the first principal directions are taken away (Mu & Viswanath, ICLR 2018).
    """

    class Options(BaseModel):
        """Options of the backend."""

        model_config = ConfigDict(extra="forbid")
        embeddings: Literal["input", "output"] = Field("input", description="Which embeddings of the model.")
        transform: Literal["raw", "centred", "whitened"] = Field("raw", description="What is done to them first.")
        remove: int | None = Field(
            None, ge=0, description="Principal directions that whitening takes away; by itself a hundredth of them."
        )

    def __init__(self, options: Options) -> None:
        self.options = options

    def build(self, vocabulary: Vocabulary, say: Callable[[str], None]) -> Tensor:
        """Embeddings [V, d]; mean and directions are those of tokens with a meaning."""
        output = self.options.embeddings == "output"
        embeddings = (vocabulary.output_embeddings if output else vocabulary.embeddings).clone()
        if self.options.transform == "raw":
            return embeddings
        known = ~vocabulary.meaningless
        embeddings -= embeddings[known].mean(0)
        if self.options.transform == "whitened":
            remove = embeddings.shape[1] // 100 if self.options.remove is None else self.options.remove
            directions = torch.linalg.eigh(embeddings[known].T @ embeddings[known]).eigenvectors
            top = directions[:, embeddings.shape[1] - remove :]
            embeddings -= (embeddings @ top) @ top.T
        return embeddings
