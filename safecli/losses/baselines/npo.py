"""Preference optimisation with the dispreferred answer alone: NPO, SimNPO, and the term of Safe Unlearning."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from safecli.losses import Head, linear_cross_entropy
from safecli.losses.baselines.answers import Answers


def npo(hidden: Tensor, weight: Tensor | Head, answers: Answers, beta: float = 0.1) -> Tensor:
    """-2/beta log sigmoid(-beta log p(y) / p_ref(y)). Zhang et al., Negative Preference Optimization, 2024, eq. 3."""
    return -2 / beta * logsigmoid(-beta * answers.log_ratio(hidden, weight)).mean()


def simnpo(hidden: Tensor, weight: Tensor | Head, answers: Answers, beta: float = 2.5, gamma: float = 0.0) -> Tensor:
    """-2/beta log sigmoid(-beta/|y| log p(y) - gamma), no reference. Fan et al., Simplicity Prevails, 2024, eq. 4."""
    cross = linear_cross_entropy(hidden, weight, answers.ids, reduction="none")
    per_token = answers.total(cross) / answers.total(cross.detach() * 0 + 1)
    return -2 / beta * logsigmoid(beta * per_token - gamma).mean()


def safe_unlearning(hidden: Tensor, weight: Tensor | Head, answers: Answers, beta: float = 0.1) -> Tensor:
    """-log sigmoid(-beta log p(y) / p_ref(y)), the harmful term alone. Zhang et al., Safe Unlearning, 2407.02855.

    Its other two terms, cross-entropy on safe and on general answers, are those of `safecli train`.
    """
    return -logsigmoid(-beta * answers.log_ratio(hidden, weight)).mean()
