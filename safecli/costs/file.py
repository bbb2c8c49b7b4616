"""Cost from a file of tensors, safetensors or numpy's, and back into one: what `cost export` and `import` move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safecli.artifacts import atomic
from safecli.costs import Cost, DenseCost, Neighbours, SparseCost, Vocabulary
from safecli.costs.build import vocabulary_fingerprint
from safecli.errors import InputError, UsageError

VOCABULARY = "vocabulary"
"""Under this name a file says which vocabulary it is for; one that doesn't is taken by its size."""


class FileCost:
    """The cost that a file holds, one row for each token.

    Either `features` [V, k]; or `indices` [V, K] (-1 is none), `costs` [V, K] and one `ceiling`; or, symmetric and in
    CSR form, `starts` [V + 1], `neighbours` [nnz], `costs` [nnz] and the `ceiling`. A `.npy` holds features.
    """

    class Options(BaseModel):
        """Options of the backend."""

        model_config = ConfigDict(extra="forbid")
        path: Path = Field(description="File that holds it: .safetensors, .npz or .npy.")

    forms: ClassVar = (("features",), ("indices", "costs", "ceiling"), ("starts", "neighbours", "costs", "ceiling"))

    def __init__(self, options: Options) -> None:
        self.options = options

    def build(self, vocabulary: Vocabulary, say: Callable[[str], None]) -> Tensor | Neighbours | SparseCost:
        """What the file holds; `InputError` where it is for another vocabulary or can't be a cost."""
        path = self.options.path
        tensors, made_for = read_tensors(path)
        form = next((form for form in self.forms if set(form) == set(tensors)), None)
        if form is None:
            known = "; or ".join(", ".join(form) for form in self.forms)
            raise InputError(f"{path} holds {', '.join(sorted(tensors)) or 'nothing'}: a cost is {known}")
        here = vocabulary_fingerprint(vocabulary)
        if made_for not in ("", here):
            raise InputError(f"{path} is for another vocabulary ({made_for}) than this model's ({here})")
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise InputError(f"{path}: {name} holds NaN or infinity")
        rows = len(tensors[form[0]]) - (form[0] == "starts")
        if rows != vocabulary.size:
            raise InputError(f"{path}: {form[0]} are of {rows:,} tokens, and this model has {vocabulary.size:,}")
        say(f"file cost: {path}")
        if form[0] == "features":
            return tensors["features"].float()
        ceiling = float(tensors["ceiling"])
        if form[0] == "indices":
            return Neighbours(tensors["indices"].long(), tensors["costs"].float(), ceiling)
        sparse = SparseCost(tensors["starts"].long(), tensors["neighbours"].long(), tensors["costs"].float(), ceiling)
        fault = fault_of(sparse)
        if fault:
            raise InputError(f"{path}: {fault}")
        return sparse


def fault_of(cost: SparseCost) -> str:
    """What keeps tensors in CSR form from being a cost, or ''."""
    from scipy.sparse import csr_array

    starts, vocab = cost.starts, cost.vocab
    if int(starts[0]) or int(starts[-1]) != len(cost.costs) or len(cost.neighbours) != len(cost.costs):
        return "starts, neighbours and costs don't belong together"
    if bool((starts.diff() < 0).any()) or not bool(((cost.neighbours >= 0) & (cost.neighbours < vocab)).all()):
        return "starts fall, or a neighbour is no token"
    if not 0 < cost.ceiling <= 2 or not bool(((cost.costs >= 0) & (cost.costs <= cost.ceiling)).all()):
        return "costs are not between 0 and the ceiling, or the ceiling is not in (0, 2]"
    gain = (cost.ceiling - cost.costs.double()).numpy()
    matrix = csr_array((gain, cost.neighbours.numpy(), starts.numpy()), shape=(vocab, vocab))
    if abs(matrix.diagonal() - cost.ceiling).max() > 1e-6:
        return "a token is not at 0 from itself"
    return "costs are not symmetric" if abs(matrix - matrix.T).max() > 1e-6 else ""


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file, and the vocabulary that it says it is for, or ''; numpy's are read without pickle."""
    try:
        if path.suffix == ".npy":
            return {"features": torch.from_numpy(np.load(path, allow_pickle=False))}, ""
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as stored:
                made_for = str(stored[VOCABULARY]) if VOCABULARY in stored else ""
                return {name: torch.from_numpy(stored[name]) for name in stored.files if name != VOCABULARY}, made_for
        with safe_open(path, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            return tensors, (stored.metadata() or {}).get(VOCABULARY, "")
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise InputError(f"{path} can't be read as a cost: {error}") from error


def check_ending(path: Path) -> None:
    """`UsageError` unless a cost can be written to a file of this ending."""
    if path.suffix not in (".safetensors", ".npz"):
        raise UsageError(f"{path}: a cost is written to .safetensors or .npz")


def write_tensors(cost: Cost, vocabulary: Vocabulary, path: Path) -> None:
    """Write a cost to a `.safetensors` or `.npz` file, whole or not at all; `UsageError` for another ending."""
    check_ending(path)
    made_for = vocabulary_fingerprint(vocabulary)
    tensors: dict[str, Any] = {name: value for name, value in vars(cost).items() if isinstance(value, Tensor)}
    if not isinstance(cost, DenseCost):
        tensors["ceiling"] = torch.tensor(cost.ceiling, dtype=torch.float64)
    with atomic(path) as beside:
        if path.suffix == ".safetensors":
            save_file(tensors, beside, metadata={VOCABULARY: made_for})
        else:
            with beside.open("wb") as stream:
                arrays = {name: value.numpy() for name, value in tensors.items()}
                np.savez(stream, allow_pickle=False, **arrays, vocabulary=np.array(made_for))
