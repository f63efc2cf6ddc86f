"""The autoencoder network of latent diffusion (arXiv 2112.10752), as its checkpoints lay it out.

VA-VAE (arXiv 2501.01423) and MAR's VAE (arXiv 2406.11838) are of this layout too. Attribute names
are the official keys. diffusers' `AutoencoderKL` is the same network but for three things that
official checkpoints have: levels with attention whose first level is wider than the first
convolution, attention in the encoder alone, and embeddings of another width than the encoder's
output.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention, silu

from udiff.autoencoders.kl import Moments, split_moments
from udiff.autoencoders.tiles import map_tiles

Activations = Float[Tensor, "batch channels height width"]
Changed = Float[Tensor, "batch other_channels other_height other_width"]


@dataclass(frozen=True)
class LDMArchitecture:
    """Sizes of the network; each level but the first halves the resolution."""

    width: int
    """Channels of the first convolution."""
    multipliers: tuple[int, ...]
    """Channels of each level, as multiples of `width`."""
    blocks_per_level: int
    latent_channels: int
    """Channels of the latent (officially `embed_dim`)."""
    hidden_channels: int
    """Channels of the encoder's output, half of them means (officially `z_channels`)."""
    encoder_attention: tuple[int, ...] = ()
    """Levels whose blocks are followed by attention; the middle always has one."""
    decoder_attention: tuple[int, ...] = ()
    norm_groups: int = 32
    dropout: float = 0.0

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)


class LDMConfig(NamedTuple):
    """What diffusers keeps in an autoencoder's `config`, as far as it is asked for."""

    latent_channels: int
    block_out_channels: tuple[int, ...]
    norm_num_groups: int
    latents_mean: None = None
    latents_std: None = None
    shift_factor: None = None
    scaling_factor: float = 1.0


class Encoded(NamedTuple):
    """As diffusers returns it."""

    latent_dist: Moments


class Decoded(NamedTuple):
    """As diffusers returns it."""

    sample: Float[Tensor, "batch 3 height width"]


class LDMAutoencoder(nn.Module):
    """Pixels -> moments, raw latents -> pixels, behind the interface of diffusers' autoencoders."""

    def __init__(self, architecture: LDMArchitecture) -> None:
        """Initialize as PyTorch does: nothing starts at zero."""
        super().__init__()
        self.architecture = architecture
        latent, hidden = architecture.latent_channels, architecture.hidden_channels
        self.encoder = Encoder(architecture)
        self.decoder = Decoder(architecture)
        self.quant_conv = nn.Conv2d(2 * hidden, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, hidden, 1)
        self.use_slicing = self.use_tiling = False
        self.tile_sample_min_size = self.tile_latent_min_size = 0

    @property
    def config(self) -> LDMConfig:
        """Say what diffusers' autoencoders say of themselves."""
        own = self.architecture
        return LDMConfig(own.latent_channels, own.level_channels, own.norm_groups)

    def enable_slicing(self) -> None:
        """Run one picture at a time from now on."""
        self.use_slicing = True

    def enable_tiling(self) -> None:
        """Run pictures larger than a tile in tiles from now on; their sizes are to be set."""
        self.use_tiling = True

    def encode(self, pixels: Float[Tensor, "batch 3 height width"]) -> Encoded:
        """Encode to the distribution of raw latents."""
        moments = self._run(lambda x: self.quant_conv(self.encoder(x)), pixels, encodes=True)
        return Encoded(split_moments(moments))

    def decode(self, raw: Activations) -> Decoded:
        """Decode raw latents."""
        pixels = self._run(lambda x: self.decoder(self.post_quant_conv(x)), raw, encodes=False)
        return Decoded(pixels)

    def _run(self, network: Callable[[Tensor], Tensor], x: Tensor, *, encodes: bool) -> Tensor:
        if self.use_tiling:
            sides = (self.tile_latent_min_size, self.tile_sample_min_size)
            made, side = sides if encodes else sides[::-1]
            network = partial(map_tiles, network, side=side, scale=Fraction(made, side))
        if not self.use_slicing:
            return network(x)
        return torch.cat([network(each) for each in x.split(1)])


