"""Optimizers and their schedules."""

import math

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from udiff.settings import AdanSettings, OptimizerSettings, ScheduledSettings
from udiff.training.adan import Adan


def make_optimizer(modules: list[nn.Module], settings: OptimizerSettings) -> Optimizer:
    """Make the optimizer of the modules' trainable parameters; its rate is set at every step."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
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
    )


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
