"""DDT and improved DiT: keys, sizes, configurations, and what the networks promise."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from udiff.diffusion.alignment import Projector
from udiff.models.ddt.checkpoint import convert_in, convert_out, network_from_official
from udiff.models.ddt.network import DDT
from udiff.models.ddt.official_config import recipe_keys_from_official
from udiff.models.ddt.official_writer import official_config
from udiff.recipe import load_recipe, parse_recipe, recipe_names, update_recipe
from udiff.training.shard import checkpoint_activations
from udiff.weights import WeightsError

RECIPES = [name for name in recipe_names() if name.startswith("ddt/")]
FULL_KEYS = json.loads((Path(__file__).parents[1] / "golden/cases/ddt/full_keys.json").read_text())
TINY = {
    "cls": "DDT", "in_channels": 4, "patch_size": 2, "hidden_size": 32, "num_groups": 2,
    "num_blocks": 3, "num_encoder_blocks": 2, "num_classes": 10,
}  # fmt: skip
OFFICIAL_YAML = """
seed_everything: true
tags: {exp: &exp my_run}
trainer: {default_root_dir: out, precision: bf16-mixed, max_steps: 1000, devices: auto}
model:
  vae: {class_path: src.models.vae.LatentVAE, init_args: {precompute: true, weight_path: my/vae}}
  denoiser:
    class_path: src.models.denoiser.decoupled_improved_dit.DDT
    init_args: {in_channels: 4, patch_size: 2, num_groups: 2, hidden_size: &dim 32, num_blocks: 3,
                num_encoder_blocks: 2, num_classes: 10}
  conditioner: {class_path: src.models.conditioner.LabelConditioner, init_args: {null_class: 10}}
  diffusion_trainer:
    class_path: src.diffusion.stateful_flow_matching.training_repa.REPATrainer
    init_args: {lognorm_t: true, feat_loss_weight: 0.5, align_layer: 2, proj_denoiser_dim: *dim,
                proj_hidden_dim: *dim, proj_encoder_dim: 768,
                scheduler: &linear src.diffusion.stateful_flow_matching.scheduling.LinearScheduler}
  diffusion_sampler:
    class_path: src.diffusion.stateful_flow_matching.sampling.EulerSampler
    init_args: {num_steps: 250, guidance: 2.0, guidance_interval_min: 0.3, state_refresh_rate: 1,
                last_step: 0.04, scheduler: *linear, w_scheduler: *linear,
                guidance_fn: src.diffusion.base.guidance.simple_guidance_fn,
                step_fn: src.diffusion.stateful_flow_matching.sampling.ode_step_fn}
  ema_tracker: {class_path: src.callbacks.simple_ema.SimpleEMA, init_args: {decay: 0.999}}
  optimizer:
    class_path: torch.optim.AdamW
    init_args: {lr: 1.0e-4, betas: [0.9, 0.95], weight_decay: 0.0}
