"""What `chunks` does between its matrix products, as two functions for `torch.compile`, which makes few passes of them.

The same arithmetic without buffers: for GPUs, where passes over [t, V] weigh as much as the products.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def centred(logits: Tensor, work: torch.dtype) -> tuple[Tensor, Tensor]:
    """p [t, V] in the dtype of the logits, at its likeliest token minus the sum of all others; and that token, [t]."""
    p = torch.softmax(logits.to(work), -1)
    top = logits.argmax(-1)
    is_top = torch.arange(p.shape[1], device=p.device) == top[:, None]
    others = p.masked_fill(is_top, 0)
    return torch.where(is_top, -others.sum(-1, keepdim=True), p).to(logits.dtype), top


def gradient(
    logits: Tensor,
    reference: Tensor | None,
    pushed: Tensor | None,
    ids: Tensor | None,
    q: Tensor | None,
    work: torch.dtype,
    weights: Mapping[str, float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """dL/dz [t, V] in the dtype of the logits, and values [t]: `emd` is the mean of what is pushed, [t, V], under p."""
    log_p = torch.log_softmax(logits.to(work), -1)
    p = log_p.exp()
    values: dict[str, Tensor] = {}
    slope = torch.zeros_like(p)
    if pushed is not None:
        values["emd"] = (p * pushed).sum(-1)
        if weights["emd"]:
            slope = pushed.to(work)
    share = weights.get("cross_entropy", 0.0) + weights.get("kl", 0.0)
    dz = p * share
    if reference is not None:
        log_r = torch.log_softmax(reference.to(work), -1)
        if "reverse_kl" in weights:
            values["reverse_kl"] = (p * (log_p - log_r)).sum(-1)
            slope = slope + weights["reverse_kl"] * (log_p - log_r)
        if "kl" in weights:
            values["kl"] = (log_r.exp() * (log_r - log_p)).sum(-1)
            dz = dz - weights["kl"] * log_r.exp()
    dz = dz + p * (slope - (p * slope).sum(-1, keepdim=True))
    if "cross_entropy" in weights and ids is not None and q is not None:
        values["cross_entropy"] = -(q * log_p.gather(1, ids)).sum(-1)
        dz = dz.scatter_add(1, ids, q * -weights["cross_entropy"])
    is_top = torch.arange(p.shape[1], device=p.device) == logits.argmax(-1, keepdim=True)
    others = dz.masked_fill(is_top, 0)
    return torch.where(is_top, -others.sum(-1, keepdim=True), others).to(logits.dtype), values


@lru_cache(maxsize=1)
def functions() -> tuple[Any, Any]:
    """`centred` and `gradient`, compiled when they are first called."""
    return torch.compile(centred), torch.compile(gradient)
