"""The Ray that a job runs on: the one that is there, or one of its own on this machine."""

import logging
from collections.abc import Callable
from typing import TypeVar

import ray

Settings = TypeVar("Settings")
Plan = TypeVar("Plan")
Report = TypeVar("Report")


def connect(*, log_to_driver: bool = False) -> None:
    """Join the running Ray, or start one; it ends with the process.

    Takes the Ray of this process, else the cluster that `RAY_ADDRESS` names (as under
    `ray job submit`), else starts one with all CPUs of this machine.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    ray.init(logging_level=logging.ERROR, log_to_driver=log_to_driver, include_dashboard=False)


def plan_and_make(
    settings: Settings, plan: Callable[[Settings], Plan], make: Callable[[Settings, Plan], Report]
) -> Report:
    """Check all that can be checked without Ray, and only then make it on one."""
    planned = plan(settings)
    connect()
    return make(settings, planned)
