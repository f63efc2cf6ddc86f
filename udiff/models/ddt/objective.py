"""DDT's training objective: flow matching on the straight path (arXiv 2504.05741, section 3.2)."""

from jaxtyping import Float
from torch import Tensor

from udiff.diffusion.conditions import LabelDropout
from udiff.diffusion.flow_matching import FlowMatching, LossWeight, constant_weight
from udiff.diffusion.path import Coefficients, LinearPath
from udiff.diffusion.time import LogitNormalTime, ShiftedTime, TimeDistribution, UniformTime
from udiff.models.ddt.settings import ObjectiveSettings


def inverse_variance(point: Coefficients) -> Float[Tensor, "..."]:
    """Weigh by 1 / sigma^2."""
    return 1 / point.sigma**2


def snr(point: Coefficients) -> Float[Tensor, "..."]:
    """Weigh by alpha / sigma."""
    return point.alpha / point.sigma


def snr_at_least_5(point: Coefficients) -> Float[Tensor, "..."]:
    """Weigh by alpha / sigma, but never below 5; published under the name minsnr."""
    return snr(point).clamp_min(5)


def snr_at_most_5(point: Coefficients) -> Float[Tensor, "..."]:
    """Weigh by alpha / sigma, but never above 5; published under the name maxsnr."""
    return snr(point).clamp_max(5)


WEIGHTS: dict[str, LossWeight] = {
    "constant": constant_weight,
    "inverse_variance": inverse_variance,
    "snr": snr,
    "snr_at_least_5": snr_at_least_5,
    "snr_at_most_5": snr_at_most_5,
}


def make_flow_matching(settings: ObjectiveSettings, conditions: LabelDropout) -> FlowMatching:
    """Make the objective that other pieces are put around."""
    return FlowMatching(
        LinearPath(), _make_time(settings), conditions, weight=WEIGHTS[settings.weight]
    )


def _make_time(settings: ObjectiveSettings) -> TimeDistribution:
    time = LogitNormalTime() if settings.time == "logit_normal" else UniformTime()
    return time if settings.time_shift == 1 else ShiftedTime(time, settings.time_shift)
