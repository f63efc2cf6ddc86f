"""KL autoencoders (arXiv 2112.10752): an adapter over diffusers' `AutoencoderKL`."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from udiff.weights import hash_module

LOGVAR_RANGE = (-30.0, 20.0)


class Moments(NamedTuple):
    """Diagonal normal distribution of raw (not normalized) latents."""

    mean: Float[Tensor, "batch channels height width"]
    logvar: Float[Tensor, "batch channels height width"]

    def sample(
        self, noise: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Place standard normal noise into the distribution."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Float[Tensor, ""]:
        """Compute the divergence from the standard normal, averaged over the latent's elements."""
        return self.elementwise_kl().mean()

    def elementwise_kl(self) -> Float[Tensor, "batch channels height width"]:
        """Compute the divergence from the standard normal of each element."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar)

    def kl_from(self, other: "Moments") -> Float[Tensor, " batch"]:
        """Compute the divergence from another distribution, summed over the latent."""
        scaled = (self.mean - other.mean).square() / other.logvar.exp()
        ratio = self.logvar - other.logvar
        return 0.5 * (scaled + ratio.exp() - 1 - ratio).sum((1, 2, 3))

    def nll(self, raw: Float[Tensor, "batch channels height width"]) -> Float[Tensor, " batch"]:
        """Compute -log of the density at raw latents, summed over the latent."""
        scaled = (raw - self.mean).square() / self.logvar.exp()
        return 0.5 * (math.log(2 * math.pi) + self.logvar + scaled).sum((1, 2, 3))


class Reconstruction(NamedTuple):
    """What an autoencoder makes of pixels."""

    pixels: Float[Tensor, "batch 3 height width"]
    moments: Moments
    raw: Float[Tensor, "batch channels h w"]
    """The latent that was sampled and decoded, not normalized."""


def split_moments(
    moments: Float[Tensor, "batch twice_channels height width"],
) -> Moments:
    """Read a network's output as means and log variances; these are kept within `LOGVAR_RANGE`."""
    mean, logvar = moments.chunk(2, dim=1)
    return Moments(mean.clone(), logvar.clamp(*LOGVAR_RANGE))  # FSDP warns of views


class KLAutoencoder(nn.Module):
    """Encode pixels in [-1, 1] to normalized latents, and back.

    A normalized latent is (raw - shift) * scale, channel by channel: diffusers' scaling and shift
    factors, or per-channel statistics where they are known.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, model: Any) -> None:
        """Wrap a diffusers `AutoencoderKL`, which has no types, or what looks like one."""
        super().__init__()
        self.model = model
        config = model.config
        mean, std = config.latents_mean, config.latents_std
        if mean is None or std is None:
            mean, std = config.shift_factor or 0.0, 1 / config.scaling_factor
        self.register_buffer("latent_mean", _per_channel(mean, config.latent_channels), False)
        self.register_buffer("latent_std", _per_channel(std, config.latent_channels), False)

    def set_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Normalize by these statistics of each channel from now on."""
        channels = self.model.config.latent_channels
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != channels:
                raise ValueError(
                    f"autoencoder.{name} has {len(values)} values, the autoencoder has {channels} "
                    "channels"
                )
        self.latent_mean.copy_(_per_channel(mean, channels))
        self.latent_std.copy_(_per_channel(std, channels))

    def save_memory(self, *, sliced: bool = False, tile: int | None = None) -> None:
        """Encode and decode one picture at a time, and large ones in tiles, from now on.

        Args:
            sliced: changes nothing but the last bits, and the memory.
            tile: side of the overlapping squares in pixels; what is larger is cut into them, which
                changes its values a little (group norm and attention see one square).

        Raises:
            ValueError: a fourth of a tile, by which neighbors overlap, is no whole latent.
        """
        if sliced:
            self.model.enable_slicing()
        if tile is None:
            return
        if tile % (4 * self.downscale):
            raise ValueError(
                f"autoencoder.tile must be a multiple of {4 * self.downscale}, 4 latents of this "
                f"autoencoder, got {tile}"
            )
        self.model.enable_tiling()
        self.model.tile_sample_min_size = tile
        self.model.tile_latent_min_size = tile // self.downscale

    @property
    def downscale(self) -> int:
        """Pixels along one side of a latent element."""
        return 2 ** (len(self.model.config.block_out_channels) - 1)

    def forward(
        self,
        pixels: Float[Tensor, "batch 3 height width"],
        noise: Float[Tensor, "batch channels h w"],
    ) -> Reconstruction:
        """Encode, sample with the given noise, decode (training goes through here)."""
        moments = self.encode_moments(pixels)
        raw = moments.sample(noise)
        return Reconstruction(self._decode_raw(raw), moments, raw)

    def encode_moments(self, pixels: Float[Tensor, "batch 3 height width"]) -> Moments:
        """Encode to the distribution of raw latents."""
        posterior = self.model.encode(pixels).latent_dist
        return Moments(posterior.mean, posterior.logvar.clamp(*LOGVAR_RANGE))

    def normalize(
        self, raw: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Bring raw latents to the scale that denoisers learn at."""
        return (raw - self.latent_mean) / self.latent_std

    def decode(
        self, latent: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch 3 h w"]:
        """Decode normalized latents to pixels, nominally in [-1, 1]."""
        return self._decode_raw(latent * self.latent_std + self.latent_mean)

    def fingerprint(self) -> str:
        """Hash what encoding depends on: configuration and weights."""
        known = self.model.config
        config = {name: getattr(known, name) for name in _IDENTITY_KEYS if hasattr(known, name)}
        return hash_module(self.model, config)

    def _decode_raw(self, raw: Tensor) -> Tensor:
        return self.model.decode(raw).sample


_IDENTITY_KEYS = (
    "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels",
    "layers_per_block", "act_fn", "latent_channels", "norm_num_groups", "use_quant_conv",
    "use_post_quant_conv", "mid_block_add_attention",
)  # fmt: skip


def load_diffusers_autoencoder(path: str) -> KLAutoencoder:
    """Load a hub id or a local folder of diffusers (an autoencoder's, or a pipeline's with `vae/`).

    Raises:
        FileNotFoundError: there is no such folder, and no such model on the hub.
    """
    from diffusers import AutoencoderKL

    subfolder = "vae" if (Path(path) / "vae" / "config.json").exists() else None
    try:
        model = AutoencoderKL.from_pretrained(
            path, subfolder=subfolder, use_safetensors=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"autoencoder.path {path!r} is neither a bundle, nor a local diffusers folder with "
            "config.json and safetensors weights, nor a model of the hub that can be reached"
        ) from error
    return KLAutoencoder(model).eval().requires_grad_(False)


def _per_channel(value: float | list[float] | tuple[float, ...], channels: int) -> Tensor:
    return torch.tensor(value, dtype=torch.float32).expand(channels).clone().view(-1, 1, 1)
