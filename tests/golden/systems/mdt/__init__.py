"""Reference cases of MDTv2 and MDT."""

from torch import Tensor

from tests.golden.case import Case, relative_error
from tests.golden.systems.mdt import (
    diffusion,
    evaluation,
    network,
    parts,
    sampling,
    training,
)


def tolerance(case: Case, output: str) -> float:
    if case.kind.startswith("eval_metrics"):
        return evaluation.tolerance(case, output)
    if case.kind.startswith("sampler_"):
        return 5e-5
    if output.startswith("ema1/"):
        return 5e-3
    return 2e-3 if output.startswith("param/") else 2e-5


def error(case: Case, output: str, ours: Tensor, theirs: Tensor) -> float:
    if case.kind.startswith("eval_metrics"):
        return evaluation.error(case, output, ours, theirs)
    plain = relative_error(ours, theirs)
    if not output.startswith(("param/", "ema1/")):
        return plain
    # Steps are small: their sum is compared too, and values 100 (250) times as strictly.
    before = case.weights[output.split("/", 1)[1]]
    strictness = tolerance(case, output) / 2e-5
    return max(strictness * plain, relative_error(ours - before, theirs - before))


RUNNERS = {
    "adan_steps": training.adan,
    "diffusion_schedules": diffusion.schedules,
    "gaussian_losses": diffusion.gaussian_losses,
    "helper_tables": parts.helper_tables,
    "loss_second_moment": diffusion.second_moment,
    "mdt_v1": training.mdt_v1,
    "mdtv2_forward_cfg": network.forward_cfg,
    "mdtv2_forward_ln_gelu_sensitive": network.forward_both,
    "mdtv2_forward_masked": network.forward_masked,
    "mdtv2_forward_odd_depth": network.forward_both,
    "mdtv2_forward_patch4_nosigma": network.forward_both,
    "mdtv2_forward_unmasked": network.forward,
    "mdtv2_train_loss": training.train_loss,
    "mdtv2_train_steps": training.train_steps,
    "sampler_ddim_cfg": sampling.sampler,
    "sampler_ddim_eta": sampling.sampler,
    "sampler_ddim_spaced_clip": sampling.sampler,
    "sampler_ddpm_cfg": sampling.sampler,
    "sampler_ddpm_cfg_low": sampling.sampler,
    "sampler_ddpm_nocfg_clip": sampling.sampler,
    **evaluation.RUNNERS,
}
