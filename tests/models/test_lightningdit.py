"""LightningDiT: its keys, its conversions, its recipes and what it can sample."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from udiff.diffusion.conditions import LabelDropout
from udiff.diffusion.direction import VelocityDirection
from udiff.diffusion.flow_matching import FlowMatching
from udiff.diffusion.path import LinearPath
from udiff.diffusion.time import LogitNormalTime
from udiff.models.lightningdit.checkpoint import convert_in, convert_out, network_from_official
from udiff.models.lightningdit.network import Layers, LightningDiT
from udiff.models.lightningdit.official_config import (
    PUBLISHED_SIZES,
    official_config,
    recipe_keys_from_official,
)
from udiff.models.lightningdit.recipe import Recipe, guidance_from
from udiff.recipe import load_recipe, parse_recipe, recipe_names
from udiff.samplers.ticks import drive
from udiff.settings import AutoencoderSettings
from udiff.system import Guidance, Rng
from udiff.weights import WeightsError

CASES = Path(__file__).parents[1] / "golden" / "cases" / "lightningdit"
FULL_KEYS: dict[str, dict[str, list[int]]] = json.loads((CASES / "full_keys.json").read_text())
RECIPES = [name for name in recipe_names() if name.startswith("lightningdit/")]
RELEASE = {"use_swiglu": True, "use_rope": True, "use_rmsnorm": True}
PARAMETERS = {"b": 130.56, "l": 458.15, "xl": 675.26, "1p0b": 1029.40, "1p6b": 1631.77}
TINY = [
    "network.dim=32",
    "network.num_heads=2",
    "network.depth=2",
    "sampling.num_steps=4",
    "sampling.guidance_scale=2.0",
]


def _tiny(*overrides: str) -> Recipe:
    recipe = load_recipe("lightningdit/debug", [*TINY, *overrides])
    assert isinstance(recipe, Recipe)
    return recipe


def _arguments(name: str) -> dict[str, Any]:
    model, _, notes = name.removeprefix("LightningDiT-").partition(" ")
    size, _, patch_size = model.partition("/")
    depth, dim, num_heads = PUBLISHED_SIZES[size]
    vanilla = "vanilla" in notes
    return {
        "input_size": 32 if vanilla else 16,
        "in_channels": 4 if vanilla else 32,
        "patch_size": int(patch_size),
        "hidden_size": dim,
        "depth": depth,
        "num_heads": num_heads,
        "use_qknorm": "qknorm" in notes,
        "wo_shift": "wo_shift" in notes,
        **({} if vanilla else RELEASE),
    }


# ---------------------------------------------------------------- keys and sizes


@pytest.mark.parametrize("name", FULL_KEYS)
def test_keys_are_the_official_ones(name: str) -> None:
    with torch.device("meta"):
        network = network_from_official(_arguments(name))
    ours = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    assert ours == FULL_KEYS[name]


@pytest.mark.parametrize("name", [name for name in RECIPES if "/debug" not in name])
def test_recipes_have_the_published_number_of_parameters(name: str) -> None:
    size = name.removeprefix("lightningdit/").split("_")[0][:-1]
    with torch.device("meta"):
        network = load_recipe(name).build_network()
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    assert millions == pytest.approx(PARAMETERS[size], abs=0.005)


def test_a_new_network_predicts_zero() -> None:
    network = _tiny().build_network()
    prediction = network(torch.randn(2, 4, 8, 8), torch.rand(2), label=torch.tensor([1, 10]))
    assert prediction.output.abs().max() == 0


# ---------------------------------------------------------------- conversions


def _weights(recipe: Recipe) -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = recipe.build_network().state_dict()
    return {key: torch.randn_like(tensor) for key, tensor in state.items()}


def _wrappings(weights: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    other = {key: torch.zeros_like(tensor) for key, tensor in weights.items()}
    return {
        "bare": weights,
        "ema": {"ema": weights, "model": other, "opt": {}, "config": None},
        "model": {"model": weights},
        "state_dict": {"state_dict": weights},
        "ddp": {"model": {f"module.{key}": tensor for key, tensor in weights.items()}},
        "compiled": {"ema": {f"_orig_mod.{key}": tensor for key, tensor in weights.items()}},
        "both": {f"module._orig_mod.{key}": tensor for key, tensor in weights.items()},
    }


@pytest.mark.parametrize(
    "wrapping", ["bare", "ema", "model", "state_dict", "ddp", "compiled", "both"]
)
def test_weights_go_in_and_out_bit_for_bit(wrapping: str) -> None:
    weights = _weights(_tiny())
    converted = convert_in(_wrappings(weights)[wrapping], None)
    recipe = parse_recipe(converted.recipe_keys, source="test")
    out = convert_out(recipe, converted.weights)
    for name in ("model", "ema"):
        assert out[name].keys() == weights.keys()
        assert all(torch.equal(out[name][key], weights[key]) for key in weights)


@pytest.mark.parametrize(
    "overrides",
    [
        ["network.qk_norm=true"],
        ["network.norm=layer", "network.qk_norm=true"],
        ["network.feed_forward=gelu", "network.shift=false"],
        ["network.learn_sigma=true", "network.patch_size=1"],
    ],
)
def test_a_network_is_read_off_its_weights(overrides: list[str]) -> None:
    recipe = _tiny(*overrides)
    keys = convert_in(_weights(recipe), None).recipe_keys
    assert parse_recipe(keys, source="test").network == recipe.network


def test_missing_and_unknown_keys_are_listed() -> None:
    weights = _weights(_tiny())
    del weights["blocks.1.attn.proj.bias"]
    weights["blocks.1.surplus"] = torch.zeros(1)
    with pytest.raises(WeightsError, match=r"blocks\.1\.attn\.proj\.bias.*blocks\.1\.surplus"):
        convert_in(weights, None)


def test_what_is_no_checkpoint_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"not tensors.*opt"):
        convert_in({"opt": {}}, None)
    with pytest.raises(WeightsError, match="no LightningDiT"):
        convert_in({"weight": torch.zeros(1)}, None)


@pytest.mark.parametrize("name", [name for name in RECIPES if "/debug" not in name])
def test_official_configurations_go_out_and_in(name: str) -> None:
    recipe = load_recipe(name)
    assert isinstance(recipe, Recipe)
    back = parse_recipe(recipe_keys_from_official(official_config(recipe)), source="test")
    assert back == recipe


def test_official_yaml_takes_its_own_defaults() -> None:
    config = {"model": {"model_type": "LightningDiT-XL/1"}, "data": {"image_size": 256}}
    recipe = parse_recipe(recipe_keys_from_official(config), source="test")
    assert recipe.latent.channels == 4
    assert recipe.network.norm == "layer"
    assert recipe.autoencoder.multiplier == 0.18215
    mean, std = recipe.autoencoder.statistics(4)
    assert (mean[0], std[0]) == (0.0, pytest.approx(1 / 0.18215))


def test_unknown_official_keys_are_listed() -> None:
    config = {"model": {"model_type": "LightningDiT-XL/1", "use_ropes": True}, "trian": {}}
    with pytest.raises(ValueError, match=r"model\.use_ropes.*trian"):
        recipe_keys_from_official(config)


def test_what_official_code_lacks_is_not_exported() -> None:
    recipe = load_recipe("lightningdit/xl1_256", ["objective.direction.weight=0.5"])
    with pytest.raises(ValueError, match="objective can't be said"):
        official_config(recipe)


# ---------------------------------------------------------------- training


def test_features_are_tokens_after_a_block() -> None:
    network = _tiny().build_network()
    seen: list[Tensor] = []
    network.blocks[0].register_forward_hook(lambda _m, _a, out: seen.append(out))
    given = (torch.randn(2, 4, 8, 8), torch.rand(2))
    label = torch.tensor([1, 2])
    assert torch.equal(network(*given, label=label, feature_layer=1).feature, seen[0])
    assert network(*given, label=label).feature is None
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        network(*given, label=label, feature_layer=3)


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("prediction", ["velocity", "noise", "data", "score"])
def test_every_objective_has_finite_gradients(path: str, prediction: str) -> None:
    system = _tiny(f"objective.path={path}", f"objective.prediction={prediction}").build()
    phase = system.phases[0]
    batch = {
        "latent_mean": torch.randn(8, 4, 8, 8),
        "latent_logvar": torch.zeros(8, 4, 8, 8),
        "label": torch.zeros(8, dtype=torch.long),
    }
    losses = phase.loss(batch, phase.draw(batch, Rng(0).at(0)))
    losses.total.backward()
    assert set(losses.terms) == {f"{prediction}_mse", "velocity_direction"}
    for name, p in system.modules["denoiser"].named_parameters():
        assert not p.requires_grad or p.grad.isfinite().all(), name


def test_the_direction_loss_can_be_put_on_another_family() -> None:
    ddt = load_recipe("ddt/debug").build().modules["denoiser"]
    flow_matching = FlowMatching(LinearPath(), LogitNormalTime(), LabelDropout(10, 0.1))
    objective = VelocityDirection(flow_matching, LinearPath())
    batch = {"latent": torch.randn(2, 4, 8, 8), "label": torch.tensor([1, 2])}
    losses = objective(ddt, batch, objective.draw(batch, Rng(0).at(0)))
    assert losses.total > losses.terms["velocity_mse"]


# ---------------------------------------------------------------- sampling


class _Counted(nn.Module):
    """Counts the rows of a network's calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.rows: list[tuple[float, int]] = []

    def forward(self, x_t: Tensor, t: Tensor, **conditions: Tensor):
        self.rows.append((t[0].item(), len(x_t)))
        return self.network(x_t, t, **conditions)


