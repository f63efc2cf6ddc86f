"""VA-VAE: keys, conversions, configurations, the losses, and training in two phases."""

import asyncio
import io
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from jobs.fetch_weights import fetch_lpips
from serve.engine import Engine
from serve.records import Order
from tests.made import draw_pictures, save_random_bundle, write_pictures
from tests.training.test_trainer import start, train, weights
from udiff.autoencoders.kl import KLAutoencoder
from udiff.autoencoders.ldm import LDMAutoencoder
from udiff.autoencoders.perceptual import LPIPS
from udiff.autoencoders.pixels import to_pixels, to_uint8
from udiff.bundle import load_autoencoder, save_bundle
from udiff.encoders.foundation import make_foundation
from udiff.generate import Generator
from udiff.models.vavae.checkpoint import convert_in, convert_out, network_from_official
from udiff.models.vavae.official_config import (
    adversarial_starts,
    official_config,
    recipe_keys_from_official,
)
from udiff.models.vavae.recipe import Recipe, make_alignment, make_projection
from udiff.models.vavae.settings import FoundationSettings
from udiff.recipe import RecipeError, load_recipe
from udiff.system import Losses, Rng
from udiff.training.log import read_metrics
from udiff.weights import WeightsError

CASES = Path(__file__).parents[1] / "golden" / "cases" / "lightningdit"
FULL_KEYS: dict[str, dict[str, list[int]]] = json.loads((CASES / "tokenizer_keys.json").read_text())
INFERENCE = [name for name in FULL_KEYS if "inference AutoencoderKL" in name]
TRAINING = [name for name in FULL_KEYS if name.startswith("VA-VAE training module")]
TINY = ["network={width: 8, multipliers: [1, 2], norm_groups: 4, latent_channels: 3}"]
STEPS = 6


def _meta(name: str) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in FULL_KEYS[name].items()}


def _recipe(*overrides: str) -> Recipe:
    attention = ["network.encoder_attention=[]", "network.decoder_attention=[]"]
    path = f"objective.perceptual_path={fetch_lpips()}"
    recipe = load_recipe("vavae/debug", [*TINY, *attention, path, *overrides])
    assert isinstance(recipe, Recipe)
    return recipe


def _random_weights(recipe: Recipe) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return nn.ModuleDict(dict(recipe.build().modules)).state_dict()


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", INFERENCE)
def test_a_published_autoencoder_is_covered(name: str) -> None:
    keys, ours = convert_in(_meta(name), None)
    assert "adversarial" not in keys["objective"]
    assert "alignment" not in keys["objective"]
    with torch.device("meta"):
        autoencoder = Recipe.model_validate(keys).build_autoencoder().model
    found = {key: list(tensor.shape) for key, tensor in autoencoder.state_dict().items()}
    assert found == FULL_KEYS[name]
    assert len(ours) == len(found)
    if name == "vavae f16d32 (inference AutoencoderKL)":
        assert sum(p.numel() for p in autoencoder.parameters()) == 69_836_067


@pytest.mark.parametrize("name", TRAINING)
def test_a_published_training_checkpoint_is_covered(name: str) -> None:
    checkpoint = _meta(name)
    keys, ours = convert_in({"state_dict": checkpoint, "epoch": 14}, None)
    back = convert_out(Recipe.model_validate(keys), ours)["state_dict"]
    assert {key: list(tensor.shape) for key, tensor in back.items()} == FULL_KEYS[name]
    assert all(back[key] is checkpoint[key] for key in back if key != "loss.logvar")
    alignment = keys["objective"].get("alignment")
    assert (alignment["model"] if alignment else "None") in name


def test_networks_that_only_training_asks_have_the_published_keys() -> None:
    with torch.device("meta"):
        dinov2 = make_foundation("vit_large_patch14_dinov2.lvd142m")
        mae = make_foundation("vit_large_patch16_224.mae")
        lpips = LPIPS()
    for module, name, prefix in (
        (dinov2, TRAINING[0], "foundation_model.model."),
        (mae, TRAINING[1], "foundation_model.model."),
        (lpips, TRAINING[0], "loss.perceptual_loss."),
    ):
        ours = {prefix + key: list(t.shape) for key, t in module.state_dict().items()}
        assert ours == {k: v for k, v in FULL_KEYS[name].items() if k.startswith(prefix)}


