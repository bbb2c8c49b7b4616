"""What every baseline is given: the answers of a batch that are to be left, and sums over each of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safecli.costs import Cost
from safecli.losses import Head, Reference, linear_cross_entropy


@dataclass(frozen=True)
class Answers:
    """Unsafe answers as positions: token `ids` [T], the answer 0..S-1 that each belongs to, `answer` [T].

    `reference` is the base model at the same positions, `strength` weighs what is added to a divergence from it, and
    `cost` is for the losses that use one.
    """

    ids: Tensor
    answer: Tensor
    reference: Reference
    cost: Cost
    strength: float = 1.0

    def total(self, values: Tensor) -> Tensor:
        """Sum over the tokens of every answer, [T] to [S]."""
        count = int(self.answer.max()) + 1 if len(self.answer) else 0
        return values.new_zeros(count).index_add(0, self.answer, values)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over answers of the mean over their tokens, [T] to a scalar: every answer counts the same."""
        return (self.total(values) / self.total(torch.ones_like(values))).mean()

    def log_ratio(self, hidden: Tensor, weight: Tensor | Head) -> Tensor:
        """log p(answer) - log p_ref(answer) of every answer, [S]."""
        frozen = self.reference.head or weight
        with torch.no_grad():
            base = linear_cross_entropy(self.reference.hidden, frozen, self.ids, reduction="none")
        return self.total(base - linear_cross_entropy(hidden, weight, self.ids, reduction="none"))
