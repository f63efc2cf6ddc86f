"""The training loop.

A step is a function of (weights, sample positions, draws), and both positions and draws are
functions of (seed, step): a run that was killed goes on from its last checkpoint and ends with the
weights of a run that never was.
"""

import math
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from udiff.settings import EmaSettings, TrainSettings
from udiff.system import Batch, Draws, Losses, Phase, Rng, System
from udiff.training.checkpoint import Checkpoints
from udiff.training.ema import Ema
from udiff.training.log import FolderLock, MetricsLog
from udiff.training.optimizer import (
    begin_states,
    clip_gradients,
    learning_rate,
    make_optimizer,
    scale_gradients,
)
from udiff.training.run import Run
from udiff.training.shard import set_gradient_sync, shard

Batches = Callable[[int], Generator[Batch, None, None]]
"""Given the first step, yields this rank's part of every batch from there on."""


@dataclass(frozen=True)
class Trained:
    """What a run ends with; the weights are full tensors on rank 0, and empty on others."""

    weights: dict[str, Tensor]
    num_steps: int
    images_per_s: float
    """Over the steps of this process, without its start."""


def check_batch(settings: TrainSettings, world_size: int) -> None:
    """Check that a batch can be dealt out evenly.

    Raises:
        ValueError: it can't.
    """
    parts = world_size * settings.accumulate
    if settings.batch_size % parts:
        raise ValueError(
            f"train.batch_size must be a multiple of workers x train.accumulate = {parts}, got "
            f"{settings.batch_size}"
        )


def train(
    system: System,
    batches: Batches,
    settings: TrainSettings,
    *,
    ema: EmaSettings | None,
    folder: Path,
    run: Run,
) -> Trained:
    """Train a system to the end of its run, from the newest checkpoint in `folder`.

    Raises:
        ValueError: the batch does not divide by the ranks; a parameter has no gradient.
        TimeoutError: another job is training into `folder`.
    """
    check_batch(settings, run.world_size)
    lock = FolderLock(folder, timeout_s=60) if run.rank == 0 else None
    dist.barrier()
    try:
        return _Trainer(system, settings, ema, folder, run).fit(batches)
    finally:
        if lock:
            lock.release()


