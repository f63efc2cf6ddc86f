"""MDTv2 and MDT: keys, conversions, recipes, the masked pass, and what can be sampled."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from udiff.models.mdtv2.checkpoint import convert_in, convert_out, network_from_official
from udiff.models.mdtv2.network import MaskedTransformer
from udiff.models.mdtv2.recipe import Recipe
from udiff.recipe import RecipeError, load_recipe, parse_recipe
from udiff.samplers.ticks import drive
from udiff.system import Rng
from udiff.weights import WeightsError

CASES = Path(__file__).parents[1] / "golden" / "cases" / "mdt"
FULL_KEYS: dict[str, dict[str, list[int]]] = json.loads((CASES / "full_keys.json").read_text())
PARAMETERS = {
    "MDTv2_XL_2": 742_263_904,
    "MDTv2_L_2": 507_015_776,
    "MDTv2_B_2": 150_931_856,
    "MDTv2_S_2": 38_454_872,
    "MDT_XL_2": 699_778_144,
    "MDT_L_2": 477_641_312,
    "MDT_B_2": 141_488_528,
    "MDT_S_2": 35_797_208,
}
TINY = {
    1: {"model": "MDT", "depth": 5, "decode_layer": 2},
    2: {"model": "MDTv2", "depth": 6, "decode_layer": 2},
}


def _tiny(version: int) -> MaskedTransformer:
    sizes = {"input_size": 8, "hidden_size": 32, "num_heads": 4, "num_classes": 10}
    torch.manual_seed(0)
    network = network_from_official({**sizes, **TINY[version]})
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.eval()


def _recipe(*overrides: str) -> Recipe:
    tiny = ["network.dim=32", "network.depth=4", "sampling.num_steps=3"]
    recipe = load_recipe("mdtv2/debug", [*tiny, *overrides])
    assert isinstance(recipe, Recipe)
    return recipe


def _question() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x_t": torch.randn(3, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([0, 500, 999]),
        "label": torch.tensor([0, 9, 10]),
    }


def _batch(num_rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    mean = torch.randn(num_rows, 4, 8, 8, generator=generator)
    label = torch.arange(num_rows) % 10
    return {"latent_mean": mean, "latent_logvar": torch.full_like(mean, -6), "label": label}


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", [name for name in FULL_KEYS if name != "_notes"])
def test_keys_are_those_of_the_published_network(name: str) -> None:
    model, _, decode_layer = name.partition(".dl")
    with torch.device("meta"):
        network = network_from_official({"model": model, "decode_layer": int(decode_layer or 2)})
    ours = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    assert ours == FULL_KEYS[name]
    assert list(ours) == list(FULL_KEYS[name])
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[model]


@pytest.mark.parametrize("version", TINY)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"ema": weights, "model": {"other": torch.zeros(1)}},
        lambda weights: {"model": weights, "step": 3},
        lambda weights: {"state_dict": {f"module.{k}": t for k, t in weights.items()}},
        lambda weights: {f"_orig_mod.{k}": t for k, t in weights.items()},
    ],
)
def test_weights_go_in_and_out_bit_for_bit(version: int, wrap) -> None:
    weights = _tiny(version).state_dict()
    keys, ours = convert_in(wrap(weights), None)
    recipe = parse_recipe(keys, source="converted")
    system = recipe.build()
    nn.ModuleDict(system.modules).load_state_dict(ours, strict=True)
    back = convert_out(recipe, ours)
    assert list(back) == list(weights)
    assert all(torch.equal(back[key], tensor) for key, tensor in weights.items())
    assert recipe.network.version == version
    assert recipe.network.num_decoder_blocks == TINY[version]["decode_layer"]


def test_an_incomplete_checkpoint_is_refused_with_its_keys() -> None:
    weights = _tiny(2).state_dict()
    del weights["mask_token"]
    weights["surplus"] = torch.zeros(1)
    with pytest.raises(WeightsError, match=r"missing keys \['mask_token'\].*\['surplus'\]"):
        convert_in(weights, None)


def test_a_checkpoint_that_contradicts_its_config_is_refused() -> None:
    with pytest.raises(WeightsError, match="pos_embed"):
        convert_in(_tiny(2).state_dict(), {"hidden_size": 64})


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("version", TINY)
def test_keeping_all_tokens_in_any_order_changes_nothing(version: int) -> None:
    network, question = _tiny(version), _question()
    keep = torch.rand(3, 16, generator=torch.Generator().manual_seed(3)).argsort(1)
    with torch.no_grad():
        plain, kept = network(**question).output, network(**question, keep=keep).output
    torch.testing.assert_close(kept, plain, rtol=1e-4, atol=1e-5)


def test_the_encoder_does_not_see_the_tokens_that_were_dropped() -> None:
    network, question = _tiny(1), _question()  # version 2 shows them to its decoder
    keep = torch.arange(8).expand(3, -1)
    changed = {**question, "x_t": question["x_t"].clone()}
    changed["x_t"][:, :, 4:] += 1
    with torch.no_grad():
        before, after = (network(**q, keep=keep).output for q in (question, changed))
    assert torch.equal(before, after)


@pytest.mark.parametrize("version", TINY)
def test_only_a_masked_pass_learns_the_side_interpolater(version: int) -> None:
    network, question = _tiny(version), _question()
    network(**question).output.sum().backward()
    assert network.mask_token.grad is None
    network(**question, keep=torch.arange(9).expand(3, -1)).output.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_attention_is_the_same_with_and_without_gradients() -> None:
    network, question = _tiny(2), _question()
    with torch.no_grad():
        fused = network(**question).output
    torch.testing.assert_close(network(**question).output, fused, rtol=1e-4, atol=1e-5)


def test_the_first_output_is_zero() -> None:
    network = _recipe().build().modules["denoiser"]
    assert not network(**_question()).output.any()


def test_a_feature_is_what_a_block_leaves() -> None:
    network, question = _tiny(2), _question()
    shapes = {layer: network(**question, feature_layer=layer).feature.shape for layer in (1, 6)}
    assert set(shapes.values()) == {(3, 16, 32)}
    with pytest.raises(ValueError, match=r"feature_layer must be one of .*6\]; got 7"):
        network(**question, feature_layer=7)


# ---------------------------------------------------------------- training


def test_both_passes_share_timesteps_and_nothing_else_that_is_drawn() -> None:
    phase = _recipe().build().phases[0]
    draws = phase.draw(_batch(64), Rng(0).at(0))
    assert "masked_timestep" not in draws
    assert not torch.equal(draws["noise"], draws["masked_noise"])
    assert not torch.equal(draws["label"], draws["masked_label"])
    assert 0.3 <= float(draws["mask_ratio"]) < 0.5
    assert draws["mask_ratio"].ndim == 0


def test_two_ranks_draw_what_one_draws() -> None:
    phase, batch = _recipe().build().phases[0], _batch(8)
    whole = phase.draw(batch, Rng(0).at(5))
    for rank in range(2):
        rows = {name: column[rank::2] for name, column in batch.items()}
        part = phase.draw(rows, Rng(0, rank=rank, world_size=2).at(5))
        for name, draw in part.items():
            assert torch.equal(draw, whole[name][rank::2] if draw.ndim else whole[name])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["objective.mask_ratio=null"],
        ["objective.timesteps=loss_second_moment"],
        ["objective.variance=fixed"],
        ["network.version=1", "objective.mask_ratio_width=0", "objective.snr_cap=null"],
    ],
)
def test_every_objective_gives_every_parameter_a_gradient(overrides: list[str]) -> None:
    system = _recipe(*overrides).build()
    phase, batch = system.phases[0], _batch(6)
    losses = phase.loss(batch, phase.draw(batch, Rng(0).at(0)))
    losses.total.backward()
    parameters = [p for p in system.modules["denoiser"].parameters() if p.requires_grad]
    assert all(p.grad is not None for p in parameters)
    assert math.isfinite(losses.total)


def test_accumulated_micro_batches_of_the_loss_add_up() -> None:
    phase, batch = _recipe().build().phases[0], _batch(8)
    draws = phase.draw(batch, Rng(0).at(0))
    cuts = [slice(0, 4), slice(4, 8)]

    def cut(rows: slice) -> dict[str, Tensor]:
        return {name: draw[rows] if draw.ndim else draw for name, draw in draws.items()}

    parts = [phase.loss({k: v[r] for k, v in batch.items()}, cut(r)).total for r in cuts]
    torch.testing.assert_close(sum(parts) / 2, phase.loss(batch, draws).total)


# ---------------------------------------------------------------- sampling


def _sample(recipe: Recipe, requests: list[dict[str, Any]]) -> list[Tensor]:
    task = recipe.build().tasks["class_to_image"]
    torch.manual_seed(0)
    for parameter in task.network.parameters():
        nn.init.normal_(parameter, std=0.05)
    device = torch.device("cpu")
    return drive(
        task.network, [task.start(task.request(**each), device=device) for each in requests]
    )


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_seed_gives_its_picture_whatever_else_is_sampled(sampler: str) -> None:
    recipe = _recipe(f"sampling.sampler={sampler}")
    requests = [{"label": 3, "seed": 7}, {"label": 4, "seed": 8, "num_steps": 5}]
    alone = _sample(recipe, requests[:1])[0]
    beside = _sample(recipe, requests)[0]
    assert alone.shape == (4, 8, 8)
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(_sample(recipe, [{"label": 3, "seed": 9}])[0], alone)


@pytest.mark.parametrize(
    ("request_keys", "message"),
    [({"label": 10}, r"label must be in 0..9, got 10"), ({"label": 1}, "guidance_scale must be 1")],
)
def test_an_impossible_request_is_refused(request_keys: dict[str, Any], message: str) -> None:
    recipe = _recipe("objective.label_dropout_prob=0")
    request = {"guidance_scale": 2.0 if request_keys["label"] == 1 else 1.0, **request_keys}
    with pytest.raises(ValueError, match=message):
        _sample(recipe, [request])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("network.depth=5", "network: depth 5 less num_decoder_blocks 2 is the encoder"),
        ("network.num_heads=3", "dim 32 must be a multiple of num_heads"),
        ("latent.height=12", "latents must be square, got 12 x 8"),
        ("objective.mask_ratio=0.9", "must be below 1"),
        ("network.patch_size=3", "latent.height 8 must be a multiple of network.patch_size 3"),
        ("optimizer.name=sgd", "optimizer: name must be adamw or adan"),
        ("optimizer.proximol=true", "did you mean proximal?"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        _recipe(override)
