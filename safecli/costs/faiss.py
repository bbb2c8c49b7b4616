"""Sparse cost: the nearest neighbours of every token, found with FAISS in the features of a dense backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from safecli.costs import Neighbours, Vocabulary, unit
from safecli.costs.sentence import SentenceCost
from safecli.costs.token import TokenCost


class FaissCost:
    """K nearest neighbours by cosine, exact search; every other pair costs the ceiling."""

    class Options(BaseModel):
        """Options of the backend."""

        model_config = ConfigDict(extra="forbid")
        features: Literal["token", "sentence"] = Field("token", description="Feature space to search in.")
        k: int = Field(64, ge=1, description="Neighbours per token, before they are made symmetric.")

    def __init__(self, options: Options) -> None:
        self.options = options

    def build(self, vocabulary: Vocabulary, say: Callable[[str], None]) -> Neighbours:
        """Neighbours [V, K] with costs 1 - cosine; the ceiling is the mean cost over pairs of tokens."""
        import faiss

        sentence = self.options.features == "sentence"
        dense = SentenceCost(SentenceCost.Options()) if sentence else TokenCost(TokenCost.Options())
        features = unit(dense.build(vocabulary, say), vocabulary.meaningless)
        meaningful = (~vocabulary.meaningless).nonzero().squeeze(1)
        vectors = features[meaningful].contiguous().numpy()
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        k = min(self.options.k + 1, len(meaningful))
        indices = torch.full((vocabulary.size, k), -1)
        costs = torch.zeros(vocabulary.size, k)
        for start in range(0, len(meaningful), 4096):
            rows = meaningful[start : start + 4096]
            similarity, found = index.search(vectors[start : start + 4096], k)
            indices[rows] = meaningful[torch.from_numpy(found)]
            costs[rows] = (1 - torch.from_numpy(similarity)).clamp(min=0)
            say(f"faiss cost: {start + len(rows):,} of {len(meaningful):,} tokens searched")
        mean = features[meaningful].double().mean(0)
        return Neighbours(indices, costs, ceiling=float(1 - mean @ mean))
