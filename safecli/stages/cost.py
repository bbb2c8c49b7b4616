"""Build a semantic token cost and look at it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from safecli.artifacts import read_manifest
from safecli.config import CostOptions
from safecli.costs import DenseCost
from safecli.costs.build import load_backend, load_cost
from safecli.errors import UsageError
from safecli.models import LanguageModel, load_model
from safecli.stages import Reporter, inherit_model


@dataclass(frozen=True)
class Built:
    """A cost artefact: its folder, kind, vocabulary size, and what its tensors take, in MiB.

    Of features the mean cosine over pairs of tokens, and how much a few tokens are everybody's nearest (skewness).
    """

    path: Path
    kind: str
    vocab: int
    mebibytes: float
    anisotropy: float | None
    hubness: float | None


@dataclass(frozen=True)
class Neighbourhood:
    """The nearest and the farthest tokens of one token, with their costs."""

    token: str
    nearest: list[tuple[str, float]]
    farthest: list[tuple[str, float]]


def build_cost(options: CostOptions, report: Reporter | None = None) -> Built:
    """Build the cost that the options name, or find it in the cache."""
    report = report or Reporter()
    load_backend(options)
    options = inherit_model(options, report)
    cost, folder = load_cost(options, load_model(options), report.say)
    size = (folder / "cost.safetensors").stat().st_size / 2**20
    made = read_manifest(folder / "manifest.json", "cost")["result"]
    looked = (made.get("anisotropy"), made.get("hubness"))
    return Built(folder, "dense" if isinstance(cost, DenseCost) else "sparse", cost.vocab, round(size, 1), *looked)


def show_cost(options: CostOptions, token: str, count: int, report: Reporter | None = None) -> Neighbourhood:
    """The `count` nearest and farthest tokens of `token`; `UsageError` if it is not one token."""
    report = report or Reporter()
    load_backend(options)
    options = inherit_model(options, report)
    model = load_model(options)
    cost, _ = load_cost(options, model, report.say)
    row = cost.rows(torch.tensor([token_id(model, token)]))[0]
    order = row.argsort(stable=True).tolist()

    def named(indices: list[int]) -> list[tuple[str, float]]:
        return [(model.tokenizer.decode([index]), round(float(row[index]), 4)) for index in indices]

    return Neighbourhood(token, named(order[:count]), named(order[::-1][:count]))


def token_id(model: LanguageModel, token: str) -> int:
    """The id of a text that is one token."""
    ids = model.answer_ids(token)
    if len(ids) != 1:
        parts = ", ".join(repr(model.tokenizer.decode([index])) for index in ids)
        raise UsageError(f"{token!r} is {len(ids)} tokens of this model ({parts}): try it with a leading space")
    return ids[0]
