"""Semantic token costs: the two kinds, and what a backend is.

A cost says how far apart tokens are in meaning, C_ij in [0, 2] with C_ii = 0. Dense costs are unit features,
C_ij = 1 - f_i . f_j; sparse costs are symmetric nearest neighbours with one ceiling for every other pair.

Tokens that carry no meaning of their own (special tokens, ids that no text produces, bytes that are no character)
are kept out on purpose: a backend is told which they are, and they are put at the mean direction of the
vocabulary in a dense cost, and at the ceiling from everything in a sparse one, so that pushing probability
towards them is worth no more than pushing it to an average token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from safecli.artifacts import atomic


@dataclass(frozen=True)
class DenseCost:
    """C_ij = 1 - f_i . f_j with unit features, `features` [V, k]."""

    features: Tensor

    @property
    def vocab(self) -> int:
        """V, the number of tokens."""
        return self.features.shape[0]

    def rows(self, ids: Tensor, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
        """scale * C[ids, :], [n, V], for `ids` [n], into `out` where given; a token is at 0 from itself exactly."""
        features = self.features
        rows = torch.addmm(features.new_full((1, 1), scale), features[ids], features.T, alpha=-scale, out=out)
        return rows.scatter_(1, ids[:, None], 0)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> DenseCost:
        """The same cost on a device."""
        return DenseCost(self.features.to(device, dtype))


@dataclass(frozen=True)
class SparseCost:
    """Neighbours in CSR form (`starts` [V + 1], `neighbours` [nnz], `costs` [nnz]) and the `ceiling` for the rest.

    Symmetric, and every token is its own neighbour at cost 0.
    """

    starts: Tensor
    neighbours: Tensor
    costs: Tensor
    ceiling: float

    @property
    def vocab(self) -> int:
        """V, the number of tokens."""
        return self.starts.shape[0] - 1

    def rows(self, ids: Tensor, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
        """scale * C[ids, :], [n, V], for `ids` [n], into `out` where given."""
        rows = self.costs.new_empty(len(ids), self.vocab) if out is None else out
        rows.fill_(scale * self.ceiling)
        first = self.starts[ids]
        counts = self.starts[ids + 1] - first
        owner = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), counts)
        offset = torch.arange(len(owner), device=ids.device) - (counts.cumsum(0) - counts)[owner]
        entry = first[owner] + offset
        rows[owner, self.neighbours[entry]] = (scale * self.costs[entry]).to(rows.dtype)
        return rows

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> SparseCost:
        """The same cost on a device."""
        return SparseCost(
            self.starts.to(device), self.neighbours.to(device), self.costs.to(device, dtype), self.ceiling
        )


Cost = DenseCost | SparseCost


@dataclass(frozen=True)
class Neighbours:
    """What a sparse backend returns: `indices` [V, K], `costs` [V, K], and one `ceiling` for all other pairs.

    An index of -1 is none. What was `measured` on the way is kept in the artefact.
    """

    indices: Tensor
    costs: Tensor
    ceiling: float
    measured: dict[str, float] = field(default_factory=dict)

    def symmetric(self) -> SparseCost:
        """Keep a pair when either side names it (the smaller cost if both do), as CSR with a zero diagonal."""
        from scipy.sparse import coo_array, diags_array

        vocab, k = self.indices.shape
        row = np.repeat(np.arange(vocab), k)
        column = self.indices.reshape(-1).numpy()
        gain = self.ceiling - self.costs.reshape(-1).double().numpy()
        keep = ((column >= 0) & (column != row) & (gain > 0)).nonzero()[0]
        keep = keep[np.argsort(-gain[keep], kind="stable")]
        _, first = np.unique(row[keep] * vocab + column[keep], return_index=True)  # coo_array adds up what comes twice
        keep = keep[first]
        one_way = coo_array((gain[keep], (row[keep], column[keep])), shape=(vocab, vocab)).tocsr()
        both = (one_way.maximum(one_way.T) + diags_array(np.full(vocab, self.ceiling))).tocsr()
        both.sort_indices()
        return SparseCost(
            torch.from_numpy(both.indptr.astype(np.int64)),
            torch.from_numpy(both.indices.astype(np.int64)),
            torch.from_numpy((self.ceiling - both.data).clip(0).astype(np.float32)),
            self.ceiling,
        )


@dataclass(frozen=True)
class Vocabulary:
    """What a backend is given: the tokenizer, the model's token embeddings [V, d], the device, the odd tokens.

    `output_embeddings` is the weight of the output head, the same tensor where both are tied; `unfinished` the folder
    for the parts of a build that are done.
    """

    tokenizer: Any
    embeddings: Tensor
    device: torch.device
    output_embeddings: Tensor
    unfinished: Path | None = None

    def kept(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` gives, written down until the build is done, so that one that was killed goes on from there."""
        if self.unfinished is None:
            return make()
        path = self.unfinished / f"{name}.safetensors"
        if not path.exists():
            with atomic(path) as beside:
                save_file({key: value.contiguous() for key, value in make().items()}, beside)
        return load_file(path)

    def embedded(
        self,
        read: Callable[[list[str]], Any],
        say: Callable[[str], None],
        clean: Callable[[str], str] = str.strip,
        at_once: int = 4096,
    ) -> Tensor:
        """Features [V, k] by what `read` makes of a list of texts [n, k], a tensor or an array: the tokens', cleaned.

        Each text is read once, the shortest first, `at_once` at a time, and kept; a blank is a row of 0.
        """
        texts = [clean(text) for text in self.texts]
        distinct = sorted({*texts} - {""}, key=lambda text: (len(text), text))

        def read_part(part: list[str]) -> dict[str, Tensor]:
            return {"read": torch.as_tensor(read(part)).float().cpu()}

        parts = []
        for start in range(0, len(distinct), at_once):
            part = distinct[start : start + at_once]
            parts.append(self.kept(f"texts-{start}", partial(read_part, part))["read"])
            say(f"{start + len(part):,} of {len(distinct):,} texts embedded")
        nothing = torch.zeros(1, parts[0].shape[1])
        place = {text: index for index, text in enumerate([*distinct, ""])}
        return torch.cat([*parts, nothing])[torch.tensor([place[text] for text in texts])]

    @property
    def size(self) -> int:
        """V, as the model's embeddings have it; a tokenizer may know fewer."""
        return self.embeddings.shape[0]

    @cached_property
    def texts(self) -> list[str]:
        """Text of every token id; '' for tokens without meaning of their own."""
        known = len(self.tokenizer)
        special = set(self.tokenizer.all_special_ids) | {
            index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        texts = self.tokenizer.batch_decode([[index] for index in range(min(known, self.size))])
        texts += [""] * (self.size - len(texts))
        return ["" if i in special or "\ufffd" in text else text for i, text in enumerate(texts)]

    @cached_property
    def meaningless(self) -> Tensor:
        """True at special tokens, unused ids, and bytes that are no character by themselves, [V] bool."""
        return torch.tensor([not text for text in self.texts])


def unit(features: Tensor, meaningless: Tensor) -> Tensor:
    """Normalise rows to length 1; tokens without meaning and rows of zeros get the mean direction of the others."""
    features = torch.nn.functional.normalize(features.float(), dim=-1)
    lost = meaningless | ~features.any(-1)
    features[lost] = torch.nn.functional.normalize(features[~lost].mean(0), dim=0)
    return features


def anisotropy(features: Tensor) -> float:
    """Mean cosine over all pairs of different rows of unit features [n, k]; 0 where directions are spread evenly."""
    n = len(features)
    total = features.double().sum(0)
    return float((total @ total - n) / (n * (n - 1)))


def hubness(features: Tensor, k: int = 10, sample: int = 4096) -> float:
    """Skewness of how often a token is among the k nearest of another, in a sample of unit features [n, k].

    0 where none is favoured; hubs make it large (Radovanović et al., Hubs in Space, JMLR 2010).
    """
    chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:sample]
    few = features[chosen.to(features.device)].float()
    similarity = (few @ few.T).fill_diagonal_(-torch.inf)
    nearest = similarity.topk(min(k, len(few) - 1), dim=1).indices
    counts = torch.bincount(nearest.flatten(), minlength=len(few)).double()
    spread = counts - counts.mean()
    deviation = spread.square().mean().sqrt()
    return float(spread.pow(3).mean() / deviation**3) if deviation > 0 else 0.0


class CostBackend(Protocol):
    """A cost plugin (entry-point group `safecli.costs`): a class with a Pydantic `Options` and one method."""

    Options: ClassVar[type[BaseModel]]

    def __init__(self, options: BaseModel) -> None: ...

    def build(self, vocabulary: Vocabulary, say: Callable[[str], None]) -> Tensor | Neighbours | SparseCost:
        """Features [V, k], or nearest neighbours, symmetric already or not; `say` reports progress."""
        ...
