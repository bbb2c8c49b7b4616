"""Draw the two plots of docs/loss.md: `python examples/loss_plots.py docs`. Needs matplotlib and POT."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import ot
import torch
from matplotlib import rcParams
from matplotlib.figure import Figure

from safecli.losses import DenseCost, emd, linear_cross_entropy, linear_emd

VOCAB, K, TARGET = 64, 16, 3
rcParams["svg.fonttype"] = "none"
rcParams["svg.hashsalt"] = "safecli"


def features(rng: np.random.Generator) -> torch.Tensor:
    """Random unit features [VOCAB, K] in float64."""
    return torch.nn.functional.normalize(torch.tensor(rng.normal(size=(VOCAB, K))), dim=-1)


def saturation(folder: Path) -> None:
    """How the gradient with respect to the logits shrinks as the model grows sure of the unsafe token."""
    cost, x, identity = DenseCost(features(np.random.default_rng(0))), torch.tensor([TARGET]), torch.eye(VOCAB).double()
    left, norms = [], {"unlikelihood": [], "exact EMD": [], "centroid": []}
    for gap in np.linspace(0, 22, 45):
        logits = (torch.nn.functional.one_hot(x, VOCAB).double() * gap).requires_grad_()
        cross = linear_cross_entropy(logits, identity, x)
        losses = {
            "unlikelihood": -torch.log(-torch.expm1(-cross)),
            "exact EMD": linear_emd(logits, identity, x, cost),
            "centroid": linear_emd(logits, identity, x, cost, bound="centroid"),
        }
        left.append(float(-torch.expm1(-cross.detach())))
        for name, loss in losses.items():
            norms[name].append(float(torch.autograd.grad(loss, logits, retain_graph=True)[0].norm()))
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, values in norms.items():
        axes.loglog(left, values, label=name)
    axes.set(xlabel="1 - p of the unsafe token", ylabel="norm of the gradient (logits)", xlim=(1, 1e-8))
    axes.legend()
    figure.savefig(folder / "saturation.svg")


def tightness(folder: Path) -> None:
    """Every bound over the exact distance, for soft targets of four tokens, by the entropy of p."""
    rng = np.random.default_rng(0)
    entropies, ratios = [], {name: [] for name in ("upper", "covariance", "relaxed", "centroid")}
    for temperature in np.geomspace(0.08, 20, 100):
        given = features(rng)
        cost = (1 - given @ given.T).clamp(min=0)
        p = torch.softmax(torch.tensor(rng.normal(size=VOCAB)) / temperature, 0)[None]
        q = torch.zeros_like(p)
        q[0, rng.choice(VOCAB, 4, replace=False)] = torch.tensor(rng.dirichlet(np.ones(4)))
        exact = ot.emd2(p[0].numpy(), q[0].numpy(), cost.numpy())
        entropies.append(float(torch.special.entr(p).sum()))
        for name, values in ratios.items():
            over = given if name in ("covariance", "centroid") else cost
            values.append(float(getattr(emd, name)(p, q, over)) / exact)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, values in ratios.items():
        axes.scatter(entropies, values, s=7, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="entropy of p, nats", ylabel="bound over EMD", ylim=(0, 1.6))
    axes.legend()
    figure.savefig(folder / "bounds.svg")


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    saturation(target)
    tightness(target)
