"""`safecli bench loss`: the operator's time and memory, against the bare matrix products and against plain PyTorch."""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from safecli.bench.memory import peak_rss, restart_peak
from safecli.costs import DenseCost
from safecli.errors import UsageError
from safecli.losses import linear_cross_entropy, linear_emd
from safecli.stages import Reporter

RUNS = 7
PLAIN_LIMIT = 4 << 30
"""Plain PyTorch is left out where its tensors [T, V] alone take more bytes than this on a CPU."""
DEFAULT = "512,49152,576,576"
BOUNDS = ("exact", "centroid", "covariance", "cross_entropy")


@dataclass(frozen=True)
class Case:
    """One measurement: sizes, where, and which loss."""

    device: str
    dtype: str
    T: int
    V: int
    d: int
    k: int
    bound: str
    compiled: bool = False


Sides = dict[str, Callable[[], object]]


def loss(
    sizes: Sequence[tuple[int, int, int, int]],
    bounds: Sequence[str],
    device: str,
    dtype: str,
    report: Reporter,
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """A row for every size (T, V, d, k) and bound: forward plus backward, the median of interleaved runs.

    `floor_ratio` is the time over that of the bare products that the loss needs with a frozen head (whole, into buffers
    that are there already), `plain_ratio` the time of plain PyTorch over ours, `*_extra_bytes` the peak beside inputs.
    """
    rows = []
    for size in sizes:
        for bound in bounds:
            case = Case(device, dtype, *size, bound, compiled)
            seconds = {
                name: statistics.median(times) for name, times in _interleaved(_sides(case), device, RUNS).items()
            }
            ours = seconds.pop("ours")
            rows.append(
                {
                    **asdict(case),
                    "seconds": ours,
                    "floor_ratio": ours / seconds.pop("floor"),
                    "plain_ratio": seconds["plain"] / ours if "plain" in seconds else None,
                    "extra_bytes": extra_bytes(case, "ours"),
                    "plain_extra_bytes": extra_bytes(case, "plain") if "plain" in seconds else None,
                    **{f"{name}_ratio": value / ours for name, value in seconds.items() if name != "plain"},
                }
            )
            report.say(
                f"{bound} at T={case.T} V={case.V} d={case.d} k={case.k}: {rows[-1]['floor_ratio']:.2f} x the floor"
            )
    return rows


def sizes(texts: Sequence[str] | None) -> list[tuple[int, int, int, int]]:
    """`T,V,d,k` as numbers; `UsageError` for anything else."""
    found = []
    for text in texts or [DEFAULT]:
        numbers = text.split(",")
        if len(numbers) != 4 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
            raise UsageError(f"--size {text}: write T,V,d,k, such as {DEFAULT}")
        T, V, d, k = map(int, numbers)
        found.append((T, V, d, k))
    return found


def known_bounds(names: Sequence[str] | None) -> list[str]:
    """The losses to time; `UsageError` for a name that there isn't."""
    for name in names or ():
        if name not in BOUNDS:
            raise UsageError(f"--bound {name}: valid: {', '.join(BOUNDS)}")
    return list(names or BOUNDS)


def exponents(bounds: Sequence[str], device: str, dtype: str, report: Reporter) -> list[dict[str, Any]]:
    """How the time grows with T, V and d + k: the slope of log time over four sizes each; 1 is linear."""
    middle = {"T": 256, "V": 16384, "d": 256}
    rows = []
    for bound in bounds:
        for name in middle:
            sides: dict[int, Callable[[], object]] = {}
            for factor in (1, 2, 4, 8):
                size = middle | {name: middle[name] * factor // (1 if name == "d" else 2)}
                sides[size[name]] = _sides(Case(device, dtype, size["T"], size["V"], size["d"], size["d"], bound))[
                    "ours"
                ]
            times = {n: statistics.median(found) for n, found in _interleaved(sides, device, RUNS).items()}
            slope = _slope([math.log(n) for n in times], [math.log(seconds) for seconds in times.values()])
            rows.append(
                {"bound": bound, "in": "d + k" if name == "d" else name, "exponent": slope, "sizes": list(times)}
            )
            report.say(f"{bound}: time ~ ({rows[-1]['in']})^{slope:.2f}")
    return rows


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    return statistics.linear_regression(x, y).slope


def _interleaved(sides: Any, device: str, runs: int) -> dict[Any, list[float]]:
    """Seconds of every side, one after the other in each round, after a round to warm up."""
    times: dict[Any, list[float]] = {name: [] for name in sides}
    for round_ in range(runs + 1):
        for name, run in sides.items():
            _wait(device)
            started = time.perf_counter()
            run()
            _wait(device)
            if round_:
                times[name].append(time.perf_counter() - started)
    return times


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@dataclass
class _Inputs:
    hidden: Tensor
    weight: Tensor
    features: Tensor
    ids: Tensor


def _inputs(case: Case) -> _Inputs:
    make = torch.Generator(case.device).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, device=case.device, dtype=dtype)

    features = normal(case.V, case.k)
    features /= features.norm(dim=-1, keepdim=True)
    ids = torch.randint(case.V, (case.T,), generator=make, device=case.device)
    return _Inputs(normal(case.T, case.d).requires_grad_(), normal(case.V, case.d) / case.d**0.5, features, ids)


def _sides(case: Case) -> Sides:
    given = _inputs(case)
    sides: Sides = {"ours": lambda: _ours(given, case.bound, case.compiled), "floor": _floor(given, case.bound)}
    if case.device != "cpu" or 5 * 4 * case.T * case.V < PLAIN_LIMIT:
        sides["plain"] = lambda: _plain(given, case.bound)
        if case.bound == "exact" and importlib.util.find_spec("emo"):
            sides["EMOLoss"] = lambda: _emo_package(given)
    if case.bound == "cross_entropy" and case.device != "cpu":
        sides |= _kernels(given)
    return sides


def _ours(given: _Inputs, bound: str, compiled: bool = False) -> Tensor:
    if bound == "cross_entropy":
        found = linear_cross_entropy(given.hidden, given.weight, given.ids, compiled=compiled)
    else:
        cost = DenseCost(given.features)
        found = linear_emd(given.hidden, given.weight, given.ids, cost, bound=bound, compiled=compiled)  # type: ignore[arg-type]
    return torch.autograd.grad(found, given.hidden)[0]


def _plain(given: _Inputs, bound: str) -> Tensor:
    """What a first implementation does: logits, softmax, products, and autograd."""
    logits = given.hidden @ given.weight.T
    if bound == "cross_entropy":
        return torch.autograd.grad(functional.cross_entropy(logits.float(), given.ids), given.hidden)[0]
    p = logits.float().softmax(-1).to(logits.dtype)
    target = given.features[given.ids]
    if bound == "exact":
        found = -(p * (1 - target @ given.features.T)).sum(-1)
    else:
        mu = p @ given.features
        found = -(mu - target).square().sum(-1) / 2
        if bound == "covariance":  # the target's own spread is 0
            found = found - (1 - mu.square().sum(-1)).clamp(min=1e-6) / 2
    return torch.autograd.grad(found.mean(), given.hidden)[0]


def _floor(given: _Inputs, bound: str) -> Callable[[], None]:
    """The products alone: logits, then those with the features, then the gradient of hidden."""
    hidden, weight, features = given.hidden.detach(), given.weight, given.features
    big = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    mu, dh = torch.empty_like(features[: len(hidden)]), torch.empty_like(hidden)
    target = features[given.ids]
    mu = torch.empty_like(target)

    def run() -> None:
        torch.mm(hidden, weight.T, out=big)
        if bound in ("centroid", "covariance"):
            torch.mm(big, features, out=mu)
        if bound != "cross_entropy":
            torch.mm(target, features.T, out=big)
        torch.mm(big, weight, out=dh)

    return run


def _emo_package(given: _Inputs) -> Tensor:
    """The published package, which leaves out the last position and adds the cross-entropy."""
    from emo import EMOLoss

    logits = given.hidden @ given.weight.T
    return torch.autograd.grad(EMOLoss(logits[None], given.ids[None], given.features), given.hidden)[0]


def _kernels(given: _Inputs) -> Sides:
    """Published kernels for the cross-entropy, where they are installed."""
    sides: Sides = {}
    with suppress(ImportError):
        from cut_cross_entropy import linear_cross_entropy as cut

        sides["cut_cross_entropy"] = lambda: torch.autograd.grad(
            cut(given.hidden, given.weight, given.ids), given.hidden
        )
    with suppress(ImportError):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        sides["liger"] = lambda: torch.autograd.grad(liger(given.weight, given.hidden, given.ids), given.hidden)
    return sides


def extra_bytes(case: Case, side: str) -> int:
    """Peak bytes that one call takes beside its inputs; on a CPU of a process of its own."""
    if case.device.startswith("cuda"):
        run = _sides(case)[side]
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        return alone.submit(_peak, case, side, torch.get_num_threads()).result()


def _peak(case: Case, side: str, threads: int) -> int:
    torch.set_num_threads(threads)
    run = {"ours": _ours, "plain": _plain}[side]
    run(_inputs(Case(case.device, case.dtype, 32, 64, case.d, case.k, case.bound)), case.bound)
    given = _inputs(case)
    before = restart_peak()
    run(given, case.bound)
    return max(0, peak_rss() - before)
