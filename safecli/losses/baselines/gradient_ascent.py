"""Gradient ascent: minus the cross-entropy. With a general loss beside it, gradient difference (Liu et al., 2022)."""

from torch import Tensor

from safecli.losses import Head, linear_cross_entropy
from safecli.losses.baselines.answers import Answers


def gradient_ascent(hidden: Tensor, weight: Tensor | Head, answers: Answers) -> Tensor:
    """log p_x; no lower bound. Jang et al., Knowledge Unlearning, ACL 2023; Liu et al., Continual Learning, 2022."""
    return -answers.mean(linear_cross_entropy(hidden, weight, answers.ids, reduction="none"))
