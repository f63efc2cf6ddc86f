"""The HTTP API: images in OpenAI's shape, from whatever engine it is given."""

import asyncio
import time
from typing import Any

from fastapi import FastAPI, Request

from serve.errors import ApiError, install_error_handlers
from serve.images import ImagesRequest, ImagesResponse, plan, write_response
from serve.limits import Admission, BodyLimit, Limits, answer_in_time
from serve.metrics import RequestCounter, image_counter
from serve.records import EngineClient, EngineStoppedError, InvalidOrderError, ModelFacts

HEALTH_TIMEOUT_S = 5.0


def build_api(engine: EngineClient, limits: Limits) -> FastAPI:
    """Make the API over an engine, which is first asked when a request comes."""
    api = FastAPI(title="udiff", docs_url=None, redoc_url=None)
    model = _ServedModel(engine)
    admission = Admission(limits)
    num_images = image_counter()
    started = int(time.time())
    install_error_handlers(api)
    api.add_middleware(BodyLimit, limits=limits)
    api.add_middleware(RequestCounter)  # the outermost: it sees what the limit refuses

    @api.post("/v1/images/generations")
    async def create_images(request: ImagesRequest, http: Request) -> ImagesResponse:
        with admission.admit():
            answer = model.answer(request)
            response = await answer_in_time(http, answer, deadline_s=limits.deadline_s)
        num_images.inc(len(response.data))
        return response

    @api.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        facts = await model.describe()
        return {"object": "list", "data": [_model_object(facts, started)]}

    @api.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok", "model": (await model.describe()).name}

    return api


class _ServedModel:
    """The engine, with the API's requests, answers and errors."""

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

    async def answer(self, request: ImagesRequest) -> ImagesResponse:
        """Check a request, have its pictures made, and write the answer."""
        order = plan(request, self._facts or await self.describe())
        try:
            images = await self._engine.generate(order)
        except InvalidOrderError as error:
            raise ApiError(400, str(error), code="invalid_value") from None
        except EngineStoppedError:
            raise _unavailable() from None
        return await asyncio.to_thread(write_response, images, order)


def _unavailable() -> ApiError:
    message = "The engine is not available at the moment."
    return ApiError(503, message, code="engine_unavailable", headers={"Retry-After": "5"})


def _model_object(facts: ModelFacts, started: int) -> dict[str, Any]:
    return {
        "id": facts.name,
        "object": "model",
        "created": started,
        "owned_by": "udiff",
        "size": facts.size,
        "num_classes": facts.num_classes,
        "class_names": facts.class_names,
    }
