"""pyproject.toml is the source of dependencies; the other lists follow it."""

import re
import tomllib

import yaml
from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"torch": "pytorch"}


def _declared() -> dict[str, str]:
    listed = list(PROJECT["dependencies"])
    for extra in PROJECT["optional-dependencies"].values():
        listed += extra
    return dict(re.match(r"([\w-]+)(.*)", item).groups() for item in listed)


def test_environment_yml_has_the_same_dependencies():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = conda.pop()["pip"]
    found = dict(re.match(r"([\w-]+)(.*)", item).groups() for item in conda + pip)
    assert found.pop("python") == PROJECT["requires-python"]
    found.pop("pip")
    assert found == {CONDA_NAMES.get(k, k): v for k, v in _declared().items()}


def test_every_dependency_has_a_lower_bound_and_a_pin_that_meets_it():
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}

    def numbers(version):
        return [int(n) for n in re.findall(r"\d+", version)][:3]

    for name, bounds in _declared().items():
        assert bounds.startswith(">="), f"{name}{bounds} has no lower bound"
        assert numbers(pins[name]) >= numbers(re.split("[,;]", bounds)[0]), name


def test_torch_is_pinned_where_pip_takes_a_small_build():
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().split()


def test_scaling_needs_no_torch():
    import subprocess
    import sys

    code = "import sys; from depthutil import scaling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_readme_names_two_commands_and_ci_calls_the_test_command():
    readme = (ROOT / "README.md").read_text()
    assert "make book" in readme and "make test" in readme
    ci = (ROOT / ".ci" / "run").read_text()
    assert "\nmake test\n" in ci and "make book" in ci
