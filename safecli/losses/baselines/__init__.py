"""Losses to compare with, all called as `loss(hidden, weight, answers)`; `safecli train --loss NAME` takes any."""

from collections.abc import Callable

from torch import Tensor

from safecli.losses import Head
from safecli.losses.baselines.answers import Answers
from safecli.losses.baselines.emo import emo, emo_by_distance
from safecli.losses.baselines.gradient_ascent import gradient_ascent
from safecli.losses.baselines.npo import npo, safe_unlearning, simnpo
from safecli.losses.baselines.unlikelihood import anchored_unlikelihood, unlikelihood

BASELINES: dict[str, Callable[[Tensor, Tensor | Head, Answers], Tensor]] = {
    "unlikelihood": unlikelihood,
    "anchored-unlikelihood": anchored_unlikelihood,
    "gradient-ascent": gradient_ascent,
    "npo": npo,
    "simnpo": simnpo,
    "safe-unlearning": safe_unlearning,
    "emo": emo,
    "emo-by-distance": emo_by_distance,
}

__all__ = ["BASELINES", "Answers"]
