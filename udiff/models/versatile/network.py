"""The multi-flow network: global, data and context layers that a flow puts together.

A flow takes the time layers (one set), the data blocks of what is generated and the context blocks
of what it is generated from, run in one order for all (arXiv 2211.08332, section 3.2). With several
contexts their blocks' results are mixed by ratio at every place ("attention mixing", section 3.4).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from udiff.models.versatile.layers import (
    ContextBlock,
    Downsample,
    FlatLinear,
    FlatResidual,
    Heads,
    Residual,
    Upsample,
    flat_head,
    grid_head,
)
from udiff.models.versatile.plan import Plan
from udiff.nn.timestep import timestep_features
from udiff.system import Prediction


@runtime_checkable
class DataLayers(Protocol):
    """Makes the data blocks of one kind of data; implement it to add another kind.

    Features between stem and head are (batch, channels, height, width), whatever that means.
    """

    def stem(self, channels: int) -> nn.Module:
        """Make x_t -> features."""

    def residual(self, channels_in: int, channels_out: int, time_dim: int) -> nn.Module:
        """Make (features, time) -> features."""

    def down(self, channels: int) -> nn.Module:
        """Make what leads to the next level."""

    def up(self, channels: int) -> nn.Module:
        """Make what leads back."""

    def head(self, channels: int) -> nn.Module:
        """Make features -> prediction, shaped like x_t."""


class ImageLayers(NamedTuple):
    """Data blocks of latents (channels, height, width)."""

    in_channels: int = 4
    out_channels: int = 4
    dropout: float = 0.0

    def stem(self, channels: int) -> nn.Module:
        """Make a convolution."""
        return nn.Conv2d(self.in_channels, channels, 3, padding=1)

    def residual(self, channels_in: int, channels_out: int, time_dim: int) -> nn.Module:
        """Make a block of 3 x 3 convolutions."""
        return Residual(channels_in, channels_out, time_dim, kernel=3, dropout=self.dropout)

    def down(self, channels: int) -> nn.Module:
        """Halve the resolution."""
        return Downsample(channels)

    def up(self, channels: int) -> nn.Module:
        """Double the resolution."""
        return Upsample(channels)

    def head(self, channels: int) -> nn.Module:
        """Make norm and convolution."""
        return grid_head(channels, self.out_channels)


class TextLayers(NamedTuple):
    """Data blocks of vectors, held as grids of `positions` x 1."""

    in_features: int = 768
    out_features: int = 768
    positions: int = 4
    dropout: float = 0.0

    def stem(self, channels: int) -> nn.Module:
        """Make a linear map."""
        return FlatLinear(self.in_features, channels, self.positions)

    def residual(self, channels_in: int, channels_out: int, time_dim: int) -> nn.Module:
        """Make a block of fully connected layers."""
        return FlatResidual(
            channels_in, channels_out, time_dim, positions=self.positions, dropout=self.dropout
        )

    def down(self, channels: int) -> nn.Module:
        """Make a linear map: a vector has no resolution to change."""
        return FlatLinear(channels * self.positions, channels, self.positions)

    def up(self, channels: int) -> nn.Module:
        """Make a linear map, as on the way down."""
        return self.down(channels)

    def head(self, channels: int) -> nn.Module:
        """Make norm and linear map."""
        return flat_head(channels, self.positions, self.out_features)


class ContextLayers(NamedTuple):
    """Context blocks for contexts of one kind."""

    context_dim: int = 768
    heads: Heads = Heads()
    dropout: float = 0.0

    def block(self, channels: int) -> nn.Module:
        """Make one block."""
        return ContextBlock(channels, self.context_dim, self.heads.count(channels), self.dropout)


class Context(NamedTuple):
    """One context of a flow."""

    kind: str
    tokens: Float[Tensor, "batch tokens dim"]
    ratio: float | Shaped[Tensor, " batch"] = 1.0
    """Its share; shares are divided by their sum."""


class Diffuser(nn.Module):
    """The layers that belong to one modality."""

    time_embed: nn.Sequential
    data_blocks: nn.ModuleList
    context_blocks: nn.ModuleList

    def __init__(
        self, plan: Plan, data: DataLayers | None, context: ContextLayers | None, *, has_time: bool
    ) -> None:
        """Make the parts that are there; blocks are one-element sequences, as in the keys."""
        super().__init__()
        if has_time:
            self.time_embed = nn.Sequential(
                nn.Linear(plan.channels, plan.time_dim),
                nn.SiLU(),
                nn.Linear(plan.time_dim, plan.time_dim),
            )
        if data is not None:
            self.data_blocks = _blocks(_data_blocks(plan, data))
        if context is not None:
            self.context_blocks = _blocks(
                context.block(step.channels_in) for step in plan.steps if step.kind == "context"
            )


class VersatileNetwork(nn.Module):
    """Predicts the noise in one kind of data, given contexts of any kinds."""

    def __init__(
        self,
        plan: Plan,
        *,
        data: Mapping[str, DataLayers],
        contexts: Mapping[str, ContextLayers],
        time_owner: str = "image",
    ) -> None:
        """Make the layers of every modality.

        Args:
            plan: the order of blocks, one for all modalities.
            data: kinds of data that can be generated.
            contexts: kinds of contexts that they can be generated from.
            time_owner: modality under whose name the time layers are kept.
        """
        super().__init__()
        self.plan = plan
        self.kinds_of_data, self.kinds_of_context = tuple(data), tuple(contexts)
        self._time_owner = time_owner
        names = dict.fromkeys([time_owner, *data, *contexts])
        self.diffuser = nn.ModuleDict(
            {
                name: Diffuser(
                    plan, data.get(name), contexts.get(name), has_time=name == time_owner
                )
                for name in names
            }
        )

    @property
    def all_blocks(self) -> tuple[nn.Module, ...]:
        """All data and context blocks."""
        groups = (getattr(d, f"{part}_blocks", ()) for d in self.diffuser.values() for part in
                  ("data", "context"))  # fmt: skip
        return tuple(block for group in groups for block in group)

    @property
    def layer_groups(self) -> dict[str, nn.Module]:
        """The time layers, `time`, and each modality's `<name>_data` and `<name>_context`."""
        groups: dict[str, nn.Module] = {"time": self._part(self._time_owner).time_embed}
        for name in self.kinds_of_data:
            groups[f"{name}_data"] = self._part(name).data_blocks
        for name in self.kinds_of_context:
            groups[f"{name}_context"] = self._part(name).context_blocks
        return groups

    def forward(
        self,
        x_t: Float[Tensor, "batch ..."],
        t: Shaped[Tensor, " batch"],
        *,
        data: str,
        contexts: Sequence[Context],
    ) -> Prediction:
        """Predict the noise in x_t.

        Args:
            x_t: noised latents of kind `data`.
            t: DDPM timesteps.
            data: what is generated.
            contexts: what it is generated from; at least one.

        Raises:
            ValueError: there are no such layers, or no context.
        """
        self._check(data, contexts)
        # Under mixed precision inputs are not cast, and weights may be bfloat16 here.
        dtype = self.time_dtype
        x = x_t.to(dtype)
        contexts = [context._replace(tokens=context.tokens.to(dtype)) for context in contexts]
        time = self.embed_time(t, dtype)
        ratios = _shares(contexts, x)
        data_blocks = iter(self._part(data).data_blocks)
        number = 0
        kept: list[Tensor] = []
        for step in self.plan.steps:
            if step.kind == "push":
                kept.append(x)
            elif step.kind == "pop":
                x = torch.cat([x, kept.pop()], dim=1)
            elif step.kind == "context":
                x = self._mix(x, contexts, ratios, number)
                number += 1
            else:
                block = next(data_blocks)
                x = block(x, time) if step.kind == "residual" else block(x)
        return Prediction(x)

    @property
    def time_dtype(self) -> torch.dtype:
        """Element type of the time layers, in which the network computes."""
        return next(self._part(self._time_owner).time_embed.parameters()).dtype

    def embed_time(
        self, t: Shaped[Tensor, " batch"], dtype: torch.dtype
    ) -> Float[Tensor, "batch time_dim"]:
        """Compute what the residual blocks are told of the time."""
        features = timestep_features(t.float(), self.plan.channels, max_period=10_000.0)
        return self._part(self._time_owner).time_embed(features.to(dtype))

    def _mix(
        self, x: Tensor, contexts: Sequence[Context], ratios: Sequence[Tensor], number: int
    ) -> Tensor:
        blocks = [self._part(context.kind).context_blocks[number] for context in contexts]
        if len(contexts) == 1:
            return blocks[0](x, contexts[0].tokens)
        parts = [
            ratio.view(-1, 1, 1, 1) * block(x, context.tokens)
            for block, context, ratio in zip(blocks, contexts, ratios, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def _part(self, name: str) -> Diffuser:
        found = self.diffuser[name]
        assert isinstance(found, Diffuser)
        return found

    def _check(self, data: str, contexts: Sequence[Context]) -> None:
        if data not in self.kinds_of_data:
            raise ValueError(f"this network generates {self.kinds_of_data}, not {data!r}")
        unknown = [c.kind for c in contexts if c.kind not in self.kinds_of_context]
        if unknown or not contexts:
            raise ValueError(
                f"contexts must be of the kinds {self.kinds_of_context}, at least one; got "
                f"{[c.kind for c in contexts]}"
            )


class BlockSequence(nn.Sequential):
    """A block and what else it is given; one element, which is a part of the official keys."""

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """Run the block."""
        [block] = self
        return block(x, *others)


def _data_blocks(plan: Plan, data: DataLayers) -> Iterable[nn.Module]:
    for step in plan.steps:
        match step.kind:
            case "stem":
                yield data.stem(step.channels_out)
            case "residual":
                yield data.residual(step.channels_in, step.channels_out, plan.time_dim)
            case "down":
                yield data.down(step.channels_in)
            case "up":
                yield data.up(step.channels_in)
            case "head":
                yield data.head(step.channels_in)


def _blocks(blocks: Iterable[nn.Module]) -> nn.ModuleList:
    return nn.ModuleList(BlockSequence(block) for block in blocks)


def _shares(contexts: Sequence[Context], like: Tensor) -> list[Tensor]:
    """Divide ratios, one number or one for each sample, by their sum."""
    ratios = [torch.as_tensor(context.ratio, dtype=torch.float64) for context in contexts]
    total = torch.stack(torch.broadcast_tensors(*ratios)).sum(0)
    return [(ratio.to(total.device) / total).to(like.device, like.dtype) for ratio in ratios]
