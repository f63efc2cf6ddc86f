"""Reference cases of the samplers and of whole pipelines."""

from collections.abc import Callable

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from tests.golden.case import Case, Outputs
from tests.golden.systems.dual_diffusion.network import dense_log_probs
from tests.golden.systems.dual_diffusion.parts import (
    load_autoencoder,
    load_network,
    load_t5,
    text_states,
)
from udiff.autoencoders.pixels import to_pixels, to_uint8
from udiff.data.squares import bicubic
from udiff.models.dual_diffusion.sampler import Levels, descend, make_guidance, noise_levels
from udiff.models.dual_diffusion.text import TextNetwork
from udiff.samplers.ticks import drive
from udiff.samplers.unmask import LAST_TIME, mask_times, unmask
from udiff.system import Guidance, Query, Sampling, Steps


def watch(steps: Steps, keep: Callable[[Query, Tensor], None]) -> Steps:
    """Run a sampler, and keep its queries and their answers."""
    answer = None
    while True:
        try:
            query = steps.send(answer)
        except StopIteration as end:
            return end.value
        answer = yield query
        keep(query, answer)


# ---------------------------------------------------------------- pictures


def text_to_image(case: Case) -> Outputs:
    given = case.inputs
    latents, prompts = given["latents"], given["prompt_embeds"]
    return _sample_pictures(case, latents, prompts, given["negative_prompt_embeds"])


def pipeline_text_to_image(case: Case) -> Outputs:
    encoder, given = load_t5(case), case.inputs
    count = case.config["call"].get("num_images_per_prompt", 1)
    prompts, negatives = (
        encoder.encode(given[name]).repeat_interleave(count, 0)
        for name in ("prompt_ids", "negative_ids")
    )
    found = _sample_pictures(case, given["latents"], prompts, negatives)
    pixels = load_autoencoder(case).decode(found["latents"])
    return {**found, "image": pixels, "image_uint8": to_uint8(pixels).permute(0, 3, 1, 2)}


def _sample_pictures(
    case: Case, latents: Tensor, prompts: Tensor, negatives: Tensor
) -> dict[str, Tensor]:
    network, call = load_network(case), case.config["call"]
    levels = noise_levels(
        FlowMatchEulerDiscreteScheduler(**case.config.get("scheduler", {"shift": 3.0})),
        num_steps=call.get("num_inference_steps", 28),
        num_tokens=latents.shape[-2] * latents.shape[-1] // network.patch_size**2,
        sigmas=call.get("sigmas"),
        mu=call.get("mu"),
    )
    visited: list[list[tuple[Query, Tensor]]] = [[] for _ in latents]
    samplings = [
        Sampling(
            watch(descend(noise, levels), lambda q, a, kept=kept: kept.append((q, a))),
            {"text": prompt},
            {"text": negative},
            make_guidance(call.get("guidance_scale", 7.0)),
        )
        for noise, prompt, negative, kept in zip(latents, prompts, negatives, visited, strict=True)
    ]
    final = torch.stack(drive(network, samplings))
    return {"latents": final, **_trajectory(visited, final, levels)}


def _trajectory(
    visited: list[list[tuple[Query, Tensor]]], final: Tensor, levels: Levels
) -> dict[str, Tensor]:
    x = torch.stack([torch.stack([query.x for query, _ in row]) for row in visited], 1)
    velocity = torch.stack([torch.stack([answer for _, answer in row]) for row in visited], 1)
    asked = torch.tensor([query.t for query, _ in visited[0]])
    assert torch.equal(asked, levels.timesteps)
    return {
        "trajectory": torch.cat([x[1:], final[None]]),
        "guided_velocity": velocity,
        "timesteps": levels.timesteps,
        "sigmas": levels.sigmas,
    }


# ---------------------------------------------------------------- texts


def text(case: Case) -> Outputs:
    return _sample_texts(case, case.inputs["latents"])


