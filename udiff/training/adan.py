"""Adan: adaptive Nesterov momentum (arXiv 2208.06677, algorithm 1)."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from udiff.training.shard import local_parts

STATES = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad")


class Adan(Optimizer):
    """Adan over parameters that have a gradient; names of the states are the published code's.

    With d = g - g_previous (0 at a parameter's first gradient), k counting its gradients:

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) d,  n = b3 n + (1 - b3) (g + b2 d)^2
        p -= lr / (sqrt(n / (1 - b3^k)) + eps) (m / (1 - b1^k) + b2 v / (1 - b2^k))

    The published code also clips: by the norm of what one process holds (its shard, under ZeRO).
    Here the trainer clips, by the norm of all; g is the clipped gradient, and so is g_previous.
    The published code counts k per group: the same but for parameters that start later.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        proximal: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "proximal": proximal,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters; `closure`, if any, computes the loss and gradients anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self._state(p) for p in parameters]
        m, v, n, negative = (local_parts(state[name] for state in states) for name in STATES)
        grads = local_parts(p.grad for p in parameters if p.grad is not None)
        parameters = local_parts(parameters)
        b1, b2, b3 = group["betas"]
        difference = torch._foreach_add(grads, negative)
        torch._foreach_lerp_(m, grads, 1 - b1)
        torch._foreach_lerp_(v, difference, 1 - b2)
        ahead = torch._foreach_add(grads, difference, alpha=b2)
        torch._foreach_mul_(n, b3)
        torch._foreach_addcmul_(n, ahead, ahead, 1 - b3)
        torch._foreach_zero_(negative)
        torch._foreach_sub_(negative, grads)

        counts = [int(state["step"]) for state in states]
        lr, decay = float(group["lr"]), float(group["lr"]) * group["weight_decay"]
        width = torch._foreach_sqrt(n)
        torch._foreach_div_(width, [math.sqrt(1 - b3**k) for k in counts])
        torch._foreach_add_(width, group["eps"])
        if decay and not group["proximal"]:
            torch._foreach_mul_(parameters, 1 - decay)
        torch._foreach_addcdiv_(parameters, m, width, [-lr / (1 - b1**k) for k in counts])
        torch._foreach_addcdiv_(parameters, v, width, [-lr * b2 / (1 - b2**k) for k in counts])
        if decay and group["proximal"]:
            torch._foreach_div_(parameters, 1 + decay)

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Count one more gradient; the first has no difference from the one before."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in STATES[:3]:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["neg_pre_grad"] = -parameter.grad  # type: ignore[operator]
        state["step"] += 1
        return state
