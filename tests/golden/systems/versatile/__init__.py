"""Reference cases of Versatile Diffusion."""

from torch import Tensor

from tests.golden.case import Case
from tests.golden.systems.versatile import clip, editing, network, optimus, sampling, training


def tolerance(case: Case, output: str) -> float:
    return {"04": 1e-4, "05": 2e-4, "06": 2e-4, "07": 2e-4, "17": 1e-4, "19": 1e-4}.get(
        case.kind[:2], 2e-5
    )


def error(case: Case, output: str, ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the standard deviation; over the value itself, of numbers."""
    if ours.shape != theirs.shape:
        return float("inf")
    if not theirs.is_floating_point():
        return 0.0 if ours.equal(theirs) else float("inf")
    ours, theirs = ours.double(), theirs.double()
    scale = theirs.std() if theirs.numel() > 1 else theirs.abs()
    worst = ((ours - theirs).abs().max() / scale.clamp_min(1e-30)).item()
    return worst if worst == worst else float("inf")  # noqa: PLR0124 (not a number)


RUNNERS = {
    "01a_image_flows_forward": network.forward,
    "01b_text_flows_forward": network.forward,
    "02_unet2d_deep": network.forward_text_context,
    "03_unet0d_deep": network.forward,
    "04a_train_image_flows": training.losses,
    "04b_train_text_flows": training.losses,
    "05a_ddim_image_flows": sampling.flows,
    "05b_ddim_text_flows": sampling.flows,
    "06a_ddim_options_image": sampling.options,
    "06b_ddim_options_text": sampling.options,
    "07_ddim_multicontext": sampling.multi_context,
    "08_schedules": sampling.schedules,
    "09_timestep_embedding": network.timestep_embedding,
    "10_autokl": editing.autoencoder,
    "11_optimus_bert": optimus.encoder,
    "12_optimus_gpt2": optimus.decoder,
    "13_optimus_vae": optimus.autoencoder,
    "14_optimus_tokens": optimus.tokens,
    "15_clip_contexts": clip.contexts,
    "16_text_postprocess": editing.captions,
    "17_focus_rank": editing.low_rank,
    "18_color": editing.colors,
    "19_i2t2i": editing.image_text_image,
    "20_vd_dc_forward": network.dual_context,
    "21_vd_legacy_forward": network.first_release,
    "22_unet2d_wide": network.forward_text_context,
}
