"""The losses from hidden states and head weight, in chunks of positions, so that [T, V] never exists whole.

Losses of different positions don't mix, so a chunk of positions computes its values and, while its probabilities are
at hand, their gradient with respect to the chunk's hidden states; what is kept for the backward pass is [T, d]. A head
that trains gets its gradient in the backward pass, where each chunk is computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from safecli.costs import Cost
from safecli.errors import RunError
from safecli.losses.chunks import Chunks
from safecli.losses.problem import Bound, Head, Losses, Reference, Target, Term, best_bound, check_bound, onehot

Reduction = Literal["mean", "sum", "none"]


@dataclass(frozen=True)
class Anchor:
    """The anchored term: a reference as in `Reference`, and the `strength` (lambda) of the EMD beside it."""

    hidden: Tensor
    strength: float
    head: Head | None = None


def linear_emd(
    hidden: Tensor,
    weight: Tensor | Head,
    targets: Tensor | Target,
    cost: Cost,
    *,
    bound: Bound | None = None,
    anchor: Anchor | None = None,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    compiled: bool = False,
) -> Tensor:
    r"""Minus a bound of the Earth Mover Distance between softmax(hidden W') and the targets: minimising pushes away.

    .. math::
        L_t = -\mathrm{bound}(p_t, q_t), \qquad
        \mathrm{EMD}(p, q) = \min_{T \in \Pi(p, q)} \sum_{ij} T_{ij} C_{ij}, \quad C_{ij} = 1 - f_i \cdot f_j

    and with an anchor KL(p || p_ref) - strength * bound, whose optimum for one-hot targets is p_ref exp(strength C_x),
    normalised.

    Parameters
    ----------
    hidden : [T, d], any float dtype; logits are computed in the head's dtype, or in autocast's
    weight : the output head, [V, d] or a `Head`
    targets : token ids [T], or a `Target` of sparse distributions
    cost : `DenseCost` (features [V, k]) or `SparseCost` (neighbours and a ceiling), in [0, 2]
    bound : `exact` (one-hot targets), `centroid`, `covariance` (costs with features), `relaxed`, `upper` (any);
        by itself the tightest that targets and cost allow: `exact`, else `covariance`, else `relaxed`
    anchor : the reference's last hidden states, its head where this one trains, and the strength
    token_weight : [T], the weight of each position
    reduction : `mean` is sum(w L) / sum(w) over positions that count, 0 where none does; `sum`; or `none`: [T]
    ignore_index : a position with this target counts for nothing
    chunk_tokens : positions at a time; by itself as many as a budget of memory allows
    compiled : let `torch.compile` fuse what lies between the products; needs a compiler, and pays on GPUs

    Returns
    -------
    A scalar, or [T] with reduction `none`; float32, or float64 where hidden is.

    Raises
    ------
    UsageError : a bound that targets and cost can't give
    RunError : NaN or infinity in hidden, with the first position

    References
    ----------
    `exact`, `centroid`, `covariance`: docs/loss.md. `relaxed`: Kusner et al., From Word Embeddings To Document
    Distances, ICML 2015. `upper`: Ren et al., EMO, ICLR 2024. The objective: Lu, Sinha & Varakantham, ICLR 2025.

    Examples
    --------
    >>> import torch
    >>> from safecli.losses import DenseCost, linear_emd
    >>> axes = DenseCost(torch.eye(4))                 # four tokens, each as far from every other: cost 1
    >>> hidden = torch.tensor([[9.0, 0.0, 0.0, 0.0]], requires_grad=True)
    >>> loss = linear_emd(hidden, torch.eye(4), torch.tensor([0]), axes)
    >>> round(loss.item(), 6)                          # minus the probability of tokens 1 to 3
    -0.00037
    """
    target = targets if isinstance(targets, Target) else onehot(targets)
    terms: dict[Term, float] = {"emd": 1.0} if anchor is None else {"reverse_kl": 1.0, "emd": anchor.strength}
    reference = Reference(anchor.hidden, anchor.head) if anchor else None
    loss, _ = linear_losses(
        hidden,
        weight,
        terms,
        target,
        cost,
        bound,
        reference,
        ignore_index=ignore_index,
        chunk_tokens=chunk_tokens,
        compiled=compiled,
    )
    return _reduced(loss, token_weight, reduction, _counts(target, ignore_index))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | Head,
    targets: Tensor | Target,
    *,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """Cross-entropy -sum_j q_j log p_j of softmax(hidden W') with targets; arguments and returns as in `linear_emd`."""
    target = targets if isinstance(targets, Target) else onehot(targets)
    loss, _ = linear_losses(
        hidden,
        weight,
        {"cross_entropy": 1.0},
        target,
        ignore_index=ignore_index,
        chunk_tokens=chunk_tokens,
        compiled=compiled,
    )
    return _reduced(loss, token_weight, reduction, _counts(target, ignore_index))


def linear_kl(
    hidden: Tensor,
    weight: Tensor | Head,
    reference: Tensor | Reference,
    *,
    reverse: bool = False,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    chunk_tokens: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """KL(p_ref || p), or KL(p || p_ref) with `reverse`; arguments and returns as in `linear_emd`."""
    anchor = reference if isinstance(reference, Reference) else Reference(reference)
    terms: dict[Term, float] = {"reverse_kl" if reverse else "kl": 1.0}
    loss, _ = linear_losses(hidden, weight, terms, reference=anchor, chunk_tokens=chunk_tokens, compiled=compiled)
    return _reduced(loss, token_weight, reduction, torch.ones(len(hidden), dtype=torch.bool, device=hidden.device))


def _counts(target: Target, ignore_index: int) -> Tensor:
    return target.ids[:, 0] != ignore_index


def _reduced(loss: Tensor, token_weight: Tensor | None, reduction: Reduction, counts: Tensor) -> Tensor:
    weight = counts.to(loss.dtype) if token_weight is None else token_weight.to(loss.dtype) * counts
    loss = loss * weight
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / weight.sum().clamp(min=torch.finfo(loss.dtype).tiny)


def linear_losses(
    hidden: Tensor,
    weight: Tensor | Head,
    terms: Mapping[Term, float],
    target: Target | None = None,
    cost: Cost | None = None,
    bound: Bound | None = None,
    reference: Reference | None = None,
    *,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    compiled: bool = False,
) -> tuple[Tensor, dict[Term, Tensor]]:
    """Several losses in one pass over the chunks: their weighted sum at each position, and each of them, all [T].

    `terms` names what to compute, with its weight in the sum; a weight of 0 computes it to be looked at, without a
    gradient. `cross_entropy` and `emd` need a target, `emd` a cost, `kl` (p_ref || p) and `reverse_kl` (p || p_ref) a
    reference. `emd` enters the sum with a minus. `interval` (weight 0) is the gap between the upper and the covariance
    bound, which is certain to hold the EMD: there is one with the bound `covariance` alone. Ignored positions are 0.
    """
    head = weight if isinstance(weight, Head) else Head(weight)
    _check_finite(hidden)
    if "emd" in terms:
        assert target is not None
        assert cost is not None
        bound = bound or best_bound(target, cost)
        check_bound(bound, target, cost)
    whole = len(hidden)
    kept = _counts(target, ignore_index).nonzero()[:, 0] if target is not None else None
    if kept is None or len(kept) == whole:
        return _apply(hidden, head, Losses(dict(terms), target, cost, bound, reference, chunk_tokens, compiled))
    assert target is not None
    if reference is not None:
        reference = Reference(reference.hidden[kept], reference.head)
    losses = Losses(
        dict(terms), Target(target.ids[kept], target.weights[kept]), cost, bound, reference, chunk_tokens, compiled
    )
    loss, values = _apply(hidden[kept], head, losses)

    def spread(part: Tensor) -> Tensor:
        return part.new_zeros(whole).index_copy(0, kept, part)

    return spread(loss), {name: spread(value) for name, value in values.items()}


def _check_finite(hidden: Tensor) -> None:
    bad = (~hidden.detach().isfinite()).any(-1).nonzero()
    if len(bad):
        raise RunError(f"NaN or infinity in the hidden states, first at position {int(bad[0, 0])} of {len(hidden)}")


def _apply(hidden: Tensor, head: Head, losses: Losses) -> tuple[Tensor, dict[Term, Tensor]]:
    per_position = torch.compiler.disable(_PerPosition.apply)  # type: ignore[no-untyped-call]
    return per_position(hidden, head.weight, head.bias, head, losses), losses.values


class _PerPosition(torch.autograd.Function):
    """Losses [T]; their gradient with respect to hidden is computed in the forward pass where the head is frozen."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, losses: Losses) -> Tensor:
        needs_hidden, *needs_head = ctx.needs_input_grad[:3]
        ctx.recompute = any(needs_head)
        chunks = Chunks(hidden, head, losses)
        loss = torch.zeros(len(hidden), dtype=chunks.work, device=hidden.device)
        losses.values = {name: torch.empty_like(loss) for name in losses.terms}
        gradient = torch.empty_like(hidden) if needs_hidden and not ctx.recompute else None
        for part in chunks.parts():
            values, dz = chunks.compute(part, gradient is not None)
            for name, weight_of in losses.terms.items():
                losses.values[name][part] = values[name]
                loss[part] += (-weight_of if name == "emd" else weight_of) * values[name]
            if gradient is not None:
                gradient[part] = chunks.to_hidden(dz)
        ctx.head, ctx.losses = head, losses
        ctx.save_for_backward(hidden, weight, bias, gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden, weight, bias, gradient = ctx.saved_tensors
        if not ctx.recompute:
            return gradient * upstream[:, None].to(gradient.dtype), None, None, None, None
        chunks = Chunks(hidden, ctx.head, ctx.losses)
        wide = torch.promote_types(weight.dtype, torch.float32)
        dh, dw = torch.empty_like(hidden), torch.zeros_like(weight, dtype=wide)
        db = torch.zeros(len(weight), dtype=wide, device=weight.device)
        for part in chunks.parts():
            dz = chunks.compute(part, True)[1].mul_(upstream[part, None])
            dh[part] = chunks.to_hidden(dz)
            dw += chunks.to_weight(dz, part)
            db += dz.sum(0).mul_(ctx.head.scale)
        return dh, dw.to(weight.dtype), None if bias is None else db.to(bias.dtype), None, None