def _sample(recipe: Recipe, network: nn.Module | None = None, **request: Any) -> Tensor:
    torch.manual_seed(0)
    task = recipe.build().tasks["class_to_image"]
    for p in task.network.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.05)
    start = task.start(task.request(label=3, **request), device=torch.device("cpu"))
    return drive(network or task.network, [start])[0]


@pytest.mark.parametrize(
    "method", ["euler", "heun", "midpoint", "heun3", "rk4", "dopri5", "sde_euler", "sde_heun"]
)
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("prediction", ["velocity", "noise", "data", "score"])
def test_all_combinations_sample(path: str, prediction: str, method: str) -> None:
    recipe = _tiny(
        f"objective.path={path}", f"objective.prediction={prediction}", f"sampling.method={method}"
    )
    assert _sample(recipe).isfinite().all()


def test_a_seed_gives_its_picture() -> None:
    recipe = _tiny("sampling.method=sde_euler")
    assert torch.equal(_sample(recipe, seed=1), _sample(recipe, seed=1))
    assert not torch.equal(_sample(recipe, seed=1), _sample(recipe, seed=2))


def test_calls_outside_the_interval_are_not_doubled() -> None:
    recipe = _tiny("sampling.guidance_interval=[0.5, 1.0]")
    network = _Counted(recipe.build_network())
    _sample(recipe, network)
    assert network.rows == [(0.0, 1), (0.25, 1), (0.5, 2), (0.75, 2)]


