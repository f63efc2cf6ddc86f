"""Reference cases of the networks, plain, masked and guided."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from tests.golden.case import Case, Outputs
from udiff.diffusion.masked_pass import (
    FixedMaskRatio,
    MaskRatio,
    UniformMaskRatio,
    num_kept,
)
from udiff.models.mdtv2.checkpoint import convert_in
from udiff.models.mdtv2.guidance import PowerCosine
from udiff.models.mdtv2.network import MaskedTransformer
from udiff.models.mdtv2.recipe import Recipe
from udiff.nn.token_mask import is_removed, kept_tokens
from udiff.samplers.ticks import drive
from udiff.system import Guidance, Query, Sampling, Steps
from udiff.weights import load_strictly, strip_prefix


def build_network(case: Case) -> MaskedTransformer:
    """Import the weights as `jobs.convert` does, and build what the recipe says."""
    keys, weights = convert_in(case.weights, case.config)
    network = Recipe.model_validate(keys).build_network()
    load_strictly(network, strip_prefix(weights, "denoiser."), source=case.name)
    return network.eval()


def forward(case: Case) -> Outputs:
    network, given = build_network(case), case.inputs
    seen: dict[str, Tensor] = {}
    _record_blocks(network, seen)
    network.final_layer.register_forward_hook(_keep(seen, "final_layer"))
    stem = torch.stack([network.t_embedder(given["t"]), network.y_embedder(given["y"])])
    output = network(given["x"], given["t"], label=given["y"]).output
    decoder_in = seen["encoder_out"] + network.decoder_pos_embed
    tokens = network.x_embedder(given["x"]) + network.pos_embed
    found = {"output": output, "tokens": tokens, "c": stem.sum(0), "decoder_in": decoder_in}
    return {**seen, **found, "n_blocks": _count_blocks(network)}


def forward_masked(case: Case) -> Outputs:
    network, given = build_network(case), case.inputs
    seen: dict[str, Tensor] = {}
    _record_blocks(network, seen)
    network.final_layer.register_forward_hook(_keep(seen, "final_layer"))
    network.sideblocks[0].register_forward_pre_hook(
        lambda _module, inputs: seen.__setitem__("side_in", inputs[0])
    )
    first = next(iter(network.all_blocks))
    first.register_forward_pre_hook(
        lambda _module, inputs: seen.__setitem__("tokens_kept", inputs[0])
    )
    keep, ratio = _keep_ids(case)
    output = network(given["x"], given["t"], label=given["y"], keep=keep).output
    removed = is_removed(keep, given["mask_noise"].shape[1])
    blended = torch.where(removed[:, :, None], seen["sideblocks.0"], seen["side_in"])
    return {
        **seen,
        "output": output,
        "mask_ratio": ratio,
        "len_keep": torch.tensor(keep.shape[1]),
        "ids_keep": keep,
        "ids_restore": given["mask_noise"].argsort(1).argsort(1),
        "mask": removed.float(),
        "side_out": blended,
    }


def forward_both(case: Case) -> Outputs:
    network, given = build_network(case), case.inputs
    ask = partial(network, given["x"], given["t"], label=given["y"])
    plain = {"output": ask().output, "n_blocks": _count_blocks(network)}
    if "mask_noise" not in given:
        return {**plain, "output_enable_mask": ask().output}
    return {**plain, "output_masked": ask(keep=_keep_ids(case)[0]).output}


def forward_cfg(case: Case) -> Outputs:
    network, given = build_network(case), case.inputs
    half = len(given["x"]) // 2
    x = torch.cat([given["x"][:half]] * 2)
    found: dict[str, Tensor] = {}
    for number, call in enumerate(case.config["calls"]):
        scale = guidance_scale(call["cfg_scale"], call["scale_pow"], call["diffusion_steps"])
        samplings = [_ask_once(case, x[row], row, scale) for row in range(2 * half)]
        found[f"output_{number}"] = torch.stack(drive(network, samplings))
        grid = [scale(float(t)) for t in given["t_grid"]]
        found[f"scale_{number}"] = torch.tensor(grid)
    plain = network(given["x"], given["t"], label=given["y"]).output
    return {**found, "output_nocfg": plain}


def _ask_once(case: Case, x: Tensor, row: int, scale: PowerCosine) -> Sampling:
    """Guide one row; the published code guides the unconditional half too, seen from its side."""

    def steps() -> Steps:
        return (yield Query(x, float(case.inputs["t"][row])))

    label, half = case.inputs["y"], len(case.inputs["y"]) // 2
    schedule: Callable[[float], float] = scale if row < half else lambda t: 1 - scale(t)
    conditions = {"label": label[row]}
    null_conditions = {"label": label[(row + half) % (2 * half)]}
    return Sampling(steps(), conditions, null_conditions, Guidance(schedule=schedule, channels=3))


def guidance_scale(scale: float, power: float, num_timesteps: int) -> PowerCosine:
    return PowerCosine(float(scale), float(power), num_timesteps)


def _keep_ids(case: Case) -> tuple[Tensor, Tensor]:
    noise = case.inputs["mask_noise"]
    ratio = mask_ratio(case).draw(torch.Generator())
    if "mask_rand" in case.inputs:
        ratio = mask_ratio(case).at(case.inputs["mask_rand"])
    return kept_tokens(noise, num_kept(noise.shape[1], ratio)), ratio


def mask_ratio(case: Case) -> MaskRatio:
    ratio = float(case.config["mask_ratio"])
    return FixedMaskRatio(ratio) if case.kind == "mdt_v1" else UniformMaskRatio(ratio, 0.2)


def _record_blocks(network: MaskedTransformer, seen: dict[str, Tensor]) -> None:
    lists = ("blocks", "en_inblocks", "en_outblocks", "de_blocks", "sideblocks")
    for name, block in network.named_modules():
        if name.split(".")[0] in lists and name.count(".") == 1:
            block.register_forward_hook(_keep(seen, name))
    last = getattr(network, "en_outblocks", getattr(network, "blocks", None))[-1]
    last.register_forward_hook(_keep(seen, "encoder_out"))


def _keep(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
    def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        seen[name] = output

    return hook


def _count_blocks(network: MaskedTransformer) -> Tensor:
    lists = ("en_inblocks", "en_outblocks", "de_blocks", "sideblocks")
    return torch.tensor([len(getattr(network, name, ())) for name in lists])
