"""Networks of MDTv2 and MDT: Masked Diffusion Transformers (arXiv 2303.14389, v2 and v1).

Attribute names are the official checkpoints' keys. Time is the DDPM timestep: 0 = least noise.
"""

from abc import ABC, abstractmethod
from typing import cast

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from udiff.models.mdtv2.layers import (
    Block,
    BlockSizes,
    FinalLayer,
    LabelEmbedder,
    PatchEmbedder,
    SkipBlock,
    TimestepEmbedder,
    sincos_table,
    unpatchify,
)
from udiff.nn.features import pick_feature
from udiff.nn.token_mask import is_removed, keep_tokens, restore_tokens
from udiff.system import Prediction

Tokens = Float[Tensor, "batch tokens dim"]
Condition = Float[Tensor, "batch dim"]
Features = dict[int, Tensor]


class MaskedTransformer(nn.Module, ABC):
    """What both versions share: embeddings, side interpolater, final layer.

    A masked pass drops tokens before the encoder; in front of the decoder the side interpolater
    guesses them from the others. Without `keep` nothing is dropped, and it does not run.
    """

    def __init__(
        self,
        sizes: BlockSizes,
        *,
        depth: int,
        num_decoder_blocks: int,
        patch_size: int,
        in_channels: int,
        out_channels: int,
        num_labels: int,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        dim = sizes.dim
        positions = sincos_table(dim, sizes.grid_size).float()[None]
        self.pos_embed = nn.Parameter(positions)
        self.decoder_pos_embed = nn.Parameter(positions.clone())
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.x_embedder = PatchEmbedder(in_channels, patch_size, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(num_labels, dim)
        self._add_blocks(sizes, depth - num_decoder_blocks, num_decoder_blocks)
        self.sideblocks = nn.ModuleList([Block(sizes)])
        self.final_layer = FinalLayer(dim, patch_size, out_channels)

    def forward(
        self,
        x_t: Float[Tensor, "batch channels height width"],
        timestep: Num[Tensor, " batch"],
        *,
        label: Int[Tensor, " batch"],
        state: Tokens | None = None,
        keep: Int[Tensor, "batch kept"] | None = None,
        feature_layer: int | None = None,
    ) -> Prediction:
        """Predict the noise and, in as many channels again, where the variance lies in its range.

        Args:
            x_t: noised latent; its sides are the input size.
            timestep: of the process that was trained on, also when sampling skips some.
            label: class, or the number of classes for the null label.
            state: of an earlier call, what its encoder added to the tokens; the encoder is skipped.
            keep: tokens that the encoder sees; all where it is None.
            feature_layer: number of blocks, counted from 1 in the order of their execution without
                the side interpolater, after which tokens are returned (the kept ones).
        """
        condition = self.t_embedder(timestep) + self.y_embedder(label)
        embedded = self.x_embedder(x_t) + self.pos_embed
        features: Features = {}
        if keep is not None:
            rows = self._bias_rows(keep)
            kept = self._encode(keep_tokens(embedded, keep), condition, rows, features)
            encoded = self._interpolate(kept, condition, keep)
        elif state is not None:
            encoded = embedded + state + self.decoder_pos_embed
        else:
            x = self._encode(embedded, condition, None, features)
            encoded, state = x + self.decoder_pos_embed, x - embedded
        decoded = self._decode(encoded, condition, embedded, features)
        output = unpatchify(self.final_layer(decoded, condition), self.patch_size).contiguous()
        return Prediction(output, pick_feature(features, feature_layer), state)

    @property
    @abstractmethod
    def all_blocks(self) -> tuple[nn.Module, ...]:
        """Blocks in the order of their execution, the side interpolater last."""

    @property
    def _side_block(self) -> Block:
        return cast(Block, self.sideblocks[0])

    @abstractmethod
    def _add_blocks(self, sizes: BlockSizes, num_encoder: int, num_decoder: int) -> None:
        """Make the blocks under their official names."""

    @abstractmethod
    def _encode(
        self,
        x: Tokens,
        condition: Condition,
        rows: Int[Tensor, "batch tokens tokens"] | None,
        features: Features,
    ) -> Tokens:
        """Run the blocks before the decoder."""

    @abstractmethod
    def _decode(
        self, x: Tokens, condition: Condition, embedded: Tokens, features: Features
    ) -> Tokens:
        """Run the decoder's blocks."""

    def _interpolate(
        self,
        kept: Float[Tensor, "batch kept dim"],
        condition: Condition,
        keep: Int[Tensor, "batch kept"],
    ) -> Tokens:
        """Guess the dropped tokens; the kept ones pass by the side block unchanged."""
        num_tokens = self.pos_embed.shape[1]
        filler = self.mask_token.to(kept.dtype).expand(len(kept), num_tokens, -1)
        known = restore_tokens(kept, keep, filler) + self.decoder_pos_embed
        guessed = self._side_block(known, condition)
        return torch.where(is_removed(keep, num_tokens)[:, :, None], guessed, known)

    def _bias_rows(self, keep: Int[Tensor, "batch kept"]) -> Int[Tensor, "batch kept kept"]:
        """Find the bias table's rows of the kept pairs, once for all layers."""
        index = self._side_block.attn.rel_pos_bias.relative_position_index
        return index[keep[:, :, None], keep[:, None, :]]


class MDTv2(MaskedTransformer):
    """Version 2: a U-shaped encoder, and a decoder whose blocks all see the embedded input."""

    @property
    def all_blocks(self) -> tuple[nn.Module, ...]:  # noqa: D102
        return (*self.en_inblocks, *self.en_outblocks, *self.de_blocks, *self.sideblocks)

    def _add_blocks(self, sizes: BlockSizes, num_encoder: int, num_decoder: int) -> None:
        half = num_encoder // 2  # the middle block of an odd number is lost, as officially
        self.en_inblocks = nn.ModuleList(Block(sizes) for _ in range(half))
        self.en_outblocks = nn.ModuleList(SkipBlock(sizes) for _ in range(half))
        self.de_blocks = nn.ModuleList(SkipBlock(sizes) for _ in range(num_decoder))

    def _encode(
        self,
        x: Tokens,
        condition: Condition,
        rows: Int[Tensor, "batch tokens tokens"] | None,
        features: Features,
    ) -> Tokens:
        skips = []
        for block in self.en_inblocks:
            x = block(x, condition, rows)
            skips.append(x)
            features[len(features) + 1] = x
        for block in self.en_outblocks:
            x = block(torch.cat([x, skips.pop()], dim=-1), condition, rows)
            features[len(features) + 1] = x
        return x

    def _decode(
        self, x: Tokens, condition: Condition, embedded: Tokens, features: Features
    ) -> Tokens:
        for block in self.de_blocks:
            # The embedding of all tokens, also in the masked pass.
            x = block(torch.cat([x, embedded], dim=-1), condition)
            features[len(features) + 1] = x
        return x


class MDT(MaskedTransformer):
    """Version 1: one stack of blocks, the last of which are the decoder."""

    @property
    def all_blocks(self) -> tuple[nn.Module, ...]:  # noqa: D102
        return (*self.blocks, *self.sideblocks)

    def _add_blocks(self, sizes: BlockSizes, num_encoder: int, num_decoder: int) -> None:
        self.num_encoder_blocks = num_encoder
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(num_encoder + num_decoder))

    def _encode(
        self,
        x: Tokens,
        condition: Condition,
        rows: Int[Tensor, "batch tokens tokens"] | None,
        features: Features,
    ) -> Tokens:
        for block in self.blocks[: self.num_encoder_blocks]:
            x = block(x, condition, rows)
            features[len(features) + 1] = x
        return x

    def _decode(
        self, x: Tokens, condition: Condition, embedded: Tokens, features: Features
    ) -> Tokens:
        for block in self.blocks[self.num_encoder_blocks :]:
            x = block(x, condition)
            features[len(features) + 1] = x
        return x
