"""A small Versatile Diffusion to test with: random encoders, a real cache, tiny stages."""

from pathlib import Path

from pipelines.latents import LatentsChain, plan_latents
from pipelines.latents_settings import FeatureSettings, LatentsSettings, TextSettings
from pipelines.picture_files import open_pictures
from tests.made import draw_pictures, save_autoencoder, save_clip, save_optimus, write_pictures
from udiff.data.manifest import finish
from udiff.data.storage import open_folder
from udiff.recipe import load_recipe
from udiff.system import FamilyRecipe

CAPTIONS = ("a red apple", "a blue bird in a tree", "two cats on a mat", "", "the sun, at night!")
NETWORK = (
    "network={channels: 32, multipliers: [1, 2], num_blocks: [1, 1], has_context: [true, false], "
    "num_heads: 2, context_dim: 24}"
)


def make_versatile(folder: Path, *, rows: int = 96) -> None:
    """Save encoders, and cache what they make of pictures and captions."""
    save_autoencoder(folder / "autoencoder")
    save_clip(folder / "clip")
    save_optimus(folder / "optimus", CAPTIONS)
    write_pictures(folder / "pictures", draw_pictures(rows, 32), captions=CAPTIONS)
    write_cache(folder)


def write_cache(folder: Path) -> None:
    """Run the chain of `jobs.prepare latents` in this process."""
    clip, optimus = str(folder / "clip"), str(folder / "optimus")
    settings = LatentsSettings(
        input=str(folder / "pictures"),
        output=str(folder / "latents"),
        autoencoder=str(folder / "autoencoder"),
        texts=(
            TextSettings(name="clip_text", encoder="clip", path=clip, max_tokens=20, trim=False),
            TextSettings(
                name="text_latent", encoder="optimus", path=optimus, max_tokens=40, trim=False
            ),
        ),
        features=(FeatureSettings(name="clip_image", encoder="clip", path=clip),),
        row_group_size=32,
    )
    plan = plan_latents(settings)
    chain = LatentsChain(settings, plan)
    units = open_pictures(settings.input).units()
    for unit in units:
        chain(unit)
    finish(open_folder(settings.output), plan, [unit.name for unit in units])


def small_recipe(folder: Path, *overrides: str, name: str = "debug") -> FamilyRecipe:
    """Load a stage's recipe at a size for tests, on what `make_versatile` wrote."""
    paths = {
        "data.cache": "latents",
        "autoencoder.path": "autoencoder",
        "clip.path": "clip",
        "text_autoencoder.path": "optimus",
    }
    return load_recipe(
        f"versatile/{name}",
        [
            NETWORK,
            "text_dim=20",
            "train.batch_size=16",
            "train.images=96",
            "train.log_every=1",
            "train.checkpoint_every=2",
            "train.keep_checkpoints=9",
            "optimizer.warmup_steps=2",
            "initialize_from=null",
            *(f"{key}={folder / value}" for key, value in paths.items()),
            *overrides,
        ],
    )
