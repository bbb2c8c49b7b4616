"""The arithmetic of a chunk of positions: values, and gradients with respect to the logits.

Within a chunk the vocabulary is gone through in blocks that stay in a CPU's cache.

Every loss here depends on the logits z through p = softmax(z) alone, so its gradient dL/dz sums to 0 at each position.
That sum gives the entry of the likeliest token from the others: where the model is sure (p = 1 - eps) its own formula
would cancel to noise. For the same reason mu_p is taken as f_top + sum_i p_i (f_i - f_top).

Matrix products per T positions with a frozen head: 2TVd for the logits and 2TVd for dh; dense costs add 2TVk for the
row of costs of `exact` and `upper` (2TVk for each token of the support with `relaxed`), and 2TVk for mu_p and 2TVk for
its gradient with `centroid` and `covariance`; a reference adds 2TVd for its logits. Neighbours add none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from safecli.costs import DenseCost, SparseCost
from safecli.losses.problem import Head, Losses, Target, Term

SHARE, LIMIT = 0.32, 240 << 20
"""Buffers [t, V] of one chunk may take this part of one tensor [T, V], a thirteenth of what plain PyTorch takes, and at
most so many bytes; on a GPU, where there is more and narrow products are slow, `LIMIT_CUDA`."""
LIMIT_CUDA = 1 << 29
FEWEST = 96
BLOCK = 1 << 17
"""Numbers of a chunk that are worked on together, column after column of it: on a CPU they stay in its cache."""
_NO_SPREAD = 1e-30


@dataclass(frozen=True)
class _Softmax:
    """A softmax by its likeliest token: e^(z - z_top) [t, V], 0 at `top` [t, 1]; `rest` [t, 1] is the sum of that."""

    e: Tensor
    top: Tensor
    z_top: Tensor
    rest: Tensor

    @cached_property
    def p_top(self) -> Tensor:
        """p of the likeliest token, [t, 1]; what it multiplies `e` by to give p of the others."""
        return 1 / (1 + self.rest)

    @cached_property
    def log_top(self) -> Tensor:
        """log p of the likeliest token."""
        return -torch.log1p(self.rest)

    @cached_property
    def log_norm(self) -> Tensor:
        """log of the sum of e^z."""
        return self.z_top - self.log_top


class Chunks:
    """The arithmetic of one chunk after the other, in buffers [t, V] that are used again.

    Products are computed in `low`, the dtype of the head or of autocast; everything else in `work`, at least float32.
    """

    def __init__(self, hidden: Tensor, head: Head, losses: Losses) -> None:
        self.device = hidden.device
        autocast = torch.is_autocast_enabled(self.device.type)
        self.low = torch.get_autocast_dtype(self.device.type) if autocast else head.weight.dtype
        self.work = torch.promote_types(self.low, torch.float32)
        self.hidden, self.head = hidden.detach().to(self.low), self._lowered(head)
        self.terms, self.target, self.compiled = losses.terms, losses.target, losses.compiled
        self.bound, self.on_means = losses.bound, losses.bound in ("centroid", "covariance")
        if losses.cost is not None:
            dense = isinstance(losses.cost, DenseCost)
            self.cost = losses.cost.to(self.device, self.low if dense else self.work)
        self.features = self.cost.features if losses.cost and isinstance(self.cost, DenseCost) else None
        self.reference: Tensor | None = None
        if losses.reference is not None:
            self.reference = losses.reference.hidden.detach().to(self.low)
            self.reference_head = self._lowered(losses.reference.head or head)
        self.buffers: dict[str, Tensor] = {}
        self.chunk = min(losses.chunk_tokens or self._fitting(), max(len(hidden), 1))

    def _lowered(self, head: Head) -> Head:
        bias = None if head.bias is None else head.bias.detach().to(self.low)
        return Head(head.weight.detach().to(self.low), bias, head.scale, head.soft_cap)

    def _fitting(self) -> int:
        """Positions whose buffers fit in the budget, and at least so many that products are not slow."""
        vocab, work, low = len(self.head.weight), self.work.itemsize, self.low.itemsize
        linear, reference = "emd" in self.terms and not self.on_means, self.reference is not None
        item = work * (1 + reference + ("kl" in self.terms)) + (low if self.features is not None else work) * linear
        if self.low != self.work:
            item += low * (2 + reference)
        if self.compiled:
            item = 4 * low
        cpu = min(LIMIT, int(SHARE * len(self.hidden) * vocab * work))
        return max(FEWEST, (LIMIT_CUDA if self.device.type == "cuda" else cpu) // (vocab * item) // 16 * 16)

    def parts(self) -> Iterator[slice]:
        """Slices of positions, one after the other; dtypes stay as they are chosen here."""
        with torch.autocast(self.device.type, enabled=False):
            for start in range(0, len(self.hidden), self.chunk):
                yield slice(start, min(start + self.chunk, len(self.hidden)))

    def _blocks(self, rows: int) -> Iterator[slice]:
        """Slices of the vocabulary; where there is no cache to fit, a few large ones."""
        vocab = len(self.head.weight)
        width = max(64, BLOCK // rows // 64 * 64) if self.device.type == "cpu" else -(-vocab // 4)
        for start in range(0, vocab, width):
            yield slice(start, min(start + width, vocab))

    def _buffer(self, name: str, rows: int, dtype: torch.dtype) -> Tensor:
        """[rows, V], on a CPU with the positions side by side: products with few of them are a fifth faster so."""
        columns = len(self.head.weight)
        if name not in self.buffers:
            self.buffers[name] = torch.empty(rows * columns, dtype=dtype, device=self.device)
        flat = self.buffers[name][: rows * columns]
        return flat.view(columns, rows).T if self.device.type == "cpu" else flat.view(rows, columns)

    def _converted(self, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        """`value` [t, V] in another dtype, in a buffer of that name; itself where it has that dtype."""
        return value if value.dtype == dtype else self._buffer(name, len(value), dtype).copy_(value)

    def _logits(
        self, hidden: Tensor, head: Head, name: str, ratio: Tensor | None = None, find: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Logits [t, V] and the index of the largest, [t, 1].

        They are as the product gives them, or in the work dtype where something is done to them. `ratio` holds the
        reference's and is turned into these minus those. Without `find` the index is 0.
        """
        changed = head.bias is not None or head.scale != 1 or head.soft_cap is not None
        z = self._buffer(name, len(hidden), self.work if changed else self.low)
        largest, place = z.new_full((len(z),), -torch.inf), torch.zeros(len(z), dtype=torch.long, device=z.device)
        width = 0
        for columns in self._blocks(len(z)):
            part = z[:, columns]
            if z.dtype == self.low:
                torch.mm(hidden, head.weight[columns].T, out=part)
            else:
                part.copy_(torch.mm(hidden, head.weight[columns].T))
            if head.bias is not None:
                part.add_(head.bias[columns])
            if head.scale != 1:
                part.mul_(head.scale)
            if head.soft_cap is not None:
                part.div_(head.soft_cap).tanh_().mul_(head.soft_cap)
            if ratio is not None:
                torch.sub(part, ratio[:, columns], out=ratio[:, columns])
            if find:
                most = part.amax(1)
                place = torch.where(most > largest, columns.start, place)
                largest, width = torch.maximum(largest, most), max(width, part.shape[1])
        if not find:
            return z, place[:, None]
        inside = (place[:, None] + torch.arange(width, device=z.device)).clamp_(max=z.shape[1] - 1)
        return z, inside.gather(1, z.gather(1, inside).argmax(1, keepdim=True))

    def _softmax(
        self, z: Tensor, top: Tensor, out: Tensor | None = None, spread: Tensor | None = None, keep: bool = True
    ) -> _Softmax:
        """The softmax of logits [t, V] in the work dtype, in `out`, or in their own buffer, or nowhere (not `keep`).

        `spread` [k, t], where given, becomes the sum of e_i f_i. The logits at `top` are -inf afterwards.
        """
        z_top, rest = z.gather(1, top).to(self.work), torch.zeros(len(z), 1, dtype=self.work, device=z.device)
        z.scatter_(1, top, -torch.inf)
        e = z if out is None else out
        for columns in self._blocks(len(z)):
            part = torch.sub(z[:, columns], z_top, out=e[:, columns] if keep else None).exp_()
            rest += part.sum(1, keepdim=True)
            if spread is not None and self.features is not None:
                if self.low == self.work:
                    spread.addmm_(self.features[columns].T, part.T)
                else:
                    spread += torch.mm(self.features[columns].T, part.to(self.low).T)
        return _Softmax(e, top, z_top, rest)

    def compute(self, part: slice, gradient: bool) -> tuple[dict[Term, Tensor], Tensor]:
        """Every term's value [t], and the gradient of their sum with respect to the logits, [t, V].

        A loss L(p) has dL/dz = p (l - sum(p l)) with l = dL/dp. Three passes over blocks of the vocabulary, each with
        the products that it needs: the logits; their exponentials, and what they add up to; the gradient.
        Cross-entropy and `kl` add p - q and p - p_ref.
        """
        if self.compiled:
            return self._compute_compiled(part)
        values = dict[Term, Tensor]()
        target = None if self.target is None else self._target(part)
        ratio, r = self._reference(part)
        z, top = self._logits(self.hidden[part], self.head, "logits", ratio)
        capped = None if self.head.soft_cap is None else self._buffer("capped", len(z), self.work).copy_(z)
        z_target = None if target is None else z.gather(1, target.ids).to(self.work)
        out = None if z.dtype == self.work else self._buffer("p", len(z), self.work)
        spread = None
        if "emd" in self.terms and self.on_means and self.features is not None:
            spread = torch.zeros(self.features.shape[1], len(z), dtype=self.work, device=self.device)
        here = self._softmax(z, top, out, spread)
        costs, mean = self._values(here, r, ratio, target, values)
        if "cross_entropy" in self.terms and target is not None and z_target is not None:
            log_p = (z_target - here.z_top) + here.log_top
            values["cross_entropy"] = -(target.weights * log_p).sum(-1)
        direction = None
        if spread is not None and target is not None and self.features is not None:
            f_top = self.features[top[:, 0]].to(self.work)
            direction, moved = self._means(target, f_top, (spread.T - here.rest * f_top) * here.p_top, values)
            mean = mean + moved
        if gradient:
            self._push(here, r, ratio, costs, direction, self._share() - mean, target)
            if capped is not None and self.head.soft_cap is not None:
                here.e.mul_(capped.div_(self.head.soft_cap).square_().neg_().add_(1))
        return values, here.e

    def _reference(self, part: slice) -> tuple[Tensor | None, _Softmax | None]:
        """Logits of the reference [t, V] in the work dtype, and its softmax, kept where its own divergence is asked."""
        if self.reference is None:
            return None, None
        z, top = self._logits(self.reference[part], self.reference_head, "reference")
        keep = "kl" in self.terms
        r = self._softmax(z, top, self._buffer("r", len(z), self.work) if keep else None, keep=keep)
        z.scatter_(1, top, r.z_top.to(z.dtype))
        return self._converted("reference wide", z, self.work), r

    def _values(
        self,
        here: _Softmax,
        r: _Softmax | None,
        ratio: Tensor | None,
        target: Target | None,
        values: dict[Term, Tensor],
    ) -> tuple[Tensor | None, Tensor]:
        """Values of the divergences, of which `ratio` becomes the log ratio, and of bounds linear in p.

        Returns what such a bound pushes, -weight * c [t, V], and the mean of what is pushed under p, [t, 1].
        """
        top, size = here.top, len(here.e)
        mean, kl, reverse, emd = torch.zeros(4, size, 1, dtype=self.work, device=self.device)
        costs, weight, towards = None, self.terms.get("emd") or 1.0, None
        if "emd" in self.terms and target is not None and not self.on_means:
            costs = self._buffer("costs", size, self.low if self.features is not None else self.work)
            towards = self._towards(target)
            if towards is None:
                self._neighbours(target, costs, -weight)
        if ratio is None and costs is None:
            return None, mean
        for columns in self._blocks(size):
            e = here.e[:, columns]
            if ratio is not None and r is not None:
                part = ratio[:, columns].add_(r.log_norm - here.log_norm)
                if "kl" in self.terms:
                    kl -= (r.e[:, columns] * part).sum(1, keepdim=True)
                if "reverse_kl" in self.terms:
                    reverse += (e * part).sum(1, keepdim=True)
            if costs is not None:
                if towards is not None and target is not None:
                    self._costs(towards, target, columns, costs[:, columns], -weight)
                emd += (e * costs[:, columns]).sum(1, keepdim=True)
        if "kl" in self.terms and ratio is not None and r is not None:
            values["kl"] = ((kl - ratio.gather(1, r.top)) * r.p_top)[:, 0]
        if "reverse_kl" in self.terms and ratio is not None:
            reverse = (reverse + ratio.gather(1, top)) * here.p_top
            values["reverse_kl"], mean = reverse[:, 0], mean + self.terms["reverse_kl"] * reverse
        if costs is not None and target is not None:
            self._nothing_at(target, costs)
            emd = (emd + costs.gather(1, top).to(self.work)) * here.p_top
            values["emd"], mean = emd[:, 0] / -weight, mean + emd * bool(self.terms["emd"])
        return costs, mean

    def _push(
        self,
        here: _Softmax,
        r: _Softmax | None,
        ratio: Tensor | None,
        costs: Tensor | None,
        direction: Tensor | None,
        share: Tensor,
        target: Target | None,
    ) -> None:
        """`here.e` [t, V] turned into dL/dz (of capped logits): e p_top (what is pushed + share), and p - q, p - p_ref.

        The top entry is minus the sum of the others.
        """
        weight, kl = self.terms.get("reverse_kl", 0.0), self.terms.get("kl", 0.0)
        pushes, others = self.terms.get("emd", 0.0) != 0, torch.zeros_like(here.rest)
        if kl and r is not None:
            r.e.scatter_(1, here.top, 0)  # of the top entry nothing counts but the others
        for columns in self._blocks(len(here.e)):
            dz, pushed = here.e[:, columns], share
            if pushes and direction is not None and self.features is not None:
                pushed = torch.mm(self.features[columns], direction.T).T.to(self.work).add_(share)
            elif pushes and costs is not None:
                pushed = costs[:, columns] + share
            if weight and ratio is not None:
                pushed = torch.add(pushed, ratio[:, columns], alpha=weight)
            dz.mul_(pushed).mul_(here.p_top)
            if kl and r is not None:
                dz.addcmul_(r.e[:, columns], r.p_top, value=-kl)
            others += dz.sum(1, keepdim=True)
        if kl and r is not None:
            here.e.scatter_add_(1, r.top, r.p_top * -kl)
            others -= torch.where(r.top == here.top, 0, r.p_top * kl)
        if (cross := self.terms.get("cross_entropy", 0.0)) and target is not None:
            here.e.scatter_add_(1, target.ids, target.weights * -cross)
            others -= cross * torch.where(target.ids == here.top, 0, target.weights).sum(1, keepdim=True)
        here.e.scatter_(1, here.top, -others)

    def _compute_compiled(self, part: slice) -> tuple[dict[Term, Tensor], Tensor]:
        """The same as `compute`, with what lies between the products compiled into few passes."""
        from safecli.losses.compiled import functions

        centred, gradient = functions()
        weight, values = self.terms.get("emd") or 1.0, dict[Term, Tensor]()
        z, _ = self._logits(self.hidden[part], self.head, "logits", find=False)
        reference = pushed = None
        if self.reference is not None:
            reference, _ = self._logits(self.reference[part], self.reference_head, "reference", find=False)
        target = None if self.target is None else self._target(part)
        if "emd" in self.terms and target is not None:
            pushed = self._buffer("costs", len(z), self.low if self.features is not None else self.work)
            if self.on_means and self.features is not None:
                made, top = centred(z, self.work)
                delta = torch.mm(made.to(self.low), self.features).to(self.work)
                direction, _ = self._means(target, self.features[top].to(self.work), delta, values)
                torch.mm(direction, self.features.T, out=pushed)
            elif (towards := self._towards(target)) is not None:
                self._costs(towards, target, slice(None), pushed, -weight)
                self._nothing_at(target, pushed)
            else:
                self._neighbours(target, pushed, -weight)
        ids, q = (None, None) if target is None else (target.ids, target.weights)
        dz, found = gradient(z, reference, pushed, ids, q, self.work, self.terms)
        if "emd" in found:
            found["emd"] = values.get("emd", found["emd"] / -weight)
        if self.head.soft_cap is not None:
            dz.mul_(z.div_(self.head.soft_cap).square_().neg_().add_(1))
        return {**found, **values}, dz

    def _target(self, part: slice) -> Target:
        assert self.target is not None
        return Target(self.target.ids[part], self.target.weights[part].to(self.work))

    def _share(self) -> float:
        """The weight of p itself in dL/dz."""
        return self.terms.get("cross_entropy", 0.0) + self.terms.get("kl", 0.0)

    def _towards(self, target: Target) -> Tensor | None:
        """Features [m, t, k] whose cosines make the row of costs: of the support, or with `upper` of its mean."""
        if self.features is None:
            return None
        support = self.features[target.ids]
        if self.bound == "upper":
            return (target.weights[..., None] * support).sum(1).to(self.low)[None]
        return support.transpose(0, 1)

    def _costs(self, towards: Tensor, target: Target, columns: slice, out: Tensor, scale: float) -> None:
        """scale * c of these columns into `out` [t, w], from features: C_ix, sum_j q_j C_ij, or min_j C_ij."""
        assert self.features is not None
        features = self.features[columns]
        for number, feature in enumerate(towards):
            cosine = torch.mm(feature, features.T, out=None if number else out)
            if len(towards) > 1:
                cosine.masked_fill_(target.weights[:, number, None] == 0, -torch.inf)
            if number:
                torch.maximum(out, cosine, out=out)
        out.mul_(-scale).add_(scale)

    def _neighbours(self, target: Target, out: Tensor, scale: float) -> None:
        """The same [t, V] from neighbours, for the whole vocabulary."""
        assert isinstance(self.cost, SparseCost)
        nearest, never = (torch.maximum, -torch.inf) if scale < 0 else (torch.minimum, torch.inf)
        for column, (token, weight) in enumerate(zip(target.ids.T, target.weights.T[..., None], strict=True)):
            row = self.cost.rows(token, scale, self._buffer("row", len(out), out.dtype) if column else out)
            if self.bound == "upper":
                row.mul_(weight)
            elif target.ids.shape[1] > 1:
                row.masked_fill_(weight == 0, never)
            if column:
                out.add_(row) if self.bound == "upper" else nearest(out, row, out=out)

    def _nothing_at(self, target: Target, costs: Tensor) -> None:
        """Nothing is what a token costs to itself, exactly: where the model is sure of it all else is as small."""
        if self.bound == "upper" and not target.is_onehot:
            return
        surely = target.ids.gather(1, target.weights.argmax(1, keepdim=True))
        costs.scatter_(1, torch.where(target.weights > 0, target.ids, surely), 0)

    def _means(self, target: Target, f_top: Tensor, delta: Tensor, values: dict[Term, Tensor]) -> tuple[Tensor, Tensor]:
        """Values of the bounds on means; minus their weighted gradient in mu_p [t, k], and that times mu_p [t, 1].

        `delta` [t, k] is mu_p - f_top. With s^2 = 1 - |mu|^2: centroid |mu_p - mu_q|^2 / 2, and covariance is that plus
        (s_p - s_q)^2 / 2.
        """
        assert self.features is not None
        support = self.features[target.ids].to(self.work)
        mu_p, mu_q = f_top + delta, (target.weights[..., None] * support).sum(1)
        apart = delta + (f_top - mu_q)
        values["emd"], direction = apart.square().sum(-1) / 2, -apart
        if self.bound == "covariance":
            direction = self._covariance(target, support, mu_q, f_top, delta, values)
        direction = (direction * self.terms["emd"]).to(self.low)
        return direction, (direction * mu_p).sum(-1, keepdim=True)

    def _covariance(
        self,
        target: Target,
        support: Tensor,
        mu_q: Tensor,
        f_top: Tensor,
        delta: Tensor,
        values: dict[Term, Tensor],
    ) -> Tensor:
        """What covariance adds to the value of centroid; minus its gradient with respect to mu_p, [t, k]."""
        spread_p = (-2 * (f_top * delta).sum(-1) - delta.square().sum(-1)).clamp(min=_NO_SPREAD).sqrt()
        spread_q = (target.weights * (support - mu_q[:, None]).square().sum(-1)).sum(-1).sqrt()
        values["emd"] += (spread_p - spread_q).square() / 2
        values["interval"] = spread_p * spread_q
        return mu_q - (spread_q / spread_p)[:, None] * (f_top + delta)

    def to_hidden(self, dz: Tensor) -> Tensor:
        """dL/dh [t, d] from dL/dz."""
        return torch.mm(self.head.weight.T, self._converted("low", dz, self.low).T).T.mul_(self.head.scale)

    def to_weight(self, dz: Tensor, part: slice) -> Tensor:
        """The chunk's part of dL/dW, [V, d]."""
        return torch.mm(self._converted("low", dz, self.low).T, self.hidden[part]).mul_(self.head.scale)
