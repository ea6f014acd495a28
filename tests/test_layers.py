"""Imports run downward only: numerics, models, guides, inference, front door."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOMES = {"models": "elbozoo.models", "guides": "elbozoo.guides", "inference": "elbozoo.inference", "elbozoo": "elbozoo"}

# From the bottom to the top; a module belongs to the first package that holds it.
LAYERS = ("elbozoo.models.numerics", "elbozoo.models", "elbozoo.guides", "elbozoo.inference", "elbozoo")
NUMERICS = LAYERS[0]

IMPURE_MODULES = ("pyro", "random", "secrets", "numpy.random", "torch.random", "logging", "warnings")
IMPURE_NAMES = {
    *("print", "open", "input"),
    *("manual_seed", "seed", "Generator", "default_rng", "get_rng_state", "set_rng_state", "fork_rng"),
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like"),
    *("multinomial", "bernoulli", "poisson", "sample", "rsample", "dropout"),
    *("normal_", "uniform_", "bernoulli_", "exponential_", "random_", "log_normal_", "geometric_", "cauchy_"),
    *("set_default_dtype", "set_default_device"),
}


def modules() -> Iterator[tuple[str, Path]]:
    """Yield the name and the file of each module, each once: the links inside ``elbozoo`` are not followed."""
    for folder, package in HOMES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if not (ROOT / folder / parts[0]).is_symlink():
                yield ".".join([package, *(part for part in parts if part != "__init__")]), path


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def layer(module: str) -> int:
    return next(rank for rank, package in enumerate(LAYERS) if within(module, package))


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Yield line and target of each import, deferred ones and ``import_module("...")`` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in {"import_module", "__import__"}:
                yield node.lineno, str(node.args[0].value)


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Describe every import or call in ``source`` that ``module``'s layer does not allow."""
    tree = ast.parse(source)
    package = module if is_package else module.rpartition(".")[0]
    found = []
    for line, target in imports(tree, package):
        if target.partition(".")[0] in HOMES.keys() - {"elbozoo"}:
            found.append(f"{module}:{line} imports {target} under its bare name")
        elif within(target, "elbozoo") and layer(target) > layer(module):
            found.append(f"{module}:{line} imports {target}, which is a layer above {LAYERS[layer(module)]}")
        elif within(module, NUMERICS) and any(within(target, impure) for impure in IMPURE_MODULES):
            found.append(f"{module}:{line} imports {target}; numerics are pure tensor algebra")
    if within(module, NUMERICS):
        for node in ast.walk(tree):
            name = getattr(node, "attr", getattr(node, "id", None))
            if isinstance(node, ast.Attribute | ast.Name) and name in IMPURE_NAMES:
                found.append(f"{module}:{node.lineno} uses {name}; numerics know no random state and no printing")
    return found


@pytest.mark.parametrize(("module", "path"), [pytest.param(*found, id=found[0]) for found in modules()])
def test_imports_run_downward(module: str, path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py") == []


def test_every_layer_is_walked_once() -> None:
    names = [name for name, _ in modules()]
    assert len(names) == len(set(names))
    assert {layer(name) for name in names} == set(range(len(LAYERS)))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("elbozoo.models.numerics.gaussian", "import pyro"),
        ("elbozoo.models.numerics.gaussian", "from pyro import distributions"),
        ("elbozoo.models.numerics.gaussian", "from numpy import random"),
        ("elbozoo.models.numerics.gaussian", "import random"),
        ("elbozoo.models.numerics.gaussian", "def f():\n    print(1)"),
        ("elbozoo.models.numerics.gaussian", "noise = torch.randn(3)"),
        ("elbozoo.models.numerics.gaussian", "x.normal_()"),
        ("elbozoo.models.numerics.gaussian", "from elbozoo.models.contract.batch import Batch"),
        ("elbozoo.models.numerics.gaussian", "from elbozoo.models import Batch"),
        ("elbozoo.models.numerics.gaussian", "from ..contract import batch"),
        ("elbozoo.models.ppca", "from elbozoo.guides import get_guide"),
        ("elbozoo.models.ppca", "from elbozoo import guides"),
        ("elbozoo.models.ppca", "from elbozoo import fit"),
        ("elbozoo.models.ppca", "import elbozoo"),
        ("elbozoo.models.ppca", "def f():\n    import elbozoo.inference.svi"),
        ("elbozoo.models.ppca", "importlib.import_module('elbozoo.inference')"),
        ("elbozoo.models.ppca", "import models.numerics"),
        ("elbozoo.guides.encoder", "if TYPE_CHECKING:\n    from elbozoo.inference.fit import Fit"),
        ("elbozoo.inference.fit", "from elbozoo.api import fit"),
        ("elbozoo.api", "from inference import Fit"),
    ],
)
def test_upward_imports_and_impure_numerics_are_found(module: str, source: str) -> None:
    """The negative control: each of these sources breaks one rule once."""
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("elbozoo.models.numerics.gaussian", "import math\nimport torch\nfrom elbozoo.models.numerics import chains"),
        ("elbozoo.models.ppca", "import pyro\nfrom elbozoo.models.numerics import gaussian\nprint(torch.randn(3))"),
        ("elbozoo.guides.encoder", "from elbozoo.models import Batch"),
        ("elbozoo.inference.fit", "from elbozoo import guides, models"),
        ("elbozoo.api", "from elbozoo.inference import Fit\nimport elbozoo.models"),
    ],
)
def test_downward_imports_are_allowed(module: str, source: str) -> None:
    assert violations(source, module) == []
