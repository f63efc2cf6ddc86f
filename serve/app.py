"""The Ray Serve application: `serve run serve.app:build bundle=runs/demo/bundle`.

Two deployments: `front` speaks HTTP and holds no torch; `engine` has one replica per device. When
an engine dies, the front asks another one (or its replacement) for the same seeded outputs.
"""

import asyncio
import difflib
from typing import Any, Literal

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from serve.api import build_api
from serve.limits import Limits
from serve.metrics import tick_histogram
from serve.records import EngineStoppedError, ModelFacts, Order, Output

APP_NAME = "udiff"
NUM_TRIES = 2
PROXY_LIMIT = 1000
"""Requests that Serve itself lets through at once; far above the front's own limit."""


class Args(BaseModel):
    """Arguments of the application."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: str
    """Folder that every node reaches."""
    model_name: str | None = None
    """What requests call the model; the recipe's family where left open."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: GPUs where the cluster has any."""
    num_engines: PositiveInt = 1
    """Replicas of the engine, each on a device of its own."""
    cpus_per_engine: PositiveFloat = 1
    max_rows: PositiveInt = 32
    """Rows of the network's batch in a tick; a guided picture takes two."""
    max_requests: PositiveInt = 64
    """Requests in work or waiting at once; one more gets 429."""
    deadline_s: PositiveFloat = 120
    """Time in which a request is answered, waiting included."""


def build(args: dict[str, Any]) -> Application:
    """Build the application.

    Raises:
        ValueError: an argument that it does not know, or a value not allowed.
    """
    return build_application(parse_args(args))


def build_application(args: Args) -> Application:
    """Bind front and engine."""
    args = args.model_copy(update={"device": _resolve_device(args.device)})
    engine = _engine_deployment(args).bind(args)
    limits = Limits(max_requests=args.max_requests, deadline_s=args.deadline_s)
    return front.bind(engine, limits)


def parse_args(args: dict[str, Any]) -> Args:
    """Check arguments, with one readable line for what is wrong."""
    try:
        return Args.model_validate(args)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(problem) for problem in error.errors())) from None


class EngineReplica:
    """An engine in a process of its own."""

    def __init__(self, args: Args) -> None:
        # The front shares this module and must not load torch.
        import torch

        from serve.engine import Engine

        torch.set_num_threads(max(1, int(args.cpus_per_engine)))
        ticks = tick_histogram()
        self._engine = Engine(
            args.bundle,
            device=args.device,
            model_name=args.model_name,
            max_rows=args.max_rows,
            on_tick=ticks.observe,
        )

    async def describe(self) -> ModelFacts:
        """Tell what is served; raise when nothing is any more."""
        self._engine.check()
        return self._engine.facts

    async def generate(self, order: Order) -> list[Output]:
        """Make the outputs of an order."""
        return await self._engine.generate(order)

    async def check_health(self) -> None:
        """Have Serve replace this replica when its tick thread is dead or stuck."""
        self._engine.check()

    def __del__(self) -> None:
        # Serve calls it at a graceful end, and Python may once more.
        if hasattr(self, "_engine"):
            self._engine.close()


class RemoteEngine:
    """The engine's replicas as one engine that outlives each of them."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def describe(self) -> ModelFacts:
        """Ask any replica what is served."""
        return await self._ask("describe")

    async def generate(self, order: Order) -> list[Output]:
        """Have any replica make the outputs, and another one if it dies over them."""
        return await self._ask("generate", order)

    async def _ask(self, method: str, *args: Any) -> Any:
        for _ in range(NUM_TRIES):
            response = getattr(self._handle, method).remote(*args)
            try:
                return await response
            except (RayActorError, EngineStoppedError):
                continue
            except asyncio.CancelledError:
                response.cancel()
                raise
        raise EngineStoppedError(f"{NUM_TRIES} engines ended before they answered")


class Front:
    """The HTTP API in a process without torch."""

    def __init__(self, engine: DeploymentHandle, limits: Limits) -> None:
        self._engine = RemoteEngine(engine)
        self._limits = limits

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._engine, self._limits)


front = serve.deployment(
    name="front",
    max_ongoing_requests=PROXY_LIMIT,
    ray_actor_options={"num_cpus": 0},
    graceful_shutdown_wait_loop_s=0.5,
)(serve.ingress()(Front))


def _engine_deployment(args: Args) -> serve.Deployment:
    num_gpus = 1 if args.device == "cuda" else 0
    return serve.deployment(
        name="engine",
        num_replicas=args.num_engines,
        # The tick loop does the batching; its queue is bounded by the front's admission.
        max_ongoing_requests=PROXY_LIMIT,
        ray_actor_options={"num_cpus": args.cpus_per_engine, "num_gpus": num_gpus},
        health_check_period_s=2,
        graceful_shutdown_wait_loop_s=0.5,
    )(EngineReplica)


def _resolve_device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if ray.cluster_resources().get("GPU", 0) else "cpu"


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{key}: {problem['msg']}, got {problem['input']!r}"
    close = difflib.get_close_matches(key, Args.model_fields, n=1)
    hint = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(Args.model_fields)}"
    return f"{key} is not an argument of the application; {hint}"
