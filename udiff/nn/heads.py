"""Queries, keys and values of the heads of an attention layer."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from udiff.nn.norm import RMSNorm, by_hand, inverse_rms
from udiff.nn.rotary import RotaryTable, rotate


class Heads(NamedTuple):
    """What attention takes."""

    q: Float[Tensor, "batch heads tokens head_dim"]
    k: Float[Tensor, "batch heads tokens head_dim"]
    v: Float[Tensor, "batch heads tokens head_dim"]


def split_heads(qkv: Float[Tensor, "batch tokens all"], num_heads: int) -> Heads:
    """Split channels ordered (query, key or value; head; channel of the head)."""
    parts = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return Heads(*parts.unbind(0))


def rotary_heads(
    qkv: Float[Tensor, "batch tokens all"],
    num_heads: int,
    *,
    positions: RotaryTable,
    q_norm: nn.Module,
    k_norm: nn.Module,
) -> Heads:
    """Split channels as `split_heads`; normalize queries and keys, then turn them by position.

    Args:
        qkv: channels ordered (query, key or value; head; channel of the head).
        num_heads: of each.
        positions: how far each token's pairs are turned.
        q_norm: acts on a head's channels; `nn.Identity` where queries are not normalized.
        k_norm: the same for keys.
    """
    if by_hand(qkv) and all(isinstance(norm, RMSNorm | nn.Identity) for norm in (q_norm, k_norm)):
        parts, weight, eps = qkv.unflatten(-1, (3, num_heads, -1)), None, 0.0
        if isinstance(q_norm, RMSNorm) and isinstance(k_norm, RMSNorm):
            weight, eps = torch.stack([q_norm.weight, k_norm.weight])[:, None], q_norm.eps
        return Heads(*RotaryHeads.apply(parts, weight, positions, eps))
    q, k, v = split_heads(qkv, num_heads)
    return Heads(rotate(q_norm(q), positions), rotate(k_norm(k), positions), v)


class RotaryHeads(torch.autograd.Function):
    """`rotary_heads` of (batch, tokens, 3, heads, head_dim): with RMS norms, or without norms."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, weight: Tensor | None, positions: RotaryTable, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Turn queries and keys together; values are a view."""
        turn, x = _turn(positions), qkv[:, :, :2]
        if weight is None:
            ctx.save_for_backward(turn)
            turned = torch.view_as_real(_pairs(x) * turn).flatten(-2)
        else:
            n = inverse_rms(x, eps)
            ctx.save_for_backward(turn, qkv, weight, n)
            turned = (x * n).mul_(weight)
            _pairs(turned).mul_(turn)
        q, k = turned.transpose(1, 3).unbind(2)
        return q, k, qkv[:, :, 2].transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Write all three gradients to where the linear layer wants them."""
        turn, *normalized = ctx.saved_tensors
        of_q, of_k, of_v = (g.transpose(1, 2) for g in grads)
        d = of_q.new_empty((*of_q.shape[:2], 3, *of_q.shape[2:]))
        for part, g in enumerate((of_q, of_k)):
            last_axis_dense = g if g.stride(-1) == 1 else g.contiguous()
            torch.mul(_pairs(last_axis_dense), turn[:, :, 0].conj(), out=_pairs(d[:, :, part]))
        d[:, :, 2] = of_v
        d_weight = _undo_norm(d[:, :, :2], *normalized) if normalized else None
        return d, d_weight, None, None


def _undo_norm(d: Tensor, qkv: Tensor, weight: Tensor, n: Tensor) -> Tensor:
    """Turn gradients of x n weight into those of x, in place; returns the weight's."""
    x = qkv[:, :, :2]
    product = (d * x).mul_(n)
    d_weight = product.sum((0, 1, 3))[:, None]
    dot = product.mul_(weight).sum(-1, keepdim=True)
    d.mul_(weight).addcmul_(x, dot.mul_(n).div_(-x.shape[-1])).mul_(n)
    return d_weight


def _turn(positions: RotaryTable) -> Tensor:
    """Make the complex number of each pair, (batch or 1, tokens, 1, 1, pairs)."""
    turn = torch.complex(positions.cos, positions.sin)[..., :, None, None, :]
    return turn if turn.ndim == 5 else turn[None]


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
