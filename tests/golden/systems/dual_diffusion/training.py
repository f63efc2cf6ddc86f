"""Reference cases of the losses and of joint training."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tests.golden.case import Case, Outputs
from tests.golden.systems.dual_diffusion.parts import gradients, load_network, text_states
from udiff.diffusion.masked_text import MaskedText, MaskTimes
from udiff.diffusion.weighted_sum import Part, WeightedSum
from udiff.models.dual_diffusion.network import DualDiffusion
from udiff.models.dual_diffusion.objective import ImageFlow
from udiff.models.dual_diffusion.text import TextStates, bind_text_head
from udiff.settings import AdamWSettings, EmaSettings
from udiff.system import Batch, Draws, LocalRng, Prediction, Rng, StepRng
from udiff.training.ema import Ema
from udiff.training.optimizer import clip_gradients, learning_rate, make_optimizer


class GivenRng(LocalRng):
    """Hands out the case's draws in place of fresh ones."""

    def __init__(self, draws: Iterator[Tensor]) -> None:
        super().__init__(torch.Generator(), 0, 1)
        object.__setattr__(self, "draws", draws)

    def normal(self, num_rows: int, *shape: int) -> Tensor:
        return next(self.draws)

    uniform = normal


def given_rng(*draws: Tensor) -> StepRng:
    return replace(Rng(0).at(0), local=GivenRng(iter(draws)))


def _image_flow(null: Tensor, dropout: float) -> ImageFlow:
    def text(batch: Batch, draws: Draws) -> Tensor:
        return torch.where(draws["is_dropped"][:, None, None], null, batch["text"])

    return ImageFlow(text, dropout)


def loss_image(case: Case) -> Outputs:
    network, given = load_network(case), case.inputs
    objective = _image_flow(given["null_embeds"], case.config["text_dropout"])
    z = given["z_logit_normal"] * case.config.get("logit_std", 1.0)
    z = z + case.config.get("logit_mean", 0.0)
    rng = given_rng(given["noise"], z, given["dropout_uniform"])
    batch = {"latent": given["latents"], "text": given["text_embeds"]}
    seen: dict[str, Tensor] = {}

    def record(x_t: Tensor, t: Tensor, *, text: Tensor) -> Prediction:
        prediction = network(x_t, t, text=text)
        seen.update(noisy_latents=x_t, timestep=t, text_used=text, velocity=prediction.output)
        return prediction

    loss = objective(record, batch, objective.draw(batch, rng)).total
    loss.backward()
    return {**seen, "loss": loss, **gradients(network)}


def loss_text(case: Case) -> Outputs:
    network, given, config = load_network(case), case.inputs, case.config
    is_learned = not config.get("disable_t5_grad", True)
    states, row, encoder = text_states(case, is_learned=is_learned)
    table = encoder.model.get_input_embeddings().weight.requires_grad_(is_learned)
    seen: dict[str, Tensor] = {}

    def record(x_t: Tensor | None, t: Tensor, *, text: Tensor, logits_at: Tensor) -> Prediction:
        everywhere = torch.ones_like(logits_at)
        logits = network(x_t, t, text=text, logits_at=everywhere).output
        seen.update(logits=logits.view(*text.shape[:2], -1), timestep=t, text_states=text)
        return network(x_t, t, text=text, logits_at=logits_at)

    objective = _masked_text(case, states)
    batch = {"text_tokens": given["input_ids"], "text_learned": given["label_mask"]}
    batch["latent"] = given.get("latents")
    draws = objective.draw(batch, given_rng(given["t_uniform"], given["mask_uniform"]))
    loss = objective(record, batch, draws).total
    loss.backward()
    if is_learned:  # the row of the mask is looked up beside the table
        grad = table.grad.clone()
        grad[config["mask_index"]] += row.weight.grad
        seen["grad_text_encoder/shared.weight"] = grad
    return {**seen, "xt": objective.mask(batch, draws)[0], "loss": loss, **gradients(network)}


def _masked_text(case: Case, states: TextStates) -> MaskedText:
    config = case.config
    return MaskedText(
        partial(bind_text_head, states),
        mask_id=config["mask_index"],
        column="text",
        times=MaskTimes(
            is_antithetic=config.get("antithetic_sampling", True),
            minimum=config.get("sampling_eps", 1e-3),
        ),
        padding="ignored" if config.get("ignore_padding") else "learned",
    )


def train_steps(case: Case) -> Outputs:
    network, config = load_network(case), case.config
    states, _, _ = text_states(case)
    image, text = _image_flow(case.inputs["null_embeds"], 0.1), _masked_text(case, states)
    objective = WeightedSum(
        image=Part(image.draw, partial(image, network)),
        text=Part(text.draw, partial(text, network), config["caption_training_weight"]),
    )
    names = ("lr", "betas", "weight_decay", "eps")
    settings = AdamWSettings(
        **{name: config[name] for name in names},
        warmup_steps=config["num_warmup_steps"],
        warmup_start=0,
        clip_norm=config["grad_clip"],
    )
    network.null_image_embd.requires_grad_(False)  # always with a picture
    optimizer = make_optimizer([network], settings)
    start = config["ema_steps"]
    ema = Ema({"ema": network}, EmaSettings(decay=config["ema_decay"], first_step=start))
    found: dict[str, list[Tensor]] = {}
    for step in range(config["steps"]):
        values = _accumulate(case, objective, step)
        values["grad_norm"] = clip_gradients(optimizer, settings.clip_norm)
        lr = learning_rate(settings, step, config["steps"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step)
        for name, value in {**values, "lr": torch.tensor(lr)}.items():
            found.setdefault(name, []).append(value.detach())
    return {
        **{name: torch.stack(values) for name, values in found.items()},
        **_summarize(network, ema),
    }


def _accumulate(case: Case, objective: WeightedSum, step: int) -> dict[str, Tensor]:
    """Add gradients and losses of the micro-batches up, as the published loop does."""
    sums = {"image_loss": torch.zeros(()), "text_loss": torch.zeros(())}
    for part in range(case.config["micro_batches"]):
        prefix = f"step{step}_mb{part}/"
        given = {k.removeprefix(prefix): v for k, v in case.inputs.items() if prefix in k}
        batch = {
            "image.latent": given["latents"],
            "image.text": given["text_embeds"],
            "text.latent": given["caption_latents"],
            "text.text_tokens": given["caption_ids"],
        }
        order = ("noise", "z_logit_normal", "dropout_uniform", "t_uniform", "mask_uniform")
        losses = objective(batch, objective.draw(batch, given_rng(*(given[n] for n in order))))
        losses.total.backward()
        sums["image_loss"] += losses.terms["image_data_mse"].detach()
        sums["text_loss"] += losses.terms["text_masked_nll"].detach()
    return sums


def _summarize(network: DualDiffusion, ema: Ema) -> dict[str, Tensor]:
    parameters = dict(network.named_parameters())
    sums = [parameters[name].abs().sum() for name in sorted(parameters)]
    return {
        **{f"param/{name}": p for name, p in parameters.items()},
        **{key.replace("ema.", "ema/", 1): value for key, value in ema.averages.items()},
        "param_sum_abs": torch.stack(sums),
    }


RUNNERS = {
    "loss_image": loss_image,
    **{f"loss_text_{name}": loss_text for name in ("pretrain", "sft", "t5grad", "no_image")},
    "train_steps": train_steps,
}