def test_weights_go_in_and_out_bit_for_bit() -> None:
    recipe = _recipe(
        "network={width: 32, multipliers: [1, 1], norm_groups: 32, latent_channels: 3}",
        "objective.logvar=0.1",
        "objective.adversarial={num_layers: 3, generator_start: 101, discriminator_start: 100}",
        "objective.alignment={model: mae, feature_dim: 5}",
    )
    official = convert_out(recipe, _random_weights(recipe))["state_dict"]
    perceptual = LPIPS((1, 2, 3, 4, 5)).state_dict()
    official |= {f"loss.perceptual_loss.{key}": tensor for key, tensor in perceptual.items()}
    keys, ours = convert_in({"state_dict": official}, official_config(recipe))
    back = convert_out(Recipe.model_validate(keys), ours)["state_dict"]
    assert back.keys() == official.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in official.items())
    assert back["loss.logvar"] == torch.tensor(0.1)


def test_a_discriminator_that_no_loss_asks_is_kept() -> None:
    recipe = _recipe(
        "network={width: 32, multipliers: [1, 1], norm_groups: 32, latent_channels: 3}",
        "objective.adversarial={num_layers: 3, generator_start: 101, discriminator_start: 100}",
        "objective.alignment=null",
    )
    official = convert_out(recipe, _random_weights(recipe))["state_dict"]
    config = official_config(recipe)
    config["model"]["params"]["lossconfig"]["params"]["disc_factor"] = 0.0
    keys, ours = convert_in({"state_dict": official}, config)
    assert "adversarial" not in keys["objective"]
    back = convert_out(Recipe.model_validate(keys), ours)["state_dict"]
    assert back.keys() == official.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in official.items())


def test_unknown_keys_are_named() -> None:
    checkpoint = _meta(INFERENCE[0]) | {"surplus.weight": torch.empty(1, device="meta")}
    del checkpoint["encoder.conv_out.bias"]
    with pytest.raises(WeightsError, match=r"unknown keys \['surplus.weight'\]"):
        convert_in(checkpoint, None)
    del checkpoint["surplus.weight"]
    with pytest.raises(WeightsError, match=r"missing keys .*encoder.conv_out.bias"):
        convert_in(checkpoint, None)


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w}, lambda w: {"model": w}])
def test_an_official_file_is_an_autoencoder_of_any_recipe(tmp_path: Path, wrap) -> None:
    torch.manual_seed(0)
    config = {
        "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 4, "resolution": 16,
        "attn_resolutions": [8],
    }  # fmt: skip
    network = network_from_official({"ddconfig": config, "embed_dim": 4})
    torch.save(wrap(network.state_dict() | {"loss.logvar": torch.zeros(())}), tmp_path / "vae.ckpt")
    loaded = load_autoencoder(str(tmp_path / "vae.ckpt"))
    pixels = torch.rand(1, 3, 16, 16)
    ours = loaded.encode_moments(pixels).mean
    assert torch.equal(ours, KLAutoencoder(network).encode_moments(pixels).mean)
    assert loaded.fingerprint() == KLAutoencoder(network).fingerprint()

    recipe = load_recipe("ddt/debug", [f"autoencoder.path={tmp_path / 'vae.ckpt'}"])
    save_bundle(tmp_path / "bundle", recipe, {"weight": torch.zeros(1)}, about="a copy")
    assert (tmp_path / "bundle" / "autoencoder.ckpt").is_file()


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    "name", ["f16d32_ldm", "f16d32_vfdinov2", "f16d32_stage1", "f16d32_stage3"]
)
def test_a_recipe_goes_through_the_official_configuration(name: str) -> None:
    recipe = load_recipe(f"vavae/{name}")
    assert isinstance(recipe, Recipe)
    back = Recipe.model_validate(recipe_keys_from_official(official_config(recipe)))
    network = recipe.network.model_copy(update={"hidden_channels": 32})
    assert back.network == network
    assert back.objective == recipe.objective


