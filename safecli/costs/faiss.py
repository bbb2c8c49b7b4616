"""Sparse cost: the nearest neighbours of every token, found with FAISS in the features of a dense backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from safecli.costs import Neighbours, Vocabulary, unit
from safecli.costs.sentence import SentenceCost
from safecli.costs.token import TokenCost

BATCH = 4096
SAMPLE = 512
"""Tokens on which the recall of an approximate search is measured."""


class FaissCost:
    """K nearest neighbours by cosine; every other pair costs the ceiling."""

    class Options(BaseModel):
        """Options of the backend."""

        model_config = ConfigDict(extra="forbid")
        features: Literal["token", "sentence"] = Field("token", description="Feature space to search in.")
        k: int = Field(64, ge=1, description="Neighbours per token, before they are made symmetric.")
        search: Literal["exact", "hnsw"] = Field("exact", description="Every token against every other, or a graph.")
        links: int = Field(32, ge=4, description="Links per token of the graph.")
        effort: int = Field(128, ge=1, description="Candidates that the graph is built and searched with.")

    def __init__(self, options: Options) -> None:
        self.options = options

    def build(self, vocabulary: Vocabulary, say: Callable[[str], None]) -> Neighbours:
        """Neighbours [V, K] with costs 1 - cosine; the ceiling is the mean cost over pairs of tokens.

        With `hnsw` the part of the true neighbours that the graph finds is measured on a sample: `recall`.
        """
        sentence = self.options.features == "sentence"
        dense = SentenceCost(SentenceCost.Options()) if sentence else TokenCost(TokenCost.Options())
        features = unit(dense.build(vocabulary, say), vocabulary.meaningless)
        meaningful = (~vocabulary.meaningless).nonzero().squeeze(1)
        vectors = features[meaningful].contiguous().numpy()
        index = self._index(vectors, vocabulary.device)
        k = min(self.options.k + 1, len(meaningful))
        indices = torch.full((vocabulary.size, k), -1)
        costs = torch.zeros(vocabulary.size, k)
        for start in range(0, len(meaningful), BATCH):
            rows = meaningful[start : start + BATCH]
            part = vocabulary.kept(f"neighbours-{start}", partial(_search, index, vectors[start : start + BATCH], k))
            found = part["found"]
            indices[rows] = torch.where(found < 0, -1, meaningful[found])  # a graph may find fewer
            costs[rows] = (1 - part["similarity"]).clamp(0, 2)
            say(f"faiss cost: {start + len(rows):,} of {len(meaningful):,} tokens searched")
        mean = features[meaningful].double().mean(0)
        measured = {} if self.options.search == "exact" else {"recall": recall(index, vectors, k)}
        return Neighbours(indices, costs, ceiling=float(1 - mean @ mean), measured=measured)

    def _index(self, vectors: np.ndarray, device: torch.device) -> Any:
        import faiss

        size = vectors.shape[1]
        index: Any
        if self.options.search == "exact":
            index = faiss.IndexFlatIP(size)
            if device.type == "cuda" and hasattr(faiss, "StandardGpuResources"):
                index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index or 0, index)
        else:
            index = faiss.IndexHNSWFlat(size, self.options.links, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = self.options.effort
            index.hnsw.efSearch = max(self.options.effort, self.options.k + 1)
        index.add(vectors)
        return index


def _search(index: Any, vectors: np.ndarray, k: int) -> dict[str, torch.Tensor]:
    similarity, found = index.search(vectors, k)
    return {"similarity": torch.from_numpy(similarity), "found": torch.from_numpy(found)}


def recall(index: Any, vectors: np.ndarray, k: int) -> float:
    """The part of the k nearest vectors that an index finds, over a sample of them: recall@k."""
    import faiss

    exact = faiss.IndexFlatIP(vectors.shape[1])
    exact.add(vectors)
    asked = vectors[np.random.default_rng(0).permutation(len(vectors))[:SAMPLE]]
    true, found = (each.search(asked, k)[1] for each in (exact, index))
    return float(np.mean([len({*a} & {*b}) / k for a, b in zip(true.tolist(), found.tolist(), strict=True)]))
