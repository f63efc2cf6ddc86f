"""The HTTP API: OpenAI's shapes where there is one, from whatever engine it is given."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request

from serve.chat import ChatRequest, ChatResponse, plan_chat, write_chat
from serve.errors import ApiError, install_error_handlers
from serve.images import ImagesRequest, ImagesResponse, plan_images, write_images
from serve.limits import Admission, BodyLimit, Limits, answer_in_time
from serve.metrics import RequestCounter, output_counter
from serve.records import EngineClient, EngineStoppedError, InvalidOrderError, ModelFacts, Order
from serve.tasks import TaskRequest, TaskResponse, plan_task, write_outputs

HEALTH_TIMEOUT_S = 5.0

Response = TypeVar("Response")


def build_api(engine: EngineClient, limits: Limits) -> FastAPI:
    """Make the API over an engine, which is first asked when a request comes."""
    api = FastAPI(title="udiff", docs_url=None, redoc_url=None)
    model = _ServedModel(engine)
    admission = Admission(limits)
    num_outputs = output_counter()
    started = int(time.time())
    install_error_handlers(api)
    api.add_middleware(BodyLimit, limits=limits)
    api.add_middleware(RequestCounter)  # the outermost: it sees what the limit refuses

    async def answer(
        http: Request,
        plan: Callable[[ModelFacts], Order],
        write: Callable[[Sequence[Any], Order], Response],
    ) -> Response:
        with admission.admit():
            order, outputs = await answer_in_time(
                http, model.answer(plan), deadline_s=limits.deadline_s
            )
            num_outputs.inc(len(outputs), {"task": order.task})
            return await asyncio.to_thread(write, outputs, order)

    @api.post("/v1/images/generations")
    async def create_images(request: ImagesRequest, http: Request) -> ImagesResponse:
        return await answer(http, lambda facts: plan_images(request, facts), write_images)

    @api.post("/v1/chat/completions")
    async def create_chat(request: ChatRequest, http: Request) -> ChatResponse:
        facts = await model.facts()
        return await answer(
            http,
            lambda facts: plan_chat(request, facts),
            lambda texts, order: write_chat(texts, order, facts.name),
        )

    @api.post("/v1/tasks/{task}")
    async def create_outputs(task: str, request: TaskRequest, http: Request) -> TaskResponse:
        return await answer(http, lambda facts: plan_task(task, request, facts), write_outputs)

    @api.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        facts = await model.describe()
        return {"object": "list", "data": [_model_object(facts, started)]}

    @api.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok", "model": (await model.describe()).name}

    return api


class _ServedModel:
    """The engine, with the API's errors."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._facts: ModelFacts | None = None

    async def describe(self) -> ModelFacts:
        """Ask the engine what it serves, which also tells whether it works."""
        try:
            self._facts = await asyncio.wait_for(self._engine.describe(), HEALTH_TIMEOUT_S)
        except (TimeoutError, EngineStoppedError):
            raise _unavailable() from None
        return self._facts

    async def facts(self) -> ModelFacts:
        """Tell what is served, from memory where it is known."""
        return self._facts or await self.describe()

    async def answer(self, plan: Callable[[ModelFacts], Order]) -> tuple[Order, Sequence[Any]]:
        """Check a request, and have its outputs made."""
        order = plan(await self.facts())
        try:
            return order, await self._engine.generate(order)
        except InvalidOrderError as error:
            raise ApiError(400, str(error), code="invalid_value") from None
        except EngineStoppedError:
            raise _unavailable() from None


def _unavailable() -> ApiError:
    message = "The engine is not available at the moment."
    return ApiError(503, message, code="engine_unavailable", headers={"Retry-After": "5"})


def _model_object(facts: ModelFacts, started: int) -> dict[str, Any]:
    sizes = [task.size for task in facts.tasks.values() if task.size]
    return {
        "id": facts.name,
        "object": "model",
        "created": started,
        "owned_by": "udiff",
        "size": sizes[0] if sizes else None,
        "num_classes": facts.num_classes,
        "class_names": facts.class_names,
        "tasks": {
            name: {"output": task.output, "request": task.request}
            for name, task in facts.tasks.items()
        },
    }
