"""How a job ends: one readable line for what a user can put right, a traceback for a bug."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

DONE, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130


class UserError(Exception):
    """Something that whoever started the job can put right."""


_USER_ERRORS = (
    UserError,
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    PermissionError,
)


def make_parser(module: str, about: str | None) -> argparse.ArgumentParser:
    """Make the parser of `python -m <module>`, which shows the module's own docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_job(job: Callable[[], None], *, failures: tuple[type[Exception], ...] = ()) -> int:
    """Run a job and give its exit status, after one line on stderr where it did not end well.

    Returns:
        0 when it is done, 1 for `failures` and failing disks or networks (it tried and could not),
        2 for what was asked wrongly, 130 for Ctrl-C. Other exceptions are bugs and pass through.
    """
    try:
        job()
    except failures as error:
        return _explain(FAILED, error)
    except _USER_ERRORS as error:
        return _explain(USER_ERROR, error)
    except OSError as error:  # a full disk, a bucket that does not answer
        return _explain(FAILED, error)
    except KeyboardInterrupt:
        return INTERRUPTED
    return DONE


def _explain(status: int, error: Exception) -> int:
    print(f"error: {one_line(error)}", file=sys.stderr)
    return status


def one_line(error: Exception) -> str:
    """Say an error in one line; of a settings error, the keys and what is wrong with each."""
    if isinstance(error, ValidationError):
        return "; ".join(map(_explain_setting, error.errors()))
    return " ".join(str(error).split())


def _explain_setting(problem: Any) -> str:
    key = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message