class Encoder(nn.Module):
    """Pixels -> twice the hidden channels."""

    def __init__(self, architecture: LDMArchitecture) -> None:
        super().__init__()
        make, channels = _Maker(architecture), architecture.width
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level, out_channels in enumerate(architecture.level_channels):
            attended = level in architecture.encoder_attention
            count = architecture.blocks_per_level
            stage = Level(make, channels, out_channels, count=count, attended=attended)
            channels = out_channels
            if level < len(architecture.multipliers) - 1:
                stage.downsample = Downsample(channels)
            self.down.append(stage)
        self.mid = Middle(make, channels)
        self.norm_out = make.norm(channels)
        self.conv_out = nn.Conv2d(channels, 2 * architecture.hidden_channels, 3, padding=1)

    def forward(self, pixels: Activations) -> Changed:
        """Encode."""
        x = self.conv_in(pixels)
        for stage in self.down:
            x = stage(x)
        return self.conv_out(silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Hidden channels -> pixels; levels are numbered as the encoder's, and run from the last."""

    def __init__(self, architecture: LDMArchitecture) -> None:
        super().__init__()
        make, channels = _Maker(architecture), architecture.level_channels[-1]
        self.conv_in = nn.Conv2d(architecture.hidden_channels, channels, 3, padding=1)
        self.mid = Middle(make, channels)
        stages = []
        for level, out_channels in reversed(list(enumerate(architecture.level_channels))):
            attended = level in architecture.decoder_attention
            count = architecture.blocks_per_level + 1
            stage = Level(make, channels, out_channels, count=count, attended=attended)
            channels = out_channels
            if level:
                stage.upsample = Upsample(channels)
            stages.append(stage)
        self.up = nn.ModuleList(reversed(stages))
        self.norm_out = make.norm(channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, hidden: Activations) -> Changed:
        """Decode."""
        x = self.mid(self.conv_in(hidden))
        for stage in reversed(self.up):
            x = stage(x)
        return self.conv_out(silu(self.norm_out(x)))


class Level(nn.Module):
    """Blocks of one resolution, all or none of them followed by attention, and what leaves it."""

    def __init__(
        self, make: "_Maker", in_channels: int, out_channels: int, *, count: int, attended: bool
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (count - 1)
        self.block = nn.ModuleList(make.block(width, out_channels) for width in widths)
        attentions = count if attended else 0
        self.attn = nn.ModuleList(make.attention(out_channels) for _ in range(attentions))
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Activations) -> Changed:
        """Run the blocks, then leave for the next resolution."""
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        for leave in (self.downsample, self.upsample):
            x = leave(x) if leave is not None else x
        return x


class Middle(nn.Module):
    """Block, attention, block, at the lowest resolution."""

    def __init__(self, make: "_Maker", channels: int) -> None:
        super().__init__()
        self.block_1 = make.block(channels, channels)
        self.attn_1 = make.attention(channels)
        self.block_2 = make.block(channels, channels)

    def forward(self, x: Activations) -> Activations:
        """Run the three."""
        return self.block_2(self.attn_1(self.block_1(x)))


class ResidualBlock(nn.Module):
    """Two convolutions, each after norm and SiLU, beside a shortcut."""

    def __init__(
        self, in_channels: int, out_channels: int, *, norm_groups: int, dropout: float
    ) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, norm_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, norm_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Activations) -> Changed:
        """Add the change."""
        change = self.conv1(silu(self.norm1(x)))
        change = self.conv2(self.dropout(silu(self.norm2(change))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + change


class AttentionBlock(nn.Module):
    """Attention of one head as wide as the activations, between all places of a picture."""

    def __init__(self, channels: int, *, norm_groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, norm_groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Activations) -> Activations:
        """Add what the places attend to."""
        normed = self.norm(x)
        tokens = (layer(normed).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v))
        attended = scaled_dot_product_attention(*tokens)[:, 0].mT.reshape(x.shape)
        return x + self.proj_out(attended)


class Downsample(nn.Module):
    """Halve the sides; zeros are put at the right and the bottom alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Activations) -> Changed:
        """Halve."""
        return self.conv(pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the sides: repeat pixels, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Activations) -> Changed:
        """Double."""
        return self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))


@dataclass(frozen=True)
class _Maker:
    """Makes layers with what all of a network have in common."""

    architecture: LDMArchitecture

    def norm(self, channels: int) -> nn.GroupNorm:
        return _norm(channels, self.architecture.norm_groups)

    def block(self, in_channels: int, out_channels: int) -> ResidualBlock:
        groups, dropout = self.architecture.norm_groups, self.architecture.dropout
        return ResidualBlock(in_channels, out_channels, norm_groups=groups, dropout=dropout)

    def attention(self, channels: int) -> AttentionBlock:
        return AttentionBlock(channels, norm_groups=self.architecture.norm_groups)


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)
