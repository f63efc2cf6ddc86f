"""Every recipe loads and builds, and mistakes in one are named."""

import re

import pytest
import torch

from udiff.recipe import (
    RECIPES_FOLDER,
    RecipeError,
    dump_recipe,
    families,
    load_recipe,
    parse_recipe,
    recipe_names,
)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_builds_with_the_parameters_it_promises(name):
    first_comment = "".join(
        line for line in (RECIPES_FOLDER / f"{name}.yaml").read_text().splitlines(True)
        if line.startswith("#")
    )  # fmt: skip
    promised = re.search(r"([\d.,]+)( M)? parameters", first_comment)
    assert promised, f"{name}: its first comment gives no parameter count"
    with torch.device("meta"):
        system = load_recipe(name).build()
    count = sum(p.numel() for name in system.ema_modules for p in system.modules[name].parameters())
    if promised.group(2):
        assert f"{count / 1e6:.2f}" == promised.group(1)
    else:
        assert count == int(promised.group(1).replace(",", ""))


@pytest.mark.parametrize("family", families())
def test_a_family_has_a_debug_recipe(family):
    assert load_recipe(f"{family}/debug").family == family


@pytest.mark.parametrize("family", families())
def test_a_task_can_be_tried_out(family):
    with torch.device("meta"):
        tasks = load_recipe(f"{family}/debug").build().tasks
    for name, task in tasks.items():
        assert task.name == name
        request = task.request.model_validate(dict(task.example))
        assert request.seed == 0


@pytest.mark.parametrize("name", recipe_names())
def test_a_resolved_recipe_reads_back_the_same(name, tmp_path):
    recipe = load_recipe(name)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.imagse=1"], "train.imagse is not a key of this recipe; did you mean images?"),
        (["nettwork.dim=1"], "nettwork is not a key of this recipe; did you mean network?"),
        (["train.images=0"], "train.images: Input should be greater than 0, got 0"),
        (["family=ddd"], "family must be one of .*ddt.*; got 'ddd'"),
        (["network.dim=100"], "dim 100 must be a multiple of 4 x num_heads"),
        (["train.lr"], "an override looks like train.lr=1e-4"),
    ],
)
def test_a_mistake_is_named(overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("ddt/debug", overrides)


def test_an_override_takes_numbers_as_people_write_them():
    recipe = load_recipe("ddt/debug", ["optimizer.lr=1e-4", "train.images=1_000"])
    assert recipe.optimizer.lr == 1e-4
    assert recipe.train.images == 1000


def test_an_unknown_recipe_gets_a_hint():
    with pytest.raises(RecipeError, match="did you mean ddt/debug"):
        load_recipe("ddt/debugg")


def test_extends_changes_the_keys_it_names(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: ddt/debug\ntrain: {images: 640}\n")
    recipe, base = load_recipe(str(file)), load_recipe("ddt/debug")
    assert recipe.train.images == 640
    assert recipe.train.batch_size == base.train.batch_size
    assert recipe.network == base.network


def test_a_recipe_without_a_family_is_refused():
    with pytest.raises(RecipeError, match="got None"):
        parse_recipe({}, source="nothing")
