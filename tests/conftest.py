"""Options and checks for the whole test suite."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

from tests.bucket import bucket_server

# Shapes in public signatures are checked in tests. The hook must come before the first import.
for package in ("udiff.nn", "udiff.diffusion", "udiff.samplers", "udiff.autoencoders"):
    install_import_hook(package, "beartype.beartype")
install_import_hook("udiff.models", "beartype.beartype")

# How long an example takes is a matter of what else the machine does.
settings.register_profile("udiff", deadline=None)
settings.load_profile("udiff")

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# A Ray of our own: never one that somebody has left running on this machine.
os.environ.setdefault("RAY_ADDRESS", "local")

KEPT_CASES = Path(__file__).parent / "golden" / "cases"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=KEPT_CASES,
        help="folder of reference vectors: a system's (named after it), or a parent of several",
    )


@pytest.fixture(autouse=True)
def _one_thread():
    """Equal results and equal speed, however many tests run beside each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """URI of a folder in an empty bucket, which does not exist yet."""
    with bucket_server(tmp_path_factory.mktemp("bucket")) as uri:
        yield uri
