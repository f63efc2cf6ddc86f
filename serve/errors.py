"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

import json
import logging
from collections.abc import Iterable, Mapping

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import Response

logger = logging.getLogger(__name__)


class ApiError(HTTPException):
    """An answer other than pictures.

    It is an `HTTPException`, so that it also passes through FastAPI's reading of the body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param = param
        self.code = code


def invalid(param: str, problem: str) -> ApiError:
    """Say what is wrong with a parameter's value."""
    return ApiError(400, f"{param} {problem}", param=param, code="invalid_value")


def missing_task(wanted: str, tasks: Iterable[str]) -> ApiError:
    """Say that the model can't do what an endpoint is for."""
    message = f"This model does not make {wanted}; its tasks are {', '.join(tasks)}."
    return ApiError(404, message, code="task_not_found")


def error_response(error: StarletteHTTPException) -> Response:
    """Write an error as OpenAI's error object."""
    body = {
        "message": error.detail,
        "type": _error_type(error.status_code),
        "param": getattr(error, "param", None),
        "code": getattr(error, "code", None),
    }
    # Escaped to ASCII: a message may quote half a surrogate pair, which UTF-8 can't hold.
    text = json.dumps({"error": body})
    return Response(text, error.status_code, error.headers, media_type="application/json")


def install_error_handlers(api: FastAPI) -> None:
    """Give every error of the API OpenAI's shape, unknown routes and bugs included."""

    @api.exception_handler(StarletteHTTPException)
    async def on_http_error(_: Request, error: StarletteHTTPException) -> Response:
        return error_response(error)

    @api.exception_handler(RequestValidationError)
    async def on_invalid_request(_: Request, error: RequestValidationError) -> Response:
        return error_response(_explain(error))

    @api.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(ApiError(500, "The server failed on this request.", code="internal"))


def _error_type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def _explain(error: RequestValidationError) -> ApiError:
    problem = error.errors()[0]
    kind, message = problem["type"], problem["msg"]
    if kind == "json_invalid":
        reason = problem["ctx"]["error"]
        return ApiError(400, f"The body is not valid JSON: {reason}", code="invalid_json")
    param = ".".join(str(part) for part in problem["loc"][1:]) or None
    if kind == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: {param!r}", param=param, code="unknown_parameter")
    if kind == "missing" and param is not None:
        return ApiError(400, f"Missing parameter: {param!r}", param=param, code="missing_parameter")
    where = f"{param!r}" if param else "the body"
    return ApiError(400, f"Invalid {where}: {message}", param=param, code="invalid_value")
