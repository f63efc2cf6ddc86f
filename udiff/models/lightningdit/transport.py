"""Transport (SiT, arXiv 2401.08740) as LightningDiT sets it up."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from udiff.diffusion.conditions import LabelDropout
from udiff.diffusion.flow_matching import (
    FlowMatching,
    LossWeight,
    constant_weight,
    likelihood_weight,
    velocity_weight,
)
from udiff.diffusion.parameterization import DATA, NOISE, SCORE, VELOCITY, Parameterization
from udiff.diffusion.path import GVPPath, LinearPath, Path, VPPath
from udiff.diffusion.time import (
    LogitNormalTime,
    Rescaled,
    Restricted,
    TimeDistribution,
    UniformTime,
)
from udiff.models.lightningdit.settings import (
    DiffusionName,
    ObjectiveSettings,
    TransportSampling,
)
from udiff.samplers import sde
from udiff.samplers.dopri5 import Tolerance, dopri5
from udiff.samplers.euler import euler
from udiff.samplers.heun import heun
from udiff.samplers.prediction import from_prediction
from udiff.samplers.runge_kutta import HEUN3, MIDPOINT, THREE_EIGHTHS, runge_kutta
from udiff.system import Steps

Interval = tuple[float, float]

PATHS: dict[str, Path] = {"linear": LinearPath(), "gvp": GVPPath(), "vp": VPPath()}
PREDICTIONS: dict[str, Parameterization] = {
    "velocity": VELOCITY,
    "noise": NOISE,
    "data": DATA,
    "score": SCORE,
}
WEIGHTS: dict[str, LossWeight] = {
    "none": constant_weight,
    "velocity": velocity_weight,
    "likelihood": likelihood_weight,
}
DIFFUSIONS = {
    "path": sde.path_diffusion,
    "sigma": sde.sigma_diffusion,
    "linear": sde.linear_diffusion,
    "decreasing": sde.decreasing_diffusion,
    "middle": sde.middle_diffusion,
    "constant": sde.constant_diffusion,
}
TABLEAUS = {"midpoint": MIDPOINT, "heun3": HEUN3, "rk4": THREE_EIGHTHS}


@dataclass(frozen=True)
class Transport:
    """A path, what the network predicts on it, and where between 0 and 1 that is finite."""

    path: Path
    prediction: Parameterization
    train_eps: float
    sample_eps: float

    @classmethod
    def make(cls, objective: ObjectiveSettings, *, sample_eps: float | None = None) -> "Transport":
        """Fill in the published distances from the ends (for sampling, those that were meant)."""
        vp, velocity = objective.path == "vp", objective.prediction == "velocity"
        train_eps = objective.eps if objective.eps is not None else 1e-5 if vp else 1e-3
        sample_eps = sample_eps if sample_eps is not None else 1e-3
        if velocity and not vp:
            # Nothing is singular: the published code takes 0 here, whatever it is told.
            train_eps = sample_eps = 0.0
        path, prediction = PATHS[objective.path], PREDICTIONS[objective.prediction]
        return cls(path, prediction, train_eps, sample_eps)

    @property
    def training_interval(self) -> Interval:
        """Times to train at."""
        return self._interval(self.train_eps, at_start=False, at_end=False)

    @property
    def ode_interval(self) -> Interval:
        """Times between which the ODE is solved."""
        return self._interval(self.sample_eps, at_start=False, at_end=False)

    def sde_interval(self, diffusion: DiffusionName, *, last_step: float) -> Interval:
        """Times between which the SDE is solved; a last step without noise follows."""
        own = diffusion == "path"
        # 0 as published would divide by it; 1e-3 is what other predictions take.
        eps = self.sample_eps or (1e-3 if own else 0.0)
        low, high = self._interval(eps, at_start=own, at_end=True)
        return low, 1 - last_step if last_step else high

    def _interval(self, eps: float, *, at_start: bool, at_end: bool) -> Interval:
        if isinstance(self.path, VPPath):
            return 0.0, 1 - eps
        singular = self.prediction is not VELOCITY
        return eps if singular or at_start else 0.0, 1 - eps if singular or at_end else 1.0


def make_flow_matching(
    settings: ObjectiveSettings, transport: Transport, conditions: LabelDropout
) -> FlowMatching:
    """Make the objective that other losses are put around."""
    return FlowMatching(
        transport.path,
        _make_time(settings, transport.training_interval),
        conditions,
        transport.prediction,
        WEIGHTS[settings.weight],
    )


def make_sampler(
    settings: TransportSampling,
    transport: Transport,
    noise: Float[Tensor, "..."],
    *,
    num_steps: int,
    normals: Iterator[Float[Tensor, "..."]],
) -> Steps:
    """Begin to sample: from noise to data, whatever the network predicts."""
    if settings.method not in ("sde_euler", "sde_heun"):
        times = even_times(transport.ode_interval, num_steps, shift=settings.shift)
        steps = solve_ode(settings, noise, times)
    else:
        last_step = 0.0 if settings.last == "none" else settings.last_step or 0.04
        interval = transport.sde_interval(settings.diffusion, last_step=last_step)
        times = even_times(interval, num_steps, shift=settings.shift)
        reverse = make_reverse(settings, transport.path)
        steps = solve_sde(settings, noise, times, reverse=reverse, normals=normals)
        if settings.last != "none":
            steps = sde.finish(steps, interval[1], make_last_step(settings, reverse))
    return from_prediction(steps, path=transport.path, prediction=transport.prediction)


def even_times(interval: Interval, num_steps: int, *, shift: float) -> Float[Tensor, " times"]:
    """Divide an interval evenly, then shift as `time_grid` does: above 1 is towards noise."""
    times = torch.linspace(*interval, num_steps + 1)
    return times / (times + (1 - times) * shift)


def make_reverse(settings: TransportSampling, path: Path) -> sde.Reverse:
    """Choose the diffusion of the SDE."""
    return sde.Reverse(path, partial(DIFFUSIONS[settings.diffusion], norm=settings.diffusion_norm))


def solve_ode(
    settings: TransportSampling, noise: Float[Tensor, "..."], times: Float[Tensor, " times"]
) -> Steps:
    """Follow the velocity along `times`; an adaptive method heeds the first and the last alone."""
    match settings.method:
        case "dopri5":
            start, end = times[0].item(), times[-1].item()
            jumps = [t for t in settings.guidance_interval if start < t < end]
            tolerance = Tolerance(settings.atol, settings.rtol)
            return dopri5(noise, (start, *jumps, end), tolerance=tolerance)
        case "euler":
            return euler(noise, times)
        case "heun":
            return heun(noise, times)
        case method:
            return runge_kutta(noise, times, TABLEAUS[method])


def solve_sde(
    settings: TransportSampling,
    noise: Float[Tensor, "..."],
    times: Float[Tensor, " times"],
    *,
    reverse: sde.Reverse,
    normals: Iterator[Float[Tensor, "..."]],
) -> Steps:
    """Follow the reverse SDE along `times`."""
    method = sde.euler_maruyama if settings.method == "sde_euler" else sde.stochastic_heun
    return method(noise, times, reverse=reverse, normals=normals)


def make_last_step(settings: TransportSampling, reverse: sde.Reverse) -> sde.LastStep:
    """Choose the step without noise that ends the SDE."""
    if settings.last == "ode":
        return sde.ode_step
    return partial(sde.mean_step if settings.last == "mean" else sde.tweedie_step, reverse=reverse)


def _make_time(settings: ObjectiveSettings, interval: Interval) -> TimeDistribution:
    logit_normal = LogitNormalTime(settings.time_mean)
    whole = logit_normal if settings.time == "logit_normal" else UniformTime()
    time = whole if interval == (0.0, 1.0) else Rescaled(whole, *interval)
    if settings.time_range is None:
        return time
    return Restricted(time, *settings.time_range, settings.time_range_prob)
