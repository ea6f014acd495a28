"""The repository itself: links, guards, versions, light imports, and what the wheel holds."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
import tomllib
import types
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import elbozoo

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("models", "guides", "inference")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

HELP = "import sys; sys.argv = ['elbozoo', '--help']; from elbozoo.cli import main; main()"
REPORT_HEAVY = "import atexit, sys; atexit.register(lambda: print('heavy', {'torch', 'pyro'} & set(sys.modules)))\n"


def python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in found}


@pytest.mark.parametrize("name", LINKED)
def test_package_folder_is_a_relative_link(name: str) -> None:
    link = ROOT / "elbozoo" / name
    assert link.is_symlink(), f"elbozoo/{name} is no link; on Windows clone with `git -c core.symlinks=true clone`"
    assert link.readlink() == Path("..") / name


@pytest.mark.parametrize("name", LINKED)
def test_bare_import_is_refused(name: str) -> None:
    result = python(f"import {name}")
    assert result.returncode != 0
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError") and f"from elbozoo.{name} import" in last_line
    assert python(f"import elbozoo.{name}").returncode == 0


def test_version_is_the_same_everywhere() -> None:
    assert elbozoo.__version__ == PROJECT["version"]
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0] == PROJECT["version"]


def test_constraints_pin_every_dependency_within_its_range() -> None:
    extras = PROJECT["optional-dependencies"]
    requirements = [Requirement(line) for line in [*PROJECT["dependencies"], *(r for e in extras.values() for r in e)]]
    for requirement in requirements:
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), requirement


def test_pre_commit_uses_the_same_ruff() -> None:
    found = re.findall(r"ruff==([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert set(found) == {pins()["ruff"]}


@pytest.mark.parametrize(("code", "heavy"), [("import elbozoo", False), (HELP, False), ("import torch", True)])
def test_front_door_loads_no_torch(code: str, heavy: bool) -> None:
    """The import of torch itself is the negative control."""
    result = python(REPORT_HEAVY + code)
    assert result.returncode == 0, result.stderr
    assert (result.stdout.strip().splitlines()[-1] != "heavy set()") is heavy


@pytest.mark.parametrize("code", ["import elbozoo", HELP])
def test_front_door_opens_in_half_a_second(code: str) -> None:
    def seconds() -> float:
        start = time.perf_counter()
        result = python(code)
        elapsed = time.perf_counter() - start
        assert result.returncode == 0, result.stderr
        return elapsed

    # The least of several is what it costs; more is other work on the same machine.
    assert min(seconds() for _ in range(7)) < 0.5


@pytest.mark.slow
def test_wheel_holds_real_files(tmp_path: Path) -> None:
    """Built from a copy, so that nothing is left in the checkout."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("elbozoo", *LINKED):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=280)

    (wheel,) = tmp_path.glob("elbozoo-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist()}
    for home in LINKED:
        for path in (ROOT / home).rglob("*.py"):
            assert packed[f"elbozoo/{path.relative_to(ROOT)}"] == path.read_bytes()
    # What is not Python too, such as the scripts of a report.
    own = [path for path in (ROOT / "elbozoo").rglob("*.*") if path.is_file() and path.suffix != ".pyc"]
    assert {"py.typed", "report.js"} <= {path.name for path in own}
    assert all(packed[path.relative_to(ROOT).as_posix()] == path.read_bytes() for path in own)
    assert {name.partition("/")[0] for name in packed} == {"elbozoo", f"elbozoo-{PROJECT['version']}.dist-info"}


def test_contributing_example_is_an_entry_with_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both blocks of code run as they stand; the second tests the first."""
    from elbozoo.models import capabilities
    from elbozoo.models.contract import registry

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    entry_source, test_source = re.findall(r"^````python\n(.*?)^````$", text, flags=re.MULTILINE | re.DOTALL)

    module = types.ModuleType("elbozoo.models.exponential_gamma")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(entry_source, vars(module))
    entry = registry.entry_of(module.__name__, vars(module))
    assert {"oracle", "posterior", "simulation"} <= set(capabilities(entry.example()))

    namespace: dict[str, object] = {}
    exec(test_source, namespace)
    namespace["get_entry"] = lambda name: {"exponential-gamma": entry}[name]
    tests = [value for name, value in namespace.items() if name.startswith("test_") and callable(value)]
    assert len(tests) == 2
    for test in tests:
        test()
