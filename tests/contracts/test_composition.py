"""Pieces of one family's paper on another family, by a recipe alone."""

from functools import partial

import pytest
import torch
from torch import Tensor

from udiff.recipe import RecipeError, load_recipe
from udiff.samplers.ticks import drive
from udiff.system import FamilyRecipe, Rng, System
from udiff.training.optimizer import make_optimizer

REPA = "objective.alignment={layer: 2, feature_dim: 24}"
DISPERSIVE = "objective.dispersive={layer: 2}"
DIRECTION = "objective.direction={weight: 1.0}"
MASKED = "objective.masked={ratio: 0.3}"
SIZES = {
    "ddt": "network={dim: 32, num_heads: 2, num_blocks: 3, num_encoder_blocks: 2}",
    "lightningdit": "network={dim: 32, num_heads: 2, depth: 3, num_encoder_blocks: 2}",
    "mdtv2": "network={dim: 32, num_heads: 2, depth: 4, num_decoder_blocks: 2}",
}


def _recipe(family: str, *overrides: str) -> FamilyRecipe:
    return load_recipe(f"{family}/debug", [SIZES[family], *overrides])


def _system(recipe: FamilyRecipe) -> System:
    torch.manual_seed(0)
    system = recipe.build()
    for module in system.modules.values():  # layers that start at zero would hide mistakes
        for parameter in module.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
    return system


def _batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    return {
        "latent_mean": draw(4, 4, 8, 8),
        "latent_logvar": draw(4, 4, 8, 8) - 4,
        "label": torch.arange(4),
        "dino_feature": draw(4, 16, 24),
    }


@pytest.mark.parametrize(
    ("family", "overrides", "terms"),
    [
        ("ddt", [DIRECTION], {"velocity_direction"}),
        ("ddt", [REPA, DISPERSIVE], {"alignment", "dispersive"}),
        ("ddt", [MASKED, DIRECTION], {"masked_velocity_mse", "velocity_direction"}),
        ("ddt", ["network.num_encoder_blocks=null", REPA], {"alignment"}),
        ("lightningdit", [REPA], {"alignment", "velocity_direction"}),
        ("lightningdit", [DISPERSIVE], {"dispersive", "velocity_direction"}),
        ("lightningdit", [MASKED, REPA], {"masked_velocity_mse", "alignment"}),
        ("mdtv2", [REPA], {"alignment", "masked_mse"}),
        ("mdtv2", [DIRECTION, DISPERSIVE], {"velocity_direction", "dispersive", "masked_mse"}),
    ],
)
def test_a_recipe_adds_losses_that_learn(family, overrides, terms):
    system, batch = _system(_recipe(family, *overrides)), _batch()
    [phase] = system.phases
    assert set(phase.modules) == set(system.modules)
    optimizer = make_optimizer([system.modules[name] for name in phase.modules], phase.optimizer)
    before = {name: torch.cat([p.flatten() for p in m.parameters()]).clone()
              for name, m in system.modules.items()}  # fmt: skip
    for step in range(3):
        losses = phase.loss(batch, phase.draw(batch, Rng(0).at(step)))
        assert terms <= set(losses.terms)
        assert all(term.isfinite() for term in losses.terms.values())
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    for name, module in system.modules.items():
        assert not torch.equal(before[name], torch.cat([p.flatten() for p in module.parameters()]))


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("choice", ["fixed", "dynamic"])
def test_a_recipe_reuses_the_encoder(family, choice):
    def sample(*overrides: str) -> Tensor:
        recipe = _recipe(family, "sampling.num_steps=6", *overrides)
        system = _system(recipe)
        for module in system.modules.values():
            module.eval()
        task = system.tasks["class_to_image"]
        request = task.request(label=3, seed=1)
        return drive(task.network, [task.start(request, device=torch.device("cpu"))])[0]

    full, every_step = sample(), sample("sampling.reuse={every: 1}")
    torch.testing.assert_close(full, every_step, rtol=1e-4, atol=1e-4)
    reused = sample(f"sampling.reuse={{every: 3, choice: {choice}}}")
    assert reused.isfinite().all()
    assert not torch.allclose(full, reused, rtol=1e-3)


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("ddt", ["network.num_encoder_blocks=null", MASKED], "objective.masked needs an encoder"),
        ("ddt", [REPA, "objective.dispersive={layer: 1}"], "must be the same"),
        ("ddt", ["objective.masked={ratio: 0.8, ratio_width: 0.2}"], "must be below 1"),
        *(
            (family, ["objective.alignment={layer: 99}"], "alignment.layer must be one of the")
            for family in ("ddt", "lightningdit", "mdtv2")
        ),
        *(
            (family, ["network.patch_size=3"], "must be a multiple of network.patch_size 3")
            for family in ("ddt", "lightningdit", "mdtv2")
        ),
        ("ddt", ["sampling.guidance_interval=[0.9, 0.1]"], "from a lower time to a higher"),
        (
            "lightningdit",
            ["network.num_encoder_blocks=0", "sampling.reuse={every: 2}"],
            "sampling.reuse needs an encoder",
        ),
    ],
)
def test_what_does_not_go_together_is_named(family, overrides, message):
    with pytest.raises(RecipeError, match=message):
        _recipe(family, *overrides)
