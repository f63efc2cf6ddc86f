"""What must hold of the tree as a whole."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]


def test_ray_accepts_the_cluster():
    validate_config(prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text())))


def test_the_library_imports_without_ray():
    code = "import sys; sys.modules['ray'] = None; import udiff.fit, udiff.generate"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_job_in_the_readme_has_help(capsys):
    modules = set(re.findall(r"python -m (jobs\.\w+)", (ROOT / "README.md").read_text()))
    assert {"jobs.prepare", "jobs.train", "jobs.sample", "jobs.evaluate", "jobs.serve"} <= modules
    for module in sorted(modules):
        with pytest.raises(SystemExit) as end:
            importlib.import_module(module).main(["--help"])
        assert end.value.code == 0
        assert f"usage: python -m {module}" in capsys.readouterr().out


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^(\w+):.*##", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`make (\w+)", (ROOT / "README.md").read_text()))
    assert named <= targets
    assert {"help", "setup", "demo", "serve", "test", "check", "golden"} <= targets