@pytest.mark.parametrize("disc_start", [0, 1, 2, 3, 4, 5001])
def test_the_game_starts_where_both_optimizers_steps_say(disc_start: int) -> None:
    starts = adversarial_starts(disc_start)
    for batch in range(2 * disc_start + 2):
        assert (batch >= starts["generator_start"]) == (2 * batch >= disc_start)
        assert (batch >= starts["discriminator_start"]) == (2 * batch + 1 >= disc_start)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("network.norm_groups=3", "width 8 must be a multiple of norm_groups 3"),
        ("network.encoder_attention=[2]", r"attention levels must be below 2, got \[2\]"),
        ("autoencoder={path: x}", "autoencoder must be null"),
        ("objective.adversarial.loss=softmax", "objective.adversarial.loss: Input should be"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        _recipe(override)


# ---------------------------------------------------------------- losses


def _losses(recipe: Recipe, *, step: int) -> tuple[list[Losses], dict[str, nn.Module]]:
    torch.manual_seed(0)
    system = recipe.build()
    batch: dict[str, Tensor] = {"image": torch.from_numpy(draw_pictures(3, 16))}
    found = []
    for number, phase in enumerate(system.phases):
        draws = phase.draw(batch, Rng(0).at(0, phase=number))
        losses = phase.loss(batch, {**draws, "step": torch.tensor(float(step))})
        batch |= losses.carry
        found.append(losses)
    return found, dict(system.modules)


def test_before_its_start_the_game_changes_nothing() -> None:
    starts = (
        "objective.adversarial.generator_start=5",
        "objective.adversarial.discriminator_start=4",
    )
    [before, judged], _ = _losses(_recipe(*starts), step=3)
    assert before.terms["adversarial_factor"] == 0
    assert before.terms["adversarial_weight"] > 0
    assert judged.total == 0
    [_, judged], _ = _losses(_recipe(*starts), step=4)
    assert judged.total > 0
    [after, _], _ = _losses(_recipe(*starts), step=5)
    added = after.terms["adversarial_weight"] * after.terms["adversarial"]
    torch.testing.assert_close(after.total - before.total, added, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", ["hinge", "vanilla"])
@pytest.mark.parametrize("projects", ["latent", "feature"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_every_combination_gives_every_parameter_a_gradient(loss, projects, reduction) -> None:
    recipe = _recipe(
        f"objective.adversarial.loss={loss}",
        f"objective.alignment.projects={projects}",
        f"objective.reduction={reduction}",
    )
    [made, judged], modules = _losses(recipe, step=1000)
    made.total.backward()
    judged.total.backward()
    parameters = (p for module in modules.values() for p in module.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)


def test_losses_can_be_left_out() -> None:
    [made], modules = _losses(
        _recipe("objective.adversarial=null", "objective.alignment=null"), step=0
    )
    assert set(modules) == {"autoencoder"}
    torch.testing.assert_close(made.total, made.terms["nll"] + 1e-3 * made.terms["kl"])


def test_without_gradients_adaptive_weights_are_zero() -> None:
    with torch.no_grad():
        [made, _], _ = _losses(_recipe(), step=1000)
    assert made.terms["adversarial_weight"] == made.terms["alignment_weight"] == 0


def test_aligned_latents_cost_nothing() -> None:
    settings = FoundationSettings(model="cache", feature_dim=3)
    projection = make_projection(settings, 3)
    nn.init.dirac_(projection.weight)
    alignment = make_alignment(settings, projection, None)
    latent = torch.randn(2, 3, 8, 8)
    assert alignment.compare(latent, 2 * latent).item() == pytest.approx(0, abs=1e-6)
    assert alignment.compare(latent, -latent).item() == pytest.approx(2, abs=1e-5)


def test_cached_features_are_a_column_of_the_batch() -> None:
    recipe = _recipe("objective.alignment.model=cache", "objective.alignment.feature_dim=5")
    system = recipe.build()
    assert system.columns == ("image", "dino_feature")
    batch = {
        "image": torch.from_numpy(draw_pictures(2, 16)),
        "dino_feature": torch.randn(2, 16, 5).half(),
    }
    phase = system.phases[0]
    assert phase.loss(batch, phase.draw(batch, Rng(0).at(0))).total.isfinite()


# ---------------------------------------------------------------- reconstructing


@pytest.fixture(scope="module")
def random_bundle(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("random") / "bundle"
    save_random_bundle(path, _recipe(), seed=0)
    return path


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def test_a_picture_goes_through_its_latent_and_back(random_bundle) -> None:
    [picture] = draw_pictures(1, 17)
    [made] = Generator(random_bundle, device="cpu").generate([{"image": _png(picture), "seed": 3}])
    autoencoder = load_autoencoder(str(random_bundle))
    moments = autoencoder.encode_moments(to_pixels(torch.from_numpy(picture[None, :16, :16])))
    noise = torch.randn(moments.mean.shape, generator=torch.Generator().manual_seed(3))
    expected = autoencoder.decode(autoencoder.normalize(moments.sample(noise)))
    assert np.array_equal(made, to_uint8(expected)[0].numpy())


def test_an_engine_serves_reconstructions(random_bundle) -> None:
    requests = tuple({"image": _png(picture)} for picture in draw_pictures(2, 32))
    engine = Engine(str(random_bundle), device="cpu")
    made = asyncio.run(engine.generate(Order("reconstruct", requests)))
    engine.close()
    assert [picture.shape for picture in made] == [(32, 32, 3)] * 2


def test_pictures_too_large_or_too_small_are_refused(random_bundle) -> None:
    generator = Generator(random_bundle, device="cpu")
    for side in (1, 1025):
        picture = _png(np.zeros((side, side, 3), np.uint8))
        with pytest.raises(ValueError, match=f"image must have .* got {side} x {side}"):
            generator.generate([{"image": picture}])


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, draw_pictures(64, 16))
    return folder


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(_training_recipe(pictures), folder)
    return folder


def _training_recipe(pictures: Path, *overrides: str) -> Recipe:
    return _recipe(
        f"data.cache={pictures}",
        "train={images: 24, batch_size: 4, log_every: 1, checkpoint_every: 2, shard: root}",
        "objective.adversarial.generator_start=2",
        "objective.adversarial.discriminator_start=1",
        "optimizer.warmup_steps=0",
        *overrides,
    )


def _values(folder: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if name != "images_per_s"}
        for row in read_metrics(folder)
    ]


@pytest.mark.long
def test_a_killed_run_ends_like_one_that_was_not(pictures, undisturbed, tmp_path) -> None:
    recipe = _training_recipe(pictures)
    [process] = start(recipe, tmp_path)
    while len(read_metrics(tmp_path)) < 3:
        assert process.is_alive()
        time.sleep(0.005)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    train(recipe, tmp_path)
    assert _values(tmp_path) == _values(undisturbed)
    ours, theirs = weights(tmp_path), weights(undisturbed)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert theirs["discriminator.main.3.num_batches_tracked"] == 3 * STEPS


def test_the_discriminator_waits_for_its_start(undisturbed) -> None:
    rows = read_metrics(undisturbed)
    assert [row["discriminator/loss"] > 0 for row in rows] == [False] + [True] * (STEPS - 1)
    factors = [row["autoencoder/adversarial_factor"] for row in rows]
    assert factors == [0, 0] + [1] * (STEPS - 2)


@pytest.mark.long
def test_two_ranks_agree_on_the_weights_of_the_losses(pictures, undisturbed, tmp_path) -> None:
    recipe = _training_recipe(pictures)
    train(recipe, tmp_path, ranks=2)
    ours, theirs = _values(tmp_path), _values(undisturbed)
    assert len(ours) == STEPS
    # Batch norm sees half as many pictures a rank: the game may differ, nothing else at first.
    for name in ("nll", "kl", "alignment", "alignment_weight", "lpips"):
        key = f"autoencoder/{name}"
        assert ours[0][key] == pytest.approx(theirs[0][key], rel=1e-4), name


def test_accumulated_micro_batches_hand_their_reconstructions_on(pictures, tmp_path) -> None:
    train(_training_recipe(pictures, "train.accumulate=2", "train.images=8"), tmp_path)
    first = _values(tmp_path)[0]
    # The generator's pass and the discriminator's see the same reconstructions.
    ours = first["autoencoder/adversarial"]
    assert ours == pytest.approx(-first["discriminator/logits_fake"], rel=1e-4)


def test_a_stage_begins_with_the_weights_of_the_one_before(pictures, undisturbed, tmp_path) -> None:
    recipe = _training_recipe(
        pictures,
        f"initialize_from={undisturbed / 'bundle'}",
        "train.images=4",
        "optimizer.lr=1e-12",
        "discriminator_optimizer.lr=1e-12",
    )
    train(recipe, tmp_path)
    before, after = weights(undisturbed), weights(tmp_path)
    learned = [name for name in before if "running" not in name and "num_batches" not in name]
    assert all(torch.allclose(before[n], after[n], atol=1e-9) for n in learned)
    autoencoder = load_autoencoder(str(tmp_path / "bundle"))
    assert isinstance(autoencoder.model, LDMAutoencoder)
