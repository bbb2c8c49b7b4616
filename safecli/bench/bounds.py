"""`safecli bench bounds`: how tight the bounds of the EMD are, and what fewer features cost."""

from __future__ import annotations

import importlib.util
import math
import statistics
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from safecli.config import TrainOptions
from safecli.costs import DenseCost
from safecli.costs.build import load_cost
from safecli.errors import MissingError, UsageError
from safecli.losses import emd, linear_emd
from safecli.models import LanguageModel, last_hidden, load_model
from safecli.records import shipped
from safecli.stages import Reporter
from safecli.stages.batches import output_head

TOKENS = 96
PROBLEMS = 40
SUPPORT = 4
KEPT = (64, 128, 256)


def bounds(cost: str, device: str, report: Reporter) -> dict[str, Any]:
    """Tables `tightness` and `pca` for a cost with features, on the demo model.

    `tightness`: the median of bound over EMD (POT's exact solver), by the entropy of p, for soft targets of four tokens
    among 96 drawn from the vocabulary. `pca`: the error of the exact EMD with k principal directions in place of all,
    over the model's own next-token distributions on the shipped training prompts and random tokens.

    Errors: `MissingError` without POT; `UsageError` for a cost without features.
    """
    options = TrainOptions(model="demo", device=device, cost=cost)
    model = load_model(options)
    found, _ = load_cost(options, model, report.say)
    if not isinstance(found, DenseCost):
        raise UsageError(f"cost '{cost}' has no features: these tables are for costs that have")
    features = found.features.to(model.device)
    return {
        "cost": cost,
        "tightness": _tightness(features.double().cpu(), report),
        "pca": _pca(model, features, report),
    }


def _tightness(features: Tensor, report: Reporter) -> list[dict[str, Any]]:
    if importlib.util.find_spec("ot") is None:
        raise MissingError("the exact distance needs POT: pip install POT")
    import ot

    rng = np.random.default_rng(0)
    rows = []
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        ratios: dict[str, list[float]] = {name: [] for name in ("centroid", "covariance", "relaxed", "upper")}
        for _ in range(PROBLEMS):
            few = features[rng.choice(len(features), TOKENS, replace=False)]
            cost = (1 - few @ few.T).clamp(min=0)
            p, q = _of_entropy(share * math.log(TOKENS), rng)[None], torch.zeros(1, TOKENS, dtype=torch.float64)
            q[0, rng.choice(TOKENS, SUPPORT, replace=False)] = torch.tensor(rng.dirichlet(np.ones(SUPPORT)))
            exact = float(ot.emd2(p[0].numpy(), q[0].numpy(), cost.numpy()))
            for name, values in ratios.items():
                over = few if name in ("centroid", "covariance") else cost
                values.append(float(getattr(emd, name)(p, q, over)) / exact)
        rows.append({"entropy": share * math.log(TOKENS), **{n: statistics.median(v) for n, v in ratios.items()}})
        report.progress("tightness", len(rows), 5)
    return rows


def _of_entropy(nats: float, rng: np.random.Generator) -> Tensor:
    """A random softmax over the tokens with an entropy of so many nats, found by bisection of its temperature."""
    logits, low, high = torch.tensor(rng.normal(size=TOKENS)), 1e-3, 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        p = torch.softmax(logits / middle, 0)
        low, high = (middle, high) if float(torch.special.entr(p).sum()) < nats else (low, middle)
    return p


@torch.inference_mode()
def _pca(model: LanguageModel, features: Tensor, report: Reporter) -> list[dict[str, Any]]:
    hidden = torch.cat([_states(model, prompt.prompt) for prompt in shipped("toxic", "train")])
    ids = torch.randint(len(features), (len(hidden),), generator=torch.Generator().manual_seed(0)).to(hidden.device)
    head = output_head(model)

    def exact(kept: Tensor) -> Tensor:
        return -linear_emd(hidden, head, ids, DenseCost(kept), reduction="none").double()

    whole = exact(features)
    directions = torch.linalg.eigh((features.T @ features).double()).eigenvectors.flip(1).to(features.dtype)
    rows = []
    for k in KEPT:
        error = (exact(functional.normalize(features @ directions[:, :k], dim=-1)) - whole).abs()
        quantiles = torch.quantile(error, torch.tensor([0.5, 0.99, 1.0], dtype=error.dtype, device=error.device))
        median, high, most = quantiles.tolist()
        rows.append({"k": k, "pairs": len(ids), "median": median, "p99": high, "largest": most})
        report.progress("principal directions", len(rows), len(KEPT))
    return rows


def _states(model: LanguageModel, prompt: str) -> Tensor:
    ids = torch.tensor([model.prompt_ids(prompt)], device=model.device)
    return last_hidden(model.model, ids, torch.ones_like(ids))