def test_guidance_leaves_the_other_channels_alone() -> None:
    three = _sample(_tiny("sampling.guidance_channels=3", "sampling.num_steps=1"))
    none = _sample(_tiny("sampling.guidance_scale=1.0", "sampling.num_steps=1"))
    everything = _sample(_tiny("sampling.num_steps=1"))
    torch.testing.assert_close(three[3:], none[3:])
    torch.testing.assert_close(three[:3], everything[:3])
    assert (everything - none).abs().amax(dim=(1, 2)).min() > 1e-3


def test_the_published_interval_includes_its_start() -> None:
    guidance = Guidance(6.7, guidance_from(0.11, 1.0))
    start = torch.tensor(0.11).item()
    assert guidance.scale_at(start) == guidance.scale_at(1.0) == 6.7
    assert guidance.scale_at(start - 1e-7) == 1


def test_a_network_without_null_label_is_not_guided() -> None:
    with pytest.raises(ValueError, match="without null label"):
        _sample(_tiny("objective.label_dropout_prob=0"))
    recipe = _tiny("objective.label_dropout_prob=0", "sampling.guidance_scale=1.0")
    assert _sample(recipe).isfinite().all()


def test_a_wrong_label_is_refused() -> None:
    recipe = _tiny("num_classes=3")
    with pytest.raises(ValueError, match=r"0\.\.2"):
        _sample(recipe)


def test_the_multiplier_scales_normalized_latents() -> None:
    settings = AutoencoderSettings(path="x", mean=(1.0, 2.0), std=(2.0, 4.0), multiplier=0.5)
    assert settings.statistics(2) == ((1.0, 2.0), (4.0, 8.0))
    with pytest.raises(ValueError, match="4 values"):
        settings.statistics(4)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of patch_size"):
        LightningDiT(
            in_channels=4,
            input_size=9,
            patch_size=2,
            dim=32,
            depth=1,
            num_heads=2,
            num_classes=10,
            layers=Layers(),
        )
