"""Recipes: YAML and dotted overrides -> the family's Recipe.

A recipe is named by its file below `udiff/recipes` (`ddt/debug`) or by a path to a YAML file. Its
`family` names the folder of `udiff/models` that says what else it may hold; `extends` names one
other recipe whose keys it changes.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo

import udiff.models
from udiff.system import FamilyRecipe

RECIPES_FOLDER = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """A recipe that can't be used; names the dotted key, its value and what is allowed."""


def families() -> list[str]:
    """List the families: the folders of `udiff.models`."""
    return sorted(module.name for module in pkgutil.iter_modules(udiff.models.__path__))


def recipe_names() -> list[str]:
    """List the recipes that come with the package."""
    files = RECIPES_FOLDER.glob("*/*.yaml")
    return sorted(str(file.relative_to(RECIPES_FOLDER).with_suffix("")) for file in files)


def load_recipe(name: str, overrides: Iterable[str] = ()) -> FamilyRecipe:
    """Load a recipe by its name or path, with overrides like `train.images=1000`.

    Raises:
        RecipeError: no such recipe or family, a key that it does not know, a value not allowed.
    """
    keys = _read(name)
    if base := keys.pop("extends", None):
        inherited = _read(base)
        if "extends" in inherited:
            raise RecipeError(
                f"recipe {name}: extends {base}, which extends another; one level only"
            )
        keys = merge_keys(inherited, keys)
    for override in overrides:
        keys = merge_keys(keys, parse_override(override))
    return parse_recipe(keys, source=name)


def parse_recipe(keys: Mapping[str, Any], *, source: str) -> FamilyRecipe:
    """Check a recipe's keys; `source` names it in errors."""
    family = keys.get("family")
    if family not in families():
        raise RecipeError(
            f"recipe {source}: family must be one of {', '.join(families())}; got {family!r}"
        )
    recipe_class = importlib.import_module(f"udiff.models.{family}.recipe").Recipe
    try:
        return recipe_class.model_validate(dict(keys))
    except ValidationError as error:
        problems = [_explain(problem, recipe_class) for problem in error.errors()]
        raise RecipeError(f"recipe {source}: " + "; ".join(problems)) from None


def dump_recipe(recipe: FamilyRecipe) -> str:
    """Write a recipe out as YAML, every key resolved."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def update_recipe(recipe: FamilyRecipe, changes: Mapping[str, Any]) -> FamilyRecipe:
    """Change keys of a loaded recipe; `changes` is nested like the YAML."""
    return parse_recipe(merge_keys(recipe.model_dump(mode="json"), changes), source=recipe.family)


def _read(name: str) -> dict[str, Any]:
    file = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES_FOLDER / f"{name}.yaml"
    if not file.is_file():
        known = recipe_names()
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        raise RecipeError(f"recipe {name} does not exist (looked for {file}); {hint}")
    try:
        keys = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {name} is not valid YAML: {error}") from None
    if not isinstance(keys, dict):
        raise RecipeError(f"recipe {name} must hold keys and values, got {type(keys).__name__}")
    return keys


def merge_keys(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Change keys of nested mappings; what `changes` does not name stays."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge_keys(old, value) if both else value  # type: ignore[arg-type]
    return merged


def parse_override(override: str) -> dict[str, Any]:
    """Read `a.b=value` as nested keys; the value as YAML reads it.

    Raises:
        RecipeError: it does not look like that.
    """
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"an override looks like train.lr=1e-4, got {override!r}")
    value: Any = yaml.safe_load(text)
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def _explain(problem: Any, recipe_class: type[BaseModel]) -> str:
    keys, settings = _locate(recipe_class, problem["loc"])
    path = ".".join(keys)
    if problem["type"] != "extra_forbidden":
        got = problem["input"]
        got = f", got {got!r}" if not isinstance(got, Mapping) else ""
        return f"{path or 'recipe'}: {problem['msg'].removeprefix('Value error, ')}{got}"
    allowed = sorted(settings.model_fields) if settings else []
    close = difflib.get_close_matches(keys[-1], allowed, n=1)
    hint = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(allowed)}"
    return f"{path} is not a key of this recipe; {hint}"


def _locate(
    recipe_class: type[BaseModel], location: tuple[int | str, ...]
) -> tuple[list[str], type[BaseModel] | None]:
    """Find the keys on the way to an error, and the settings that hold the last of them.

    Where settings are of one of several kinds, an error's location names the kind too: no key.
    """
    keys: list[str] = []
    holder: type[BaseModel] | None = None
    inside: type[BaseModel] | None = recipe_class
    kinds: dict[str, type[BaseModel]] = {}
    for part in map(str, location):
        if part in kinds:
            inside, kinds = kinds[part], {}
            continue
        keys.append(part)
        holder = inside
        field = holder.model_fields.get(part) if holder else None
        kinds = _kinds(field) if field else {}
        inside = kinds.popitem()[1] if len(kinds) == 1 else None
    return keys, holder


def _kinds(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """List the settings that a key can hold, by what an error's location calls them."""
    kinds: dict[str, type[BaseModel]] = {}
    for member in get_args(field.annotation) or (field.annotation,):
        model, *marks = get_args(member) or (member,)
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            continue
        names = [mark.tag for mark in marks if isinstance(mark, Tag)]
        if isinstance(field.discriminator, str):
            names = list(get_args(model.model_fields[field.discriminator].annotation))
        kinds[names[0] if names else model.__name__] = model
    return kinds
