"""Options of a command line that are settings: each has the default that its setting has."""

import argparse
from collections.abc import Callable
from typing import Any, TypeVar

from udiff.settings import Settings

Group = TypeVar("Group", bound=Settings)


def adder(parser: argparse.ArgumentParser, settings: type[Settings]) -> Callable[..., None]:
    """Give a function that adds an option for the setting of its name.

    An option that is not given is not among those parsed.
    """

    def add(option: str, about: str, **how: Any) -> None:
        field = settings.model_fields[option.replace("-", "_")]
        required = field.is_required()
        shown = about if required else f"{about} (default: {_shown(field.default)})"
        parser.add_argument(
            f"--{option}", required=required, default=argparse.SUPPRESS, help=shown, **how
        )

    return add


def take(options: dict[str, Any], settings: type[Group]) -> Group:
    """Take the options that belong to a group of settings out of those parsed."""
    names = settings.model_fields.keys() & options.keys()
    return settings(**{name: options.pop(name) for name in names})


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or "none"
    return str(default)
