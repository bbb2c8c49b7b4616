"""Semantic token costs: the two kinds, what a backend is, and how a cost is built, kept and looked up.

A cost says how far apart tokens are in meaning, C_ij in [0, 2] with C_ii = 0. Dense costs are unit features,
C_ij = 1 - f_i . f_j; sparse costs are symmetric nearest neighbours with one ceiling for every other pair.

Tokens that carry no meaning of their own (special tokens, ids that no text produces, bytes that are no character)
are kept out on purpose: a backend is told which they are, and they are put at the mean direction of the
vocabulary in a dense cost, and at the ceiling from everything in a sparse one, so that pushing probability
towards them is worth no more than pushing it to an average token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safecli.artifacts import atomic, fingerprint, locked, manifest, read_manifest, write_json
from safecli.config import CostOptions, build, cache_dir
from safecli.errors import InputError
from safecli.models import LanguageModel
from safecli.registry import COSTS, key_values, load_plugin

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DenseCost:
    """C_ij = 1 - f_i . f_j with unit features, `features` [V, k]."""

    features: Tensor

    @property
    def vocab(self) -> int:
        """V, the number of tokens."""
        return self.features.shape[0]

    def rows(self, ids: Tensor) -> Tensor:
        """C[ids, :], [n, V], for `ids` [n]."""
        return 1 - self.features[ids] @ self.features.T

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

    def rows(self, ids: Tensor) -> Tensor:
        """C[ids, :], [n, V], for `ids` [n]."""
        rows = torch.full((len(ids), self.vocab), self.ceiling, dtype=self.costs.dtype, device=self.costs.device)
        first = self.starts[ids]
        counts = self.starts[ids + 1] - first
        owner = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), counts)
        offset = torch.arange(len(owner), device=ids.device) - (counts.cumsum(0) - counts)[owner]
        entry = first[owner] + offset
        rows[owner, self.neighbours[entry]] = self.costs[entry]
        return rows

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> SparseCost:
        """The same cost on a device."""
        return SparseCost(
            self.starts.to(device), self.neighbours.to(device), self.costs.to(device, dtype), self.ceiling
        )


Cost = DenseCost | SparseCost


@dataclass(frozen=True)
class Neighbours:
    """What a sparse backend returns: `indices` [V, K], `costs` [V, K], and one `ceiling` for all other pairs."""

    indices: Tensor
    costs: Tensor
    ceiling: float

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
    """What a backend is given: the tokenizer, the model's token embeddings [V, d], the device, the odd tokens."""

    tokenizer: Any
    embeddings: Tensor
    device: torch.device

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


class CostBackend(Protocol):
    """A cost plugin (entry-point group `safecli.costs`): a class with a Pydantic `Options` and one method."""

    Options: ClassVar[type[BaseModel]]

    def __init__(self, options: BaseModel) -> None: ...

    def build(self, vocabulary: Vocabulary, say: Callable[[str], None]) -> Tensor | Neighbours:
        """Dense unit features [V, k] float32, or nearest neighbours; `say` reports progress."""
        ...


def load_backend(options: CostOptions) -> tuple[type[CostBackend], BaseModel]:
    """The backend's class and its options; `UsageError` for a name or an option that there isn't."""
    backend_class = load_plugin(COSTS, options.cost)
    return backend_class, build(
        backend_class.Options, key_values(options.cost_opt, "--cost-opt"), f"cost '{options.cost}'"
    )


def load_cost(
    options: CostOptions, language_model: LanguageModel, say: Callable[[str], None] = logger.info
) -> tuple[Cost, Path]:
    """The cost that the options name, built when it isn't in the cache, and the folder that holds it."""
    backend_class, chosen = load_backend(options)
    embeddings = language_model.model.get_input_embeddings().weight.detach()
    vocabulary = Vocabulary(language_model.tokenizer, embeddings.float().cpu(), language_model.device)
    identity = {
        "backend": options.cost,
        "options": chosen.model_dump(mode="json"),
        "vocabulary": vocabulary_fingerprint(vocabulary),
        "embeddings": fingerprint(embeddings.shape, embeddings.flatten()[::997].float().tolist()),
    }
    folder = cache_dir() / "costs" / f"{options.cost}-{fingerprint(identity)}"
    with locked(folder / ".lock", wait=True):
        if not (folder / "manifest.json").exists():
            say(f"building cost '{options.cost}' for {vocabulary.size:,} tokens")
            _save(folder, backend_class(chosen).build(vocabulary, say), vocabulary, identity)
    return read_cost(folder, vocabulary), folder


def vocabulary_fingerprint(vocabulary: Vocabulary) -> str:
    """Identify a vocabulary by its token texts and size."""
    return fingerprint(vocabulary.size, sorted(vocabulary.tokenizer.get_vocab().items(), key=lambda item: item[1]))


def _save(folder: Path, built: Tensor | Neighbours, vocabulary: Vocabulary, identity: dict[str, Any]) -> None:
    if isinstance(built, Neighbours):
        sparse = built.symmetric()
        tensors = {"starts": sparse.starts, "neighbours": sparse.neighbours, "costs": sparse.costs}
        result: dict[str, Any] = {"kind": "sparse", "ceiling": sparse.ceiling, "entries": len(sparse.costs)}
    else:
        tensors = {"features": unit(built, vocabulary.meaningless).contiguous()}
        result = {"kind": "dense", "k": built.shape[1]}
    with atomic(folder / "cost.safetensors") as beside:
        save_file(tensors, beside)
    result |= {"V": vocabulary.size, "meaningless": int(vocabulary.meaningless.sum())}
    write_json(folder / "manifest.json", manifest("cost", identity, result))


def read_cost(folder: Path, vocabulary: Vocabulary) -> Cost:
    """Read a cost artefact, refusing one that was built for another vocabulary."""
    content = read_manifest(folder / "manifest.json", "cost")
    made_for, here = content["identity"]["vocabulary"], vocabulary_fingerprint(vocabulary)
    if made_for != here:
        raise InputError(
            f"the cost {folder} was built for another vocabulary ({made_for}) than this model's ({here}): "
            "build it again with `safecli cost`"
        )
    try:
        with safe_open(folder / "cost.safetensors", "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, FileNotFoundError) as error:
        raise InputError(f"the cost {folder} is broken ({error}): delete the folder, and it is built again") from error
    if content["result"]["kind"] == "dense":
        return DenseCost(tensors["features"])
    return SparseCost(tensors["starts"], tensors["neighbours"], tensors["costs"], content["result"]["ceiling"])