def pipeline_image_to_text(case: Case) -> Outputs:
    given, call = case.inputs, case.config["call"]
    picture = Image.fromarray(given["image_uint8"].numpy())
    square = torch.from_numpy(bicubic(picture, call.get("resolution", 512)).copy())
    pixels = to_pixels(square[None])
    autoencoder = load_autoencoder(case)
    raw = autoencoder.encode_moments(pixels).sample(given["posterior_noise"])
    latents = autoencoder.normalize(raw)
    return {**_sample_texts(case, latents), "preprocessed": pixels, "latents": latents}


@torch.inference_mode()
def _sample_texts(case: Case, latents: Tensor) -> dict[str, Tensor]:
    config, given = case.config, case.inputs
    call = config.get("call", {})
    num_steps = config.get("num_steps", call.get("num_inference_steps", 64))
    mask_id = config["mask_index"]
    states, _, _ = text_states(case)
    rows = [_TextRow(case, row, num_steps) for row in range(len(given["ids"]))]
    samplings = [
        Sampling(row.steps, {"latent": latents[number]}, {}, Guidance())
        for number, row in enumerate(rows)
    ]
    network = TextNetwork(load_network(case), states, mask_id=mask_id)
    tokens = torch.stack(drive(network, samplings))
    first_x = torch.stack([row.asked[0][0].x for row in rows])
    first_logits = torch.stack([row.asked[0][1] for row in rows])
    # Officially the whole batch is asked again when a token of any of its rows was uncovered.
    calls = {query.t for row in rows for query, _ in row.asked}
    return {
        "tokens": tokens,
        "trajectory": torch.stack(
            [row.trajectory(final) for row, final in zip(rows, tokens, strict=True)], 1
        ),
        "logp_first": dense_log_probs(first_logits, first_x, mask_id),
        "num_model_calls": torch.tensor(len(calls)),
        "timesteps": mask_times(num_steps, config.get("eps", LAST_TIME)),
    }


class _TextRow:
    """One text being sampled with a case's numbers; keeps what was masked at each step."""

    def __init__(self, case: Case, number: int, num_steps: int) -> None:
        given, config = case.inputs, case.config
        uniforms = iter(given["gumbel_uniform"][:, number])
        self.asked: list[tuple[Query, Tensor]] = []
        self._masked: list[Tensor] = []
        self._mask_id = config["mask_index"]
        self._fills_rest = config.get("noise_removal", True)

        def race(masked: Tensor) -> Tensor:
            self._masked.append(masked)
            return next(uniforms)[masked]

        steps = unmask(
            given["ids"][number],
            given["prompt_mask"][number].bool(),
            mask_id=self._mask_id,
            num_steps=num_steps,
            race=race,
            method={"ddpm_cache": "cached", "ddpm": "plain"}[config.get("sampler", "ddpm_cache")],
            fill_rest=self._fills_rest,
            last_time=config.get("eps", LAST_TIME),
        )
        self.steps = watch(steps, lambda query, answer: self.asked.append((query, answer)))

    def trajectory(self, final: Tensor) -> Tensor:
        """Tell the ids after each step: tokens stay what they were uncovered to be."""
        last = self.asked[-1][0].x == self._mask_id if self._fills_rest else final == self._mask_id
        after = [*self._masked[1:], last]
        return torch.stack([final.masked_fill(masked, self._mask_id) for masked in after])


RUNNERS = {
    **{
        f"sampler_t2i{name}": text_to_image
        for name in ("", "_nocfg", "_sigmas", "_dynamic", "_mu")
    },
    "pipeline_t2i": pipeline_text_to_image,
    **{
        f"sampler_text_{name}": text
        for name in (
            "caption", "caption_long", "caption_b2", "ddpm", "no_cleanup", "vqa", "infill",
        )
    },
    "pipeline_i2t_vqa": pipeline_image_to_text,
    "pipeline_i2t_caption": pipeline_image_to_text,
}  # fmt: skip
