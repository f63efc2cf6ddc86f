"""Optimizers and their schedules."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from udiff.settings import AdanSettings, OptimizerSettings, ScheduledSettings
from udiff.system import LayerGroup
from udiff.training.adan import Adan


def make_optimizer(
    modules: list[nn.Module], settings: OptimizerSettings, *, groups: Sequence[LayerGroup] = ()
) -> Optimizer:
    """Make the optimizer of the modules' trainable parameters; its rate is set at every step.

    Layers of `groups` are parameter groups of their own, with `lr_scale` and `gradient_scale`.
    """
    parameters = _parameter_groups(modules, groups)
    if isinstance(settings, AdanSettings):
        return Adan(
            parameters,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            proximal=settings.proximal,
        )
    return AdamW(
        parameters,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def begin_states(optimizer: Optimizer) -> None:
    """Make the states that parameters begin with, of those that may get no gradient for a while.

    A checkpoint then has the state of every parameter, and a resumed run is not another one.

    Raises:
        ValueError: the optimizer begins in another way than AdamW.
    """
    if not isinstance(optimizer, AdamW):
        raise ValueError("optimizer.name must be adamw where steps do not reach all parameters")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def scale_gradients(optimizer: Optimizer) -> None:
    """Multiply the gradients of each group by its factor."""
    for group in optimizer.param_groups:
        scale = group["gradient_scale"]
        grads = [p.grad for p in group["params"] if p.grad is not None]
        if scale != 1 and grads:
            torch._foreach_mul_(grads, scale)


def learning_rate(settings: ScheduledSettings, step: int, num_steps: int) -> float:
    """Compute the rate of a step: linear warm-up, then a cosine from `lr` to its final ratio."""
    if step < settings.warmup_steps:
        return settings.lr * (step + settings.warmup_start) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, num_steps - settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.lr * (settings.final_lr_ratio + (1 - settings.final_lr_ratio) * cosine)


def clip_gradients(optimizer: Optimizer, max_norm: float | None) -> torch.Tensor:
    """Scale gradients down to the norm allowed, and return the norm that they had."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _parameter_groups(
    modules: list[nn.Module], groups: Sequence[LayerGroup]
) -> list[dict[str, Any]]:
    own = [[p for p in group.module.parameters() if p.requires_grad] for group in groups]
    taken = {id(p) for parameters in own for p in parameters}
    rest = [p for m in modules for p in m.parameters() if p.requires_grad and id(p) not in taken]
    scales = [LayerGroup(nn.Identity()), *groups]
    return [
        {"params": parameters, "lr_scale": group.lr_scale, "gradient_scale": group.gradient_scale}
        for parameters, group in zip([rest, *own], scales, strict=True)
        if parameters
    ]
