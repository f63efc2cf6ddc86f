"""Bring a recipe and its cache together: refuse a cache of another make, fill in what it knows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from udiff.autoencoders.kl import KLAutoencoder
from udiff.bundle import load_autoencoder
from udiff.data.manifest import Manifest, check_identity, identity_difference, read_manifest
from udiff.data.storage import Folder, open_folder
from udiff.recipe import update_recipe
from udiff.settings import AutoencoderSettings, DataSettings
from udiff.system import FamilyRecipe


@dataclass(frozen=True)
class Source:
    """A cache that a part of every batch is read from."""

    cache: Folder
    manifest: Manifest
    settings: DataSettings


@dataclass(frozen=True)
class Resolved:
    """A recipe with nothing left open, and the cache that it trains on."""

    recipe: FamilyRecipe
    cache: Folder
    manifest: Manifest
    sources: Mapping[str, Source] = field(default_factory=dict)
    """Caches of the parts of the batch that have one of their own."""


def resolve(recipe: FamilyRecipe) -> Resolved:
    """Open the recipe's cache, check that it fits, and fill in class names and latent statistics.

    Raises:
        FileNotFoundError: there is no cache, or no autoencoder.
        ValueError: no cache is named; it was made by another autoencoder or another encoder than
            the recipe's, or has other shapes.
    """
    cache, manifest = _open(recipe.data, "data")
    sources = {
        name: Source(*_open(settings, f"{name}_data"), settings)
        for name, settings in recipe.sources.items()
    }
    changes: dict[str, Any] = {
        "data": {"class_names": recipe.data.class_names or manifest.class_names}
    }
    if recipe.autoencoder is not None:
        autoencoder = load_autoencoder(recipe.autoencoder.path)
        for source in (Source(cache, manifest, recipe.data), *sources.values()):
            _check_autoencoder(autoencoder, recipe.autoencoder, source.manifest, source.cache)
            _check_latent_shape(recipe, source.manifest, source.cache)
        changes["autoencoder"] = _statistics(autoencoder, recipe.autoencoder, manifest)
    try:
        check_identity(manifest, recipe.cache_identity())
    except ValueError as error:
        raise ValueError(f"data.cache {cache} does not fit the recipe: {error}") from None
    return Resolved(update_recipe(recipe, changes), cache, manifest, sources)


def _open(settings: DataSettings, key: str) -> tuple[Folder, Manifest]:
    if settings.cache is None:
        raise ValueError(f"{key}.cache is not set: name the folder that jobs.prepare wrote")
    cache = open_folder(settings.cache)
    return cache, read_manifest(cache)


def _check_autoencoder(
    autoencoder: KLAutoencoder, settings: AutoencoderSettings, manifest: Manifest, cache: Folder
) -> None:
    if manifest.kind != "latents":
        raise ValueError(
            f"data.cache {cache} holds {manifest.kind}; this family learns on latents: make them "
            "with `python -m jobs.prepare latents`"
        )
    wanted = {"autoencoder": autoencoder.fingerprint()}
    made_by = {"autoencoder": manifest.identity.get("latent", {}).get("autoencoder")}
    if differences := identity_difference(wanted, made_by):
        raise ValueError(
            f"data.cache {cache} was made by another autoencoder than autoencoder.path "
            f"{settings.path}: {'; '.join(differences)}"
        )


def _statistics(
    autoencoder: KLAutoencoder, settings: AutoencoderSettings, manifest: Manifest
) -> dict[str, tuple[float, ...]]:
    if settings.mean is not None and settings.std is not None:
        return {"mean": settings.mean, "std": settings.std}
    if settings.normalization == "channels":
        if manifest.latent_statistics is None:
            raise ValueError("the cache is empty: it has no latent statistics")
        found = manifest.latent_statistics
        return {"mean": found.mean, "std": found.std}
    mean, std = autoencoder.latent_mean.flatten(), autoencoder.latent_std.flatten()
    return {"mean": tuple(mean.tolist()), "std": tuple(std.tolist())}


def _check_latent_shape(recipe: FamilyRecipe, manifest: Manifest, cache: Folder) -> None:
    latent = recipe.model_dump().get("latent") or {}
    wanted = [latent.get(key) for key in ("channels", "height", "width")]
    for found in manifest.all_shapes("latent_mean") | manifest.all_shapes("latent"):
        if any(size not in (None, other) for size, other in zip(wanted, found, strict=True)):
            raise ValueError(
                f"data.cache {cache} holds latents of shape {found}, the recipe's latent is "
                f"{' x '.join('any' if size is None else str(size) for size in wanted)}"
            )
