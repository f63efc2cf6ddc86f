"""What the endpoints' requests have in common: seeds, counts and the model's name."""

import secrets
from typing import Any

from serve.errors import ApiError
from serve.records import ModelFacts

MAX_OUTPUTS = 10
MAX_SEED = 2**53 - MAX_OUTPUTS
"""Such that every output's seed survives every JSON parser."""


def check_model(name: str | None, facts: ModelFacts) -> None:
    """Refuse a request that names another model.

    Raises:
        ApiError: 404.
    """
    if name not in (None, facts.name):
        raise ApiError(
            404,
            f"The model {name!r} does not exist; this server has {facts.name!r}.",
            param="model",
            code="model_not_found",
        )


def seeds_of(seed: int | None, count: int) -> range:
    """Number the outputs from `seed` on, or from a random one."""
    first = secrets.randbelow(2**31) if seed is None else seed
    return range(first, first + count)


def given(**keys: Any) -> dict[str, Any]:
    """Keep the keys that were said; the recipe has what is left open."""
    return {name: value for name, value in keys.items() if value is not None}
