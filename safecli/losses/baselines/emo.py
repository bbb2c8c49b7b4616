"""EMO pulls towards data with two losses, weighted by each other; turned round, it pushes away."""

from torch import Tensor

from safecli.losses import Head, linear_cross_entropy, linear_emd
from safecli.losses.baselines.answers import Answers

MOST = 3.0
TINY = 1e-10


def emo(hidden: Tensor, weight: Tensor | Head, answers: Answers) -> Tensor:
    """-(min(CE / EMD, 3) EMD + CE) / 2, the weight a constant. Ren et al., EMO, ICLR 2024; `mode=1` of EMOLoss."""
    cross, emd = _both(hidden, weight, answers)
    share = (cross / (emd + TINY)).detach().clamp(max=MOST)
    return -answers.mean((share * emd + cross) / 2)


def emo_by_distance(hidden: Tensor, weight: Tensor | Head, answers: Answers) -> Tensor:
    """-((EMD / CE) CE + EMD), the weight a constant: more of the distance. `mode=2` of EMOLoss."""
    cross, emd = _both(hidden, weight, answers)
    share = (emd / (cross + TINY)).detach()
    return -answers.mean(share * cross + emd)


def _both(hidden: Tensor, weight: Tensor | Head, answers: Answers) -> tuple[Tensor, Tensor]:
    cross = linear_cross_entropy(hidden, weight, answers.ids, reduction="none")
    return cross, -linear_emd(hidden, weight, answers.ids, answers.cost, bound="upper", reduction="none")
