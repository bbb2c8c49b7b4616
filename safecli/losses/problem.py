"""What the operator is asked: targets, heads, references, and the bounds that go with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from safecli.costs import Cost, DenseCost
from safecli.errors import UsageError

Bound = Literal["exact", "centroid", "covariance", "relaxed", "upper"]
Term = Literal["cross_entropy", "kl", "reverse_kl", "emd", "interval"]


@dataclass(frozen=True)
class Target:
    """Distributions over the vocabulary with few tokens each: `ids` and `weights` [T, m].

    Weights are >= 0 and sum to 1 over m; a weight of 0 pads.
    """

    ids: Tensor
    weights: Tensor

    @property
    def is_onehot(self) -> bool:
        """Whether every target is one token."""
        return self.ids.shape[1] == 1


def onehot(ids: Tensor) -> Target:
    """One-hot targets from token ids [T]."""
    return Target(ids[:, None], torch.ones(len(ids), 1, device=ids.device))


@dataclass(frozen=True)
class Head:
    """An output head: logits = soft_cap * tanh(z / soft_cap) with z = scale * (hidden W' + bias), `weight` W [V, d].

    Gemma has a soft cap; Cohere multiplies by a scale, Granite divides by one.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None


@dataclass(frozen=True)
class Reference:
    """The model to stay near: its last `hidden` [T, d], and its own frozen `head` where the head here trains."""

    hidden: Tensor
    head: Head | None = None


@dataclass
class Losses:
    """What to compute; `values` holds each term at each position, [T], once the forward pass has been."""

    terms: dict[Term, float]
    target: Target | None
    cost: Cost | None
    bound: Bound | None
    reference: Reference | None
    chunk_tokens: int | None
    compiled: bool
    values: dict[Term, Tensor] = field(default_factory=dict)


def best_bound(target: Target, cost: Cost) -> Bound:
    """The tightest bound that target and cost allow."""
    if target.is_onehot:
        return "exact"
    return "covariance" if isinstance(cost, DenseCost) else "relaxed"


def check_bound(bound: Bound, target: Target, cost: Cost) -> None:
    """Refuse a bound that target and cost can't give; `UsageError` says which can."""
    if bound == "exact" and not target.is_onehot:
        raise UsageError("bound 'exact' needs one-hot targets: use covariance, centroid, relaxed or upper")
    if bound in ("centroid", "covariance") and not isinstance(cost, DenseCost):
        raise UsageError(f"bound '{bound}' needs a cost with features: use exact, relaxed or upper with this one")