class _Trainer:
    def __init__(
        self,
        system: System,
        settings: TrainSettings,
        ema: EmaSettings | None,
        folder: Path,
        run: Run,
    ) -> None:
        shard(system, settings, run)
        self._system = system
        self._settings = settings
        self._run = run
        self._folder = folder
        self._rng = Rng(settings.seed, run.rank, run.world_size, run.device)
        self._optimizers = [self._make_optimizer(phase) for phase in system.phases]
        averaged = {name: system.modules[name] for name in system.ema_modules}
        self._ema = Ema(averaged, ema) if ema else None
        self._checkpoints = Checkpoints(
            folder / "checkpoints", nn.ModuleDict(system.modules), self._optimizers, self._ema
        )

    def _make_optimizer(self, phase: Phase) -> Optimizer:
        optimizer = make_optimizer(self._modules(phase), phase.optimizer, groups=phase.groups)
        if phase.find_idle is not None:
            begin_states(optimizer)
        return optimizer

    def fit(self, batches: Batches) -> Trained:
        settings, rank0 = self._settings, self._run.rank == 0
        first_step = self._checkpoints.restore()
        log = MetricsLog(self._folder, from_step=first_step) if rank0 else None
        self._save(first_step)
        meter = _Meter()
        with closing(batches(first_step)) as stream:
            for step in range(first_step, settings.num_steps):
                metrics = self._step(step, next(stream), check=step == first_step)
                finished = step + 1
                meter.tick()
                if finished % settings.log_every == 0 or finished in (1, settings.num_steps):
                    rate = meter.steps_per_s() * settings.batch_size
                    self._log(log, finished, metrics, images_per_s=rate)
                if finished % settings.checkpoint_every == 0:
                    self._save(finished)
        self._save(settings.num_steps)
        if log:
            log.close()
        images_per_s = meter.steps_per_s(whole_run=True) * settings.batch_size
        return Trained(self._collect_weights(), settings.num_steps, images_per_s)

    def _step(self, step: int, batch: Batch, *, check: bool) -> dict[str, Tensor]:
        batch = {name: t.to(self._run.device, non_blocking=True) for name, t in batch.items()}
        metrics: dict[str, Tensor] = {}
        for number, phase in enumerate(self._system.phases):
            draws = phase.draw(batch, self._rng.at(step, phase=number))
            losses = self._backward(phase, batch, draws)
            batch |= losses.carry
            if check:
                self._check_gradients(phase, draws)
            norm = self._update(phase, self._optimizers[number], step)
            prefix = f"{phase.name}/" if len(self._system.phases) > 1 else ""
            terms = {**losses.terms, "loss": losses.total, "grad_norm": norm}
            metrics |= {f"{prefix}{name}": value for name, value in terms.items()}
        if self._ema:
            self._ema.update(step)
        return metrics

    def _backward(self, phase: Phase, batch: Batch, draws: Draws) -> Losses:
        """Add the gradients of all micro-batches up; returns their mean losses."""
        parts = self._settings.accumulate
        size = self._settings.batch_size // self._run.world_size // parts
        sums: dict[str, Tensor] = {}
        carried: list[dict[str, Tensor]] = []
        for part in range(parts):
            rows = slice(part * size, (part + 1) * size)
            set_gradient_sync(self._modules(phase), part == parts - 1)
            losses = phase.loss({k: v[rows] for k, v in batch.items()}, _cut(draws, rows))
            (losses.total / parts).backward()
            for name, value in {**losses.terms, "total": losses.total}.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach() / parts
            carried.append(losses.carry)
        carry = {name: torch.cat([columns[name] for columns in carried]) for name in carried[0]}
        return Losses(sums.pop("total"), sums, carry=carry)

    def _update(self, phase: Phase, optimizer: Optimizer, step: int) -> Tensor:
        """Apply the gradients; returns their norm."""
        scale_gradients(optimizer)
        norm = clip_gradients(optimizer, phase.optimizer.clip_norm)
        rate = learning_rate(phase.optimizer, step, self._settings.num_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        optimizer.step()
        for module in self._system.modules.values():
            module.zero_grad(set_to_none=True)
        return norm.detach()

    def _check_gradients(self, phase: Phase, draws: Draws) -> None:
        """Refuse parameters that never learn: a resume would miss their optimizer state."""
        known = phase.find_idle(draws) if phase.find_idle else ()
        excused = {id(p) for module in known for p in module.parameters()}
        idle = [
            f"{name}.{key}"
            for name in phase.modules
            for key, p in self._system.modules[name].named_parameters()
            if p.requires_grad and p.grad is None and id(p) not in excused
        ]
        if idle:
            raise ValueError(
                f"phase {phase.name} gives no gradient to {', '.join(idle)}: freeze them"
            )

    def _log(
        self,
        log: MetricsLog | None,
        step: int,
        metrics: Mapping[str, Tensor],
        *,
        images_per_s: float,
    ) -> None:
        means = torch.stack([value.float() for value in metrics.values()])
        dist.all_reduce(means)
        means /= self._run.world_size
        values = dict(zip(metrics, means.tolist(), strict=True))
        if not all(math.isfinite(value) for value in values.values()):
            raise FloatingPointError(f"the loss is not finite at step {step}: {values}")
        if log:
            values["images"] = step * self._settings.batch_size
            log.write(step, values | {"images_per_s": images_per_s})
            self._run.report(values | {"step": step, "images_per_s": images_per_s})

    def _save(self, step: int) -> None:
        self._checkpoints.save(step, keep=self._settings.keep_checkpoints)

    def _collect_weights(self) -> dict[str, Tensor]:
        """Gather the averaged (or else the last) weights on rank 0."""
        names = self._system.ema_modules or tuple(self._system.modules)
        modules = {name: self._system.modules[name] for name in names}
        averages = self._ema.averages if self._ema else {}
        weights = {}
        for name, module in modules.items():
            for key, tensor in module.state_dict().items():
                kept = averages.get(f"{name}.{key}", tensor)
                full = kept.full_tensor() if isinstance(kept, DTensor) else kept
                if self._run.rank == 0:
                    weights[f"{name}.{key}"] = full.detach().cpu().clone()
        return weights

    def _modules(self, phase: Phase) -> list[nn.Module]:
        return [self._system.modules[name] for name in phase.modules]


class _Meter:
    """Steps per second, without the first step (it warms up)."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def tick(self) -> None:
        self._times.append(time.perf_counter())

    def steps_per_s(self, *, whole_run: bool = False) -> float:
        times = self._times if whole_run else self._times[-20:]
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0


def _cut(draws: Draws, rows: slice) -> Draws:
    """Cut the draws of some samples out; shared draws, which have no axis, stay whole."""
    return {name: draw[rows] if draw.ndim else draw for name, draw in draws.items()}
