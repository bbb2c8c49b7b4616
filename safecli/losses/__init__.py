"""The Earth Mover Distance losses: plain float64 reference in `emd`, the chunked operator in `fused`."""

from safecli.losses.fused import Anchor, Target, linear_cross_entropy, linear_emd, linear_kl, onehot

__all__ = ["Anchor", "Target", "linear_cross_entropy", "linear_emd", "linear_kl", "onehot"]
