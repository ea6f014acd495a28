"""The notation says of every entry what its own tensors are called, what they mean and what shape they have."""

from __future__ import annotations

import functools
import inspect
import re
from operator import attrgetter

import pyro
import pytest
import torch
from matplotlib.mathtext import MathTextParser
from pyro import distributions as dist
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from elbozoo.inference.method import program_entry
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.registry import entry_names, get_entry
from elbozoo.notation import Row, attributes_of, notation_rows, notation_table
from elbozoo.notation.symbols import symbol_of

ROWS = 6
rows_of_name = functools.cache(notation_rows)
WAYS: list[tuple[str, dict[str, object]]] = [
    *[(name, {}) for name in entry_names()],
    ("linear-gaussian-state-space", {"structure": "local-linear-trend"}),
    ("linear-gaussian-state-space", {"initial": "free", "latent_dim": 3}),
    ("hidden-markov-model", {"emission": "multivariate-normal", "states": 4}),
    ("hierarchical-vae", {"latent_dims": "4,3,2"}),
    ("gaussian-mixture", {"covariance": "tied", "components": 4}),
    ("bayesian-gaussian-mixture", {"covariance": "diagonal"}),
    ("vae", {"likelihood": "normal", "latent_dim": 4}),
    ("vae", {"likelihood": "categorical", "levels": 4}),
    ("multi-level-vae", {"group_dim": 3, "decoder": "linear"}),
    ("linear-regression", {"noise": "known"}),
]


def values_of_sizes(rows: list[Row], entry: Entry, x: Tensor) -> dict[str, int]:
    """Look each size up under the name that the table gives it."""
    found: dict[str, int] = {}
    for row in rows:
        if not row.shape.startswith("integer"):
            continue
        letters = [
            re.sub(r"_\{([a-z])\}", r"\1", text).replace("{", "").replace("}", "")
            for text in re.findall(r"\$(.+?)\$", row.symbol)
        ]
        value = size_in_code(row.name, entry, x)
        found |= dict(zip(letters, value if isinstance(value, tuple) else (value,), strict=True))
    return found


def size_in_code(name: str, entry: Entry, x: Tensor) -> int | tuple[int, ...]:
    option = re.fullmatch(r"option `(\w+)`", name)
    if option:
        own = getattr(entry, option[1], None)
        return own if isinstance(own, int | tuple) else getattr(entry.options, option[1])
    known = {
        "`len(x)`": lambda: len(x),
        "`x.shape[1]`": lambda: x.shape[1],
        "`columns`": lambda: entry.columns,
        "`len(explained)`": lambda: len(entry.explained),
        "`design(x).shape[1]`": lambda: entry.design(x).shape[1],
    }
    return known[name]()


def shapes_in_numbers(text: str, values: dict[str, int]) -> list[tuple[int, ...]]:
    """Return the shapes that a cell of the table states: (2K_1, H) is twice one size by another."""
    return [
        tuple(sum(product(term, values) for term in size.split(" + ")) for size in re.split(r",\s*", inside) if size)
        for inside in re.findall(r"\((.*?)\)", text)
    ]


def product(term: str, values: dict[str, int]) -> int:
    result = 1
    for number, letter in re.findall(r"(\d+)|([A-Z](?:_\d+|[a-z])?)", term.strip()):
        result *= int(number) if number else values[letter]
    return result


