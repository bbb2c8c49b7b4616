"""The losses to compare with, against their papers' formulas in plain PyTorch, and EMO's against its own package."""

from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from safecli.config import TrainOptions
from safecli.costs import DenseCost
from safecli.losses import Reference
from safecli.losses.baselines import BASELINES, Answers

T, V, D = 9, 30, 5
IDS, OWNER = torch.arange(T) * 3 % V, torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.tensor(np.random.default_rng([seed, *shape]).normal(size=shape))


COST = DenseCost(normalize(_normal(V, 4), dim=-1))
REFERENCE = _normal(T, D, seed=2)
WEIGHT = _normal(V, D)


def _mean(values: Tensor) -> Tensor:
    return torch.stack([values[owner == OWNER].mean() for owner in range(3)]).mean()


def _sum(values: Tensor) -> Tensor:
    return torch.stack([values[owner == OWNER].sum() for owner in range(3)])


def _formulas(hidden: Tensor) -> dict[str, Tensor]:
    log_p, log_ref = ((states @ WEIGHT.T).log_softmax(-1) for states in (hidden, REFERENCE))
    p = log_p.exp()
    at, at_ref = (each.gather(1, IDS[:, None])[:, 0] for each in (log_p, log_ref))
    ratio = _sum(at - at_ref)
    emd = (p * COST.rows(IDS)).sum(-1)
    unlikely = -(1 - at.exp()).log()
    return {
        "unlikelihood": _mean(unlikely),
        "anchored-unlikelihood": _mean((p * (log_p - log_ref)).sum(-1) + 2 * unlikely),
        "gradient-ascent": _mean(at),
        "npo": (2 / 0.1 * (1 + (0.1 * ratio).exp()).log()).mean(),
        "simnpo": (-2 / 2.5 * logsigmoid(-2.5 * _sum(at) / torch.tensor([4, 2, 3]))).mean(),
        "safe-unlearning": -logsigmoid(-0.1 * ratio).mean(),
        "emo": -_mean(((-at / emd).detach().clamp(max=3) * emd - at) / 2),
        "emo-by-distance": -_mean((emd / -at).detach() * -at + emd),
    }


@pytest.mark.parametrize("name", BASELINES)
def test_value_and_gradient_are_those_of_the_paper(name: str) -> None:
    hidden = _normal(T, D, seed=3).requires_grad_()
    answers = Answers(IDS, OWNER, Reference(REFERENCE), COST, strength=2.0)
    found, expected = BASELINES[name](hidden, WEIGHT, answers), _formulas(hidden)[name]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, hidden), torch.autograd.grad(expected, hidden))


@pytest.mark.parametrize("name", [name for name in BASELINES if "unlikelihood" in name or "emo" in name])
def test_a_model_that_is_sure_has_a_finite_gradient(name: str) -> None:
    hidden = (torch.nn.functional.one_hot(IDS, V) * 60.0).requires_grad_()
    cost = COST.to(torch.device("cpu"))
    answers = Answers(IDS, OWNER, Reference(torch.zeros(T, V)), cost, strength=2.0)
    loss = BASELINES[name](hidden, torch.eye(V), answers)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_unlikelihood_still_pushes_where_the_model_is_sure() -> None:
    hidden = (torch.nn.functional.one_hot(IDS, V) * 40.0).requires_grad_()
    answers = Answers(IDS, OWNER, Reference(torch.zeros(T, V)), COST)
    (gradient,) = torch.autograd.grad(BASELINES["unlikelihood"](hidden, torch.eye(V), answers), hidden)
    assert float(gradient.norm()) > 0.1


def test_the_option_names_every_loss() -> None:
    assert get_args(TrainOptions.model_fields["loss"].annotation) == ("emd", *BASELINES)
