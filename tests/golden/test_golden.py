"""Every reference case of `--golden DIR` against this project; a case nobody knows fails."""

import importlib
import importlib.util

import pytest
import torch
from torch import Tensor

from tests.golden.case import Case, find_cases, relative_error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = metafunc.config.getoption("--golden").absolute()
    cases = find_cases(folder)
    if not cases:
        raise pytest.UsageError(f"--golden {folder} holds no *.safetensors cases")
    metafunc.parametrize("case", cases, ids=[case.name for case in cases])


def test_case(case: Case) -> None:
    module = f"tests.golden.systems.{case.system}"
    assert importlib.util.find_spec(module), f"no runner for the system {case.system}"
    system = importlib.import_module(module)
    assert case.kind in system.RUNNERS, f"unknown kind {case.kind} of {case.system}"
    torch.manual_seed(0)
    ours = system.RUNNERS[case.kind](case)
    assert case.outputs, "the case holds no outputs"
    missing = sorted(set(case.outputs) - set(ours))
    assert not missing, f"not computed: {missing}"
    # A system may compare some outputs in its own way: numbers of points, changes of parameters.
    error = getattr(system, "error", _relative_error)
    errors = {
        name: (error(case, name, ours[name].detach(), theirs), system.tolerance(case, name))
        for name, theirs in case.outputs.items()
    }
    wrong = {name: pair for name, pair in errors.items() if not pair[0] <= pair[1]}
    assert not wrong, f"(error, tolerance): {wrong}"


def _relative_error(case: Case, name: str, ours: Tensor, theirs: Tensor) -> float:
    return relative_error(ours, theirs)
