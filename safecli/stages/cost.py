"""Build a semantic token cost and look at it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from safecli.artifacts import read_manifest
from safecli.config import CostOptions
from safecli.costs import Cost, DenseCost
from safecli.costs.build import load_backend, load_cost, vocabulary_of
from safecli.errors import UsageError
from safecli.models import LanguageModel, load_model
from safecli.stages import Reporter, inherit_model

SAMPLE, ROWS, NEAREST = 2048, 128, 10
"""Tokens that two costs are compared on, how many at a time, and how many nearest tokens of each."""


@dataclass(frozen=True)
class Built:
    """A cost artefact: its folder, kind, vocabulary size, and what its tensors take, in MiB.

    Of features the mean cosine over pairs of tokens, and how much a few tokens are everybody's nearest (skewness); of
    an approximate search its recall.
    """

    path: Path
    kind: str
    vocab: int
    mebibytes: float
    anisotropy: float | None
    hubness: float | None
    recall: float | None


@dataclass(frozen=True)
class Neighbourhood:
    """The nearest and the farthest tokens of one token, with their costs."""

    token: str
    nearest: list[tuple[str, float]]
    farthest: list[tuple[str, float]]


@dataclass(frozen=True)
class Differing:
    """A token whose ten nearest tokens are not the same under two costs, and the part that is."""

    token: str
    overlap: float
    first: list[str]
    second: list[str]


@dataclass(frozen=True)
class Compared:
    """How two costs agree: Spearman's correlation over pairs of tokens, and the mean overlap of the ten nearest."""

    rank_correlation: float
    overlap: float
    differing: list[Differing]


def build_cost(options: CostOptions, report: Reporter | None = None) -> Built:
    """Build the cost that the options name, or find it in the cache."""
    report = report or Reporter()
    load_backend(options)
    options = inherit_model(options, report)
    cost, folder = load_cost(options, load_model(options), report.say)
    size = (folder / "cost.safetensors").stat().st_size / 2**20
    made = read_manifest(folder / "manifest.json", "cost")["result"]
    looked = (made.get(name) for name in ("anisotropy", "hubness", "recall"))
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


def compare_costs(
    options: CostOptions, first: str, second: str, count: int, report: Reporter | None = None
) -> Compared:
    """Compare two costs, named as `--cost` takes them, over a sample of tokens; the `count` that differ most."""
    report = report or Reporter()
    options = inherit_model(options, report)
    named = [options.model_copy(update={"cost": name, "cost_opt": []}) for name in (first, second)]
    for each in named:
        load_backend(each)
    model = load_model(options)
    one, other = (load_cost(each, model, report.say)[0] for each in named)
    return compared(model, one, other, count)


def compared(model: LanguageModel, first: Cost, second: Cost, count: int) -> Compared:
    """The comparison of two costs of this model's vocabulary."""
    from scipy.stats import spearmanr

    vocabulary = vocabulary_of(model)
    known = (~vocabulary.meaningless).nonzero()[:, 0]
    make = torch.Generator().manual_seed(0)
    sample = known[torch.randperm(len(known), generator=make)[:SAMPLE]]
    pairs: list[list[float]] = [[], []]
    overlaps: list[tuple[float, int, list[list[int]]]] = []
    for start in range(0, len(sample), ROWS):
        tokens = sample[start : start + ROWS]
        columns = torch.randint(len(known), (len(tokens), NEAREST), generator=make)
        nearest = []
        for side, cost in enumerate((first, second)):
            rows = cost.rows(tokens)[:, known]
            pairs[side] += rows.gather(1, columns).flatten().tolist()
            rows[known[None, :] == tokens[:, None]] = torch.inf
            nearest.append(known[rows.topk(NEAREST, largest=False).indices].tolist())
        for token, one, other in zip(tokens.tolist(), *nearest, strict=True):
            overlaps.append((len({*one} & {*other}) / NEAREST, token, [one, other]))
    overlaps.sort(key=lambda found: found[:2])

    def texts(ids: list[int]) -> list[str]:
        return [vocabulary.texts[index] for index in ids]

    differing = [
        Differing(vocabulary.texts[token], share, texts(one), texts(other))
        for share, token, (one, other) in overlaps[:count]
    ]
    mean = sum(share for share, *_ in overlaps) / len(overlaps)
    return Compared(float(spearmanr(*pairs).statistic), mean, differing)
