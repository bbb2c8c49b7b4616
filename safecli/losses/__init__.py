"""The Earth Mover Distance losses: plain float64 reference in `emd`, the chunked operator in `fused`."""

from safecli.costs import Cost, DenseCost, SparseCost
from safecli.losses.fused import Anchor, linear_cross_entropy, linear_emd, linear_kl, linear_losses
from safecli.losses.problem import Head, Reference, Target, onehot

__all__ = [
    "Anchor",
    "Cost",
    "DenseCost",
    "Head",
    "Reference",
    "SparseCost",
    "Target",
    "linear_cross_entropy",
    "linear_emd",
    "linear_kl",
    "linear_losses",
    "onehot",
]
