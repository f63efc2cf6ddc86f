"""Training checkpoints: torch DCP folders `step_00001234`, complete once `.metadata` is there.

DCP writes `.metadata` last, by a rename. It is a pickle: load training states only from run folders
that you trust (bundles are safetensors).
"""

import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from udiff.training.ema import Ema


class Checkpoints:
    """The checkpoints of one run folder; every call is made by all ranks together."""

    def __init__(
        self, folder: Path, modules: nn.Module, optimizers: list[Optimizer], ema: Ema | None
    ) -> None:
        self._folder = folder
        self._modules = modules
        self._optimizers = optimizers
        self._ema = ema

    def save(self, step: int, *, keep: int) -> None:
        """Save the state after `step` steps, unless that is done; keep the newest `keep`."""
        folder = self._folder / f"step_{step:08d}"
        if not _agree(_is_complete(folder)):
            dcp.save(self._state(step), checkpoint_id=folder)
        if dist.get_rank() == 0:
            for old in complete_checkpoints(self._folder)[:-keep]:
                (old / ".metadata").unlink()  # incomplete from here on, whatever interrupts us
                shutil.rmtree(old)

    def restore(self) -> int:
        """Load the newest complete checkpoint and return its step; 0 where there is none."""
        found = complete_checkpoints(self._folder)
        # One rank looks and tells the others: a folder may change between two looks.
        newest = [str(found[-1]) if found else None]
        dist.broadcast_object_list(newest, src=0)
        if newest[0] is None:
            return 0
        step = int(newest[0].rpartition("_")[2])
        state = self._state(step)
        dcp.load(state, checkpoint_id=newest[0])
        set_state_dict(
            self._modules,
            self._stepped(step),
            model_state_dict=state["modules"],
            optim_state_dict=state["optimizers"],
            options=StateDictOptions(strict=True),
        )
        return step

    def _state(self, step: int) -> dict:
        modules, optimizers = get_state_dict(self._modules, self._stepped(step))
        ema = self._ema.averages if self._ema else {}
        return {
            "modules": modules,
            "optimizers": optimizers,
            "ema": ema,
            "step": torch.tensor(step),
        }

    def _stepped(self, step: int) -> list[Optimizer]:
        """List the optimizers that have a state after `step` steps: none before the first.

        Of one without, torch would make a state by a step with gradients of 0, and count that step:
        Adam's averages would be off by one for ever after.
        """
        return self._optimizers if step else []


def complete_checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first."""
    return sorted(file.parent for file in folder.glob("step_*/.metadata"))


def _is_complete(folder: Path) -> bool:
    return (folder / ".metadata").exists()


def _agree(answer: bool) -> bool:
    box = [answer]
    dist.broadcast_object_list(box, src=0)
    return bool(box[0])
