"""Reference cases of the transformer, and of schedules and other small functions."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tests.golden.case import Case, Outputs
from tests.golden.systems.dual_diffusion.parts import load_network
from udiff.diffusion.masked_text import (
    MaskTimes,
    by_importance,
    loss_weight,
    mask_chance,
    noise_rate,
    subs_log_probs,
    total_noise,
)
from udiff.models.dual_diffusion.network import DualDiffusion, TimeEmbedding
from udiff.models.dual_diffusion.objective import NUM_LEVELS, level_at, noise_level
from udiff.models.dual_diffusion.sampler import dynamic_mu, noise_levels
from udiff.samplers.unmask import first_to_finish

NEVER = -1e6


def forward(case: Case) -> Outputs:
    network, given, seen = load_network(case), case.inputs, {}
    watch(network, seen)
    x, t, text = given.get("hidden_states"), given["timestep"], given["encoder_hidden_states"]
    everywhere = torch.ones(text.shape[:2], dtype=torch.bool)
    logits = network(x, t, text=text, logits_at=everywhere).output.view(*text.shape[:2], -1)
    found = {"logits": logits, **seen}
    if x is None:
        return {**found, "image_stream": seen["inter/last_image"]}
    return {**found, "velocity": network(x, t, text=text).output}


def watch(network: DualDiffusion, seen: dict[str, Tensor]) -> None:
    """Keep what the parts give."""

    def keep(*names: str):
        def hook(_module, _inputs, output) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            seen.update(zip((f"inter/{name}" for name in names), outputs, strict=True))

        return hook

    network.time_text_embed.register_forward_hook(keep("temb"))
    network.context_embedder.register_forward_hook(keep("context_embed"))
    network.pos_embed.register_forward_hook(keep("patch_embed"))
    blocks = network.transformer_blocks
    blocks[0].register_forward_hook(keep("block0_text", "block0_image"))
    blocks[-1].register_forward_hook(keep("last_text", "last_image"))


def helpers(case: Case) -> Outputs:
    given, config = case.inputs, case.config
    return {
        **_mask_schedule(given),
        **_train_levels(given),
        **_inference_levels(given, config),
        **_subs(given),
        **_positions(given),
        "timestep_sinusoid": TimeEmbedding(8).time_proj(given["timestep_values"]),
        "cat_index": first_to_finish(given["cat_probs"], given["cat_uniform"]),
    }


def _mask_schedule(given: dict[str, Tensor]) -> dict[str, Tensor]:
    t, uniform = given["t"], given["antithetic_uniform"]
    rows = torch.arange(len(uniform))
    return {
        "sigma": total_noise(t),
        "dsigma": noise_rate(t),
        "move_chance": mask_chance(t),
        "loss_weight": loss_weight(given["t_pos"]),
        "antithetic_t": MaskTimes().at(uniform, rows, len(rows)),
        "antithetic_t_importance": by_importance(MaskTimes().at(uniform, rows, len(rows))),
        "importance_t": by_importance(given["t_pos"]),
    }


def _train_levels(given: dict[str, Tensor]) -> dict[str, Tensor]:
    level = noise_level(given["logit_normal_z"])
    grid = level_at(torch.arange(NUM_LEVELS))
    return {
        "logit_normal_u": given["logit_normal_z"].sigmoid(),
        "flow_index": ((1 - level) * NUM_LEVELS).round().long(),
        "flow_sigma": level,
        "flow_timestep": level * 1000,
        "train_sigmas": grid,
        "train_timesteps": grid * 1000,
    }


def _inference_levels(given: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    found = {}
    dynamic = {"use_dynamic_shifting": True, **config["dynamic"]}
    mu = dynamic.pop("mu")
    for name, scheduler, arguments in (
        ("shift1_10", {"shift": 1.0}, {"num_steps": 10}),
        ("shift3_28", {"shift": 3.0}, {"num_steps": 28}),
        ("shiftS_N", {"shift": config["shift"]}, {"num_steps": config["steps"]}),
        ("dynamic", dynamic, {"num_steps": config["steps"], "mu": mu}),
        (
            "custom",
            {"shift": config["custom_sigmas_shift"]},
            {"num_steps": 1, "sigmas": given["custom_sigmas"].tolist()},
        ),
    ):
        made = FlowMatchEulerDiscreteScheduler(**scheduler)
        levels = noise_levels(made, num_tokens=256, **arguments)
        found |= {
            f"infer_{name}/sigmas": levels.sigmas,
            f"infer_{name}/timesteps": levels.timesteps,
        }
    lengths = given["image_seq_len"].tolist()
    return {**found, "calculate_shift_mu": torch.tensor([dynamic_mu(n, {}) for n in lengths])}


def _subs(given: dict[str, Tensor]) -> dict[str, Tensor]:
    x_t, logits = given["subs_xt"], given["subs_logits"]
    mask_id = logits.shape[-1] - 1
    log_probs = dense_log_probs(logits, x_t, mask_id)
    masked, others = x_t == mask_id, x_t != mask_id
    own = log_probs[others].gather(1, x_t[others][:, None])[:, 0]
    return {
        "subs_logp_masked_rows": log_probs[masked],
        "subs_logp_unmasked_at_own": own,
        "subs_logp_unmasked_else": log_probs[others][:, [0, 5, mask_id]],
    }


def dense_log_probs(logits: Tensor, x_t: Tensor, mask_id: int) -> Tensor:
    """Write log probabilities of all tokens out: those that are known are certain."""
    known = torch.full_like(logits, NEVER).scatter(-1, x_t[..., None], 0.0)
    masked = (x_t == mask_id)[..., None]
    return torch.where(masked, subs_log_probs(logits, mask_id=mask_id), known)


def _positions(given: dict[str, Tensor]) -> dict[str, Tensor]:
    network = DualDiffusion(vocab_size=2, depth=1, text_dim=8)
    square = network.pos_embed.cropped_pos_embed(64, 64)[0]
    wide = network.pos_embed.cropped_pos_embed(40, 56)[0]
    return {
        "sd3_pos_512px_rows": square[given["sd3_pos_rows"]],
        "sd3_pos_nonsq_40x56_latent_rows": wide[[0, 27, 28, 559]],
    }


RUNNERS = {
    "forward_joint": forward,
    "forward_nonsquare": forward,
    "forward_text_only": forward,
    "helpers": helpers,
}