data: {train_dataset: imagenet256, train_batch_size: 16, latent_shape: [4, 32, 32]}
"""


def _network(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    arguments = {**TINY, **changes}
    network = network_from_official(arguments)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network


def _inputs() -> tuple:
    return torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 10])


@pytest.mark.parametrize("name", [name for name, entry in FULL_KEYS.items() if "cls" in entry])
def test_keys_are_the_official_ones_in_their_order(name):
    entry = FULL_KEYS[name]
    with torch.device("meta"):
        network = network_from_official({"cls": entry["cls"], **entry["config"]})
    ours = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    assert list(ours.items()) == list(entry["keys"].items())
    assert [key for key, _ in network.named_parameters()] == list(entry["keys"])
    assert sum(p.numel() for p in network.parameters()) == entry["parameters"]


@pytest.mark.parametrize("name", [name for name in FULL_KEYS if "projector" in name])
def test_the_projectors_keys_are_the_official_ones(name):
    official = FULL_KEYS[name]["keys"]
    dim = official["proj.0.0.bias"][0]
    with torch.device("meta"):
        projector = Projector(dim, hidden_dim=dim, feature_dim=768)
    ours = {f"proj.0.{key}": list(tensor.shape) for key, tensor in projector.state_dict().items()}
    assert list(ours.items()) == list(official.items())


def test_with_a_state_the_decoder_knows_neither_time_nor_label():
    network, (x, t, label) = _network(), _inputs()
    state = network(x, t, label=label).state
    one = network(x, t, label=label, state=state).output
    other = network(x, 1 - t, label=label - 1, state=state).output
    assert torch.equal(one, other)


def test_keeping_all_tokens_changes_nothing():
    network, (x, t, label) = _network(), _inputs()
    everything = torch.arange(16).expand(2, 16)
    plain = network(x, t, label=label)
    kept = network(x, t, label=label, keep=everything)
    torch.testing.assert_close(kept.output, plain.output)


def test_a_dropped_token_is_not_seen_by_the_encoder():
    network, (x, t, label) = _network(), _inputs()
    keep = torch.arange(8).expand(2, 8)
    changed = x.clone()
    changed[..., 4:, :] += 1  # tokens 8..15
    states = [network(image, t, label=label, keep=keep).state for image in (x, changed)]
    assert torch.equal(*states)


def test_checkpointed_activations_give_the_same_gradients():
    gradients = []
    for is_checkpointed in (False, True):
        network, (x, t, label) = _network(), _inputs()
        for block in network.blocks:
            if is_checkpointed:
                checkpoint_activations(block)
        network(torch.ones_like(x), torch.ones_like(t) / 2, label=label).output.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert torch.equal(*gradients)


def test_a_feature_is_the_output_of_the_block_asked_for():
    network, (x, t, label) = _network(), _inputs()
    seen = []
    network.blocks[1].register_forward_hook(lambda _m, _a, out: seen.append(out))
    assert network(x, t, label=label, feature_layer=2).feature is seen[0]
    with pytest.raises(ValueError, match="feature_layer must be one of"):
        network(x, t, label=label, feature_layer=4)


# ---------------------------------------------------------------- configurations and checkpoints


def test_the_official_yaml_becomes_a_recipe():
    recipe = parse_recipe(recipe_keys_from_official(yaml.safe_load(OFFICIAL_YAML)), source="yaml")
    published = load_recipe("ddt/xl2_256")
    assert recipe.sampling == published.sampling
    assert recipe.optimizer == published.optimizer
    assert recipe.objective.alignment.layer == 2
    assert recipe.objective.alignment.hidden_dim == 32
    assert recipe.network.num_encoder_blocks == 2
    assert recipe.autoencoder.path == "my/vae"
    assert recipe.ema.decay == 0.999
    assert recipe.train.num_steps == 1000


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("REPATrainer", "VPTrainer", "diffusion_trainer VPTrainer is not one"),
        ("null_class: 10", "null_class: 9", "null_class must be the number of classes 10"),
        ("LatentVAE", "BaseVAE", "model.vae must be LatentVAE"),
        ("torch.optim.AdamW", "torch.optim.SGD", "model.optimizer must be AdamW"),
        ("num_groups: 2", "num_groups: 2, depth: 3", r"unknown arguments .*\['depth'\]"),
    ],
)
def test_what_no_published_recipe_uses_is_refused(old, new, message):
    with pytest.raises(ValueError, match=message):
        recipe_keys_from_official(yaml.safe_load(OFFICIAL_YAML.replace(old, new)))


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "ddt/debug"])
def test_official_configurations_go_out_and_in(name):
    recipe = load_recipe(name)
    back = parse_recipe(recipe_keys_from_official(official_config(recipe)), source="test")
    groups = set(type(recipe).model_fields) - {"train", "objective", "data"}
    assert {name: getattr(back, name) for name in groups} == {
        name: getattr(recipe, name) for name in groups
    }
    for key in ("images", "batch_size", "accumulate", "precision", "seed", "log_every"):
        assert getattr(back.train, key) == getattr(recipe.train, key)
    assert back.objective.alignment.teacher == recipe.objective.alignment.teacher


def test_an_official_configuration_says_every_choice_of_the_sampler():
    recipe = parse_recipe(recipe_keys_from_official(yaml.safe_load(OFFICIAL_YAML)), source="yaml")
    changed = update_recipe(
        recipe,
        {
            "sampling": {
                "solver": "adams", "order": 3, "clock": "log_snr", "shift": 1.5,
                "guidance_channels": [0, 4], "guidance_other_scale": 1.1,
                "reuse": {"choice": "dynamic", "every": 3},
            },
            "objective": {"alignment": None, "dispersive": {"layer": 2}, "weight": "snr"},
        },
    )  # fmt: skip
    back = parse_recipe(recipe_keys_from_official(official_config(changed)), source="test")
    assert (back.sampling, back.objective) == (changed.sampling, changed.objective)


def test_what_the_official_code_can_not_do_is_refused():
    recipe = load_recipe("ddt/debug", ["objective.masked={}"])
    with pytest.raises(ValueError, match="can't be said in an official configuration"):
        official_config(recipe)


def _checkpoint(*, compiled: bool, has_raw: bool, has_projector: bool) -> dict:
    wrapper = "_orig_mod." if compiled else ""
    averaged, raw = _network().state_dict(), _network().state_dict()
    state = {f"ema_denoiser.{wrapper}{key}": tensor for key, tensor in averaged.items()}
    if has_raw:
        state |= {f"denoiser.{wrapper}{key}": tensor + 1 for key, tensor in raw.items()}
    if has_projector:
        projector = Projector(32, hidden_dim=32, feature_dim=24).state_dict()
        state |= {f"diffusion_trainer.proj.0.{key}": tensor for key, tensor in projector.items()}
    return {"epoch": 0, "global_step": 3, "state_dict": state}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("has_raw", [False, True])
@pytest.mark.parametrize("has_projector", [False, True])
def test_every_layout_comes_back_bit_for_bit(compiled, has_raw, has_projector):
    checkpoint = _checkpoint(compiled=compiled, has_raw=has_raw, has_projector=has_projector)
    keys, weights = convert_in(checkpoint, TINY)
    back = convert_out(parse_recipe(keys, source="test"), weights)["state_dict"]
    for key, tensor in checkpoint["state_dict"].items():
        assert torch.equal(back[key.replace("_orig_mod.", "")], tensor)
    assert set(back) >= {key.replace("_orig_mod.", "") for key in checkpoint["state_dict"]}


def test_missing_and_unknown_keys_are_listed():
    checkpoint = _checkpoint(compiled=False, has_raw=False, has_projector=False)
    state = checkpoint["state_dict"]
    del state["ema_denoiser.blocks.0.norm1.weight"]
    with pytest.raises(WeightsError, match=r"missing keys \['blocks.0.norm1.weight'\]"):
        convert_in(checkpoint, TINY)
    state["vae.something"] = torch.zeros(1)
    with pytest.raises(WeightsError, match=r"unknown keys \['vae.something'\]"):
        convert_in(checkpoint, TINY)


def test_a_network_of_unknown_split_needs_its_configuration():
    checkpoint = _checkpoint(compiled=False, has_raw=False, has_projector=False)
    with pytest.raises(WeightsError, match="give the configuration"):
        convert_in(checkpoint, None)


def test_bare_weights_of_the_baseline_tell_their_configuration():
    weights = _network(cls="DiT").state_dict()
    recipe = parse_recipe(convert_in(weights, None).recipe_keys, source="test")
    assert recipe.network.num_encoder_blocks is None
    assert recipe.network.num_heads == 2
    assert not isinstance(recipe.build_network(), DDT)
