"""The bounds of the Earth Mover Distance, as the formulas read. Reference for `fused`; any dtype, meant for float64.

EMD(p, q) = min <T, C> over couplings T of p and q, with C_ij = 1 - f_i . f_j = ||f_i - f_j||^2 / 2 for unit
features f. In what follows p, q are [T, V] distributions, F is [V, k], C is [V, V], mu_p = F' p, mu_q = F' q.
"""

from __future__ import annotations

import torch
from torch import Tensor


def exact_onehot(p: Tensor, x: Tensor, cost: Tensor) -> Tensor:
    """EMD(p, e_x) = sum_i p_i C_ix for one-hot targets `x` [T]: only one coupling exists."""
    return (p * cost[x]).sum(-1)


def upper(p: Tensor, q: Tensor, cost: Tensor) -> Tensor:
    """Upper bound q' C p, the independent coupling; what EMO minimises (Ren et al., ICLR 2024)."""
    return ((q @ cost) * p).sum(-1)


def relaxed(p: Tensor, q: Tensor, cost: Tensor) -> Tensor:
    """Lower bound sum_i p_i min_{j in supp q} C_ij: relaxed word mover's distance (Kusner et al., ICML 2015)."""
    to_support = torch.where(q[:, None, :] > 0, cost[None], torch.inf).amin(-1)
    return (p * to_support).sum(-1)


def centroid(p: Tensor, q: Tensor, features: Tensor) -> Tensor:
    """Lower bound ||mu_p - mu_q||^2 / 2: Jensen's inequality on the squared norm."""
    return ((p - q) @ features).square().sum(-1) / 2


def spread(p: Tensor, features: Tensor) -> Tensor:
    """s_p^2 = 1 - ||mu_p||^2, taken as sum_i p_i ||f_i - mu_p||^2, which doesn't cancel."""
    distance = (features[None] - (p @ features)[:, None]).square().sum(-1)
    return (p * distance).sum(-1)


def covariance(p: Tensor, q: Tensor, features: Tensor) -> Tensor:
    """Lower bound 1 - mu_p . mu_q - s_p s_q: Cauchy-Schwarz on the covariance of the coupling."""
    independent = 1 - ((p @ features) * (q @ features)).sum(-1)
    return independent - spread(p, features).sqrt() * spread(q, features).sqrt()


def anchored_optimum(p_ref: Tensor, x: Tensor, cost: Tensor, strength: float) -> Tensor:
    """argmin_p KL(p || p_ref) - strength * EMD(p, e_x), proportional to p_ref exp(strength C_x)."""
    return torch.softmax(p_ref.log() + strength * cost[x], -1)
