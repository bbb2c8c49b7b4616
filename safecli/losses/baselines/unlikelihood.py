"""Unlikelihood, which the TA-SFT paper compares with as NLCL, and the same in the anchored form."""

import torch
from torch import Tensor

from safecli.losses import Head, linear_cross_entropy, linear_losses
from safecli.losses.baselines.answers import Answers


def unlikelihood(hidden: Tensor, weight: Tensor | Head, answers: Answers) -> Tensor:
    """-log(1 - p_x). Welleck et al., Neural Text Generation With Unlikelihood Training, ICLR 2020, eq. 4."""
    return answers.mean(_not(linear_cross_entropy(hidden, weight, answers.ids, reduction="none")))


def anchored_unlikelihood(hidden: Tensor, weight: Tensor | Head, answers: Answers) -> Tensor:
    """KL(p || p_ref) - strength * log(1 - p_x): the anchored term with unlikelihood in place of the EMD (ours).

    What the semantic cost buys is what this loses against `emd`.
    """
    kl, _ = linear_losses(hidden, weight, {"reverse_kl": 1.0}, reference=answers.reference)
    cross = linear_cross_entropy(hidden, weight, answers.ids, reduction="none")
    return answers.mean(kl + answers.strength * _not(cross))


def _not(cross_entropy: Tensor) -> Tensor:
    """-log(1 - p) from -log p."""
    return -torch.log(-torch.expm1(-cross_entropy.clamp(min=torch.finfo(cross_entropy.dtype).tiny)))