def real_shapes(row: Row, entry: Entry, x: Tensor, sites: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """Return the shapes of the tensors that a row is about, taken from the entry and its trace."""
    site, given = re.fullmatch(r'site `"(\w+)"`', row.name), re.search(r'constant_data\(x\)\["(\w+)"\]', row.name)
    if site:
        return [tuple(sites[site[1]].shape)]
    if given:
        return [tuple(entry.constant_data(x)[given[1]].shape)]
    value = attrgetter(row.name.strip("`"))(entry)
    tensors = [value] if isinstance(value, Tensor) else list(value.parameters())
    return [tuple(tensor.shape) for tensor in tensors]


def traced(entry: Entry, x: Tensor) -> dict[str, Tensor]:
    with isolated(0), torch.no_grad(), pyro.settings.context(validate_poutine=False):
        trace = poutine.trace(entry).get_trace(Batch.full(x))
    return {name: node["value"] for name, node in trace.nodes.items() if node["type"] == "sample"}


def wrong_shapes(entry: Entry, rows: list[Row], values: dict[str, int], x: Tensor) -> list[str]:
    sites = traced(entry, x)
    described = [row for row in rows if row.shape.startswith("(") and not row.name.startswith("option")]
    return [row.name for row in described if shapes_in_numbers(row.shape, values) != real_shapes(row, entry, x, sites)]


@pytest.mark.parametrize(("name", "options"), WAYS)
def test_every_shape_is_that_of_the_tensor(name: str, options: dict[str, object]):
    entry = get_entry(name).example(**options)
    x, _ = entry.simulate(ROWS, seed=0)
    rows = notation_rows(entry)
    values = values_of_sizes(rows, entry, x)
    assert wrong_shapes(entry, rows, values, x) == []
    # Shapes are compared exactly. Sizes that are wrong by one are found out.
    assert wrong_shapes(entry, rows, {letter: value + 1 for letter, value in values.items()}, x) != []


@pytest.mark.parametrize("name", entry_names())
def test_every_cell_says_something_and_every_symbol_is_mathematics(name: str):
    rows = rows_of_name(name)
    parser = MathTextParser("path")
    for row in rows:
        assert all(cell.strip() for cell in row), row
        assert re.fullmatch(r"\$.+\$", row.symbol), row
        assert r"\mathrm" not in row.symbol, f"{name} has no symbol for {row.name}"
        parser.parse(row.symbol)
    with pytest.raises(ValueError, match="Unknown symbol"):
        parser.parse(r"$\lamda$")


def without_row(entry: Entry, names: set[str]) -> set[str]:
    """Return the sites and parameters of ``entry`` that no name covers."""
    sites = {re.sub("_(un)?observed$", "", site.name) for site in entry.latent_sites()} | {"x"}
    parameters = {name.removesuffix("_unconstrained") for name, _ in entry.named_parameters()}
    bare = {name.strip("`") for name in names}
    covered = {name for name in parameters if any(name == row or name.startswith(f"{row}.") for row in bare)}
    return {site for site in sites if f'site `"{site}"`' not in names} | (parameters - covered)


@pytest.mark.parametrize("name", entry_names())
def test_every_site_and_every_parameter_has_a_row(name: str):
    entry = get_entry(name).example()
    names = {row.name for row in rows_of_name(name)}
    assert without_row(entry, names) == set()
    roots = {re.split(r"\.|_unconstrained", parameter)[0] for parameter, _ in entry.named_parameters()}
    learned = {name for name in names if name.strip("`").split(".")[0] in roots}
    assert without_row(entry, names - {'site `"x"`'}) == {"x"}
    assert not learned or without_row(entry, names - learned) != set()


def not_as_documented(entry: Entry, rows: list[Row]) -> list[str]:
    """Return the attributes whose shape in the table is none of those that the docstring states."""
    shown = {row.name.strip("`"): row.shape for row in rows}
    stated = {attribute.name: re.findall(r"\([^()]*\)", attribute.kind) for attribute in attributes_of(entry)}
    return [name for name, shapes in stated.items() if shapes and shown[name] not in shapes]


@pytest.mark.parametrize("name", entry_names())
def test_shapes_agree_with_those_in_the_docstrings(name: str):
    entry = get_entry(name).example()
    assert not_as_documented(entry, rows_of_name(name)) == []


def test_a_shape_that_is_not_the_docstrings_is_found():
    entry = get_entry("ppca").example()
    rows = [row._replace(shape=row.shape.replace("(D, K)", "(K, D)")) for row in notation_rows(entry)]
    assert not_as_documented(entry, rows) == ["loading"]


def test_docstrings_are_read_with_their_symbols():
    rows = {row.name: row for row in notation_rows("ppca")}
    assert rows["`loading`"] == Row("$W$", "`loading`", "(D, K)", "the loadings")
    assert rows["`noise_scale`"].symbol == r"$\sigma$"
    assert rows['site `"z"`'].shape == "(N, K)"
    assert rows["option `latent_dim`"].symbol == "$K$"
    prior = {row.name: row.symbol for row in notation_rows("normal-mean")}
    assert prior["option `prior_mean`"] == "$m_{0}$"
    assert inspect.getdoc(get_entry("ppca")).count("W, the loadings") == 1


def test_words_in_a_row_are_about_the_entry_that_is_asked():
    assert "`Normal`" in next(row.meaning for row in notation_rows("hidden-markov-model") if '"x"' in row.name)
    poisson = get_entry("hidden-markov-model").example(emission="poisson")
    assert "`Poisson`" in next(row.meaning for row in notation_rows(poisson) if '"x"' in row.name)
    linear = get_entry("vae").example()
    linear.decoder = nn.Linear(2, 8).double()
    symbols = {row.name: row.symbol for row in notation_rows(linear)}
    assert symbols["`decoder`"] == r"$\mathrm{decoder}$", "two tensors are not W_1, b_1, W_2, b_2"


class Counts(PyroModule):
    """A program of the user's: a gamma rate for each row, and a weight for each column."""

    def __init__(self) -> None:
        super().__init__()
        with pyro.settings.context(module_local_params=True):
            self.weight = PyroParam(torch.ones(3), constraints.positive)
            self.net = nn.Linear(2, 3)

    def forward(self, batch: Batch) -> Tensor:
        with pyro.plate("data", batch.total, subsample=batch.index):
            rate = pyro.sample("rate", dist.Gamma(torch.ones(2), 1.0).to_event(1))
            return pyro.sample("x", dist.Poisson(self.weight * self.net(rate).exp()).to_event(1), obs=batch.x)


def test_of_a_users_program_the_trace_is_told_and_no_symbol_is_guessed():
    with pyro.settings.context(module_local_params=True):
        entry = program_entry(Counts(), torch.ones(5, 3))
    rows = {row.name: row for row in notation_rows(entry)}
    assert rows['site `"rate"`'].symbol == r"$\mathrm{rate}_{n}$"
    assert rows['site `"rate"`'].shape == "(N, 2)"
    assert rows["`weight`"].shape == "(3,)"
    assert rows["`net`"].shape == "(3, 2), (3,)"
    assert rows["`len(x)`"].symbol == "$N$"
    assert all(cell.strip() for row in rows.values() for cell in row)


def test_the_table_is_markdown_with_a_line_for_each_row():
    lines = notation_table("ppca").splitlines()
    assert lines[0] == "| symbol | name in the code | shape | meaning |"
    assert len(lines) == 2 + len(notation_rows("ppca"))
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_nothing_is_left_behind():
    entry = get_entry("ppca").example()
    before, state = [p.clone() for p in entry.parameters()], torch.get_rng_state()
    notation_table(entry)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, entry.parameters(), strict=True))
    assert all(p.grad is None for p in entry.parameters())
    torch.rand(1)
    assert not torch.equal(torch.get_rng_state(), state)


def test_an_unknown_entry_is_refused():
    with pytest.raises(InvalidInput, match="ppcaa"):
        notation_table("ppcaa")


def test_names_become_symbols():
    assert symbol_of("sigma_y") == r"\sigma_{y}"
    assert symbol_of("rate", words=False) == r"\mathrm{rate}"
    assert symbol_of("x") == "x"
