"""Reference cases of Dual Diffusion."""

from torch import Tensor

from tests.golden.case import Case, relative_error
from tests.golden.systems.dual_diffusion import data, network, sampling, training


def tolerance(case: Case, output: str) -> float:
    if output == "image_uint8":
        return 1.0
    if output.startswith(("grad", "param", "ema")):
        return 2e-5
    if case.kind.startswith(("sampler_t2i", "pipeline_t2i")):
        return 1e-3 if case.config["call"].get("sigmas") else 1e-4
    return 1e-6 if case.kind == "image_preprocess" else 1e-5


def error(case: Case, output: str, ours: Tensor, theirs: Tensor) -> float:
    if output == "image_uint8":  # in levels
        return (ours.int() - theirs.int()).abs().max().item()
    return relative_error(ours, theirs)


RUNNERS = {**network.RUNNERS, **training.RUNNERS, **sampling.RUNNERS, **data.RUNNERS}
