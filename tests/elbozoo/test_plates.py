"""Plate diagrams, by Graphviz and without: what is drawn depends on what, as the program does when it is disturbed."""

from __future__ import annotations

import functools
import itertools
import re
import shutil
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import graphviz
import matplotlib
import pandas as pd
import pyro
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch
from pyro import distributions as dist
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

import elbozoo as ez
from elbozoo import plates
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.registry import entry_names, get_entry
from elbozoo.notation import parameter_symbols
from elbozoo.notation.structure import DETERMINISTIC, GIVEN, PARAMETER, PARTLY
from elbozoo.plates import render_model, structure_for, with_matplotlib
from elbozoo.plots import Picture

Edges = set[tuple[str, str]]
ROWS = 12  # so many that two draws of zeros and ones are not alike by chance
CHANGE = 1e-9  # nats: densities that do not depend on a value come out to the last bit the same

structure_of_name = functools.cache(structure_for)

# ---- the program, disturbed ------------------------------------------------------------------------------------------


def densities(entry: Entry, x: Tensor, values: dict[str, Tensor], at: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return log p of each site's value in ``at``, and the values of deterministic sites, at the latents ``values``."""
    conditioned = poutine.condition(entry, data=values)
    with isolated(0), torch.no_grad(), pyro.settings.context(validate_poutine=False), pyro.validation_enabled(False):
        trace = poutine.trace(conditioned).get_trace(Batch.full(x))
        return {
            name: node["value"] if node["infer"].get("_deterministic") else node["fn"].log_prob(at[name]).sum()
            for name, node in trace.nodes.items()
            if node["type"] == "sample" and name in at
        }


def drawn(entry: Entry, x: Tensor, seed: int) -> dict[str, Tensor]:
    with isolated(seed), torch.no_grad(), pyro.settings.context(validate_poutine=False):
        trace = poutine.trace(entry).get_trace(Batch.full(x))
    return {name: node["value"] for name, node in trace.nodes.items() if node["type"] == "sample" and name != "data"}


def shown(name: str) -> str:
    return re.sub("_(un)?observed$", "", name)


def edges_by_disturbance(entry: Entry) -> Edges:
    """Change each latent, parameter and condition in turn, and see which sites' densities change at fixed values.

    A site that is computed from others is left out, so that what depends on it depends on those.
    """
    x = entry.simulate(ROWS, seed=0)[0]
    at = drawn(entry, x, seed=0)
    latent = [site.name for site in entry.latent_sites()]
    values = {name: at[name] for name in latent}
    before = densities(entry, x, values, at)
    found: Edges = set()

    def compare(cause: str, after: dict[str, Tensor]) -> None:
        for site, value in after.items():
            if site != cause and (value - before[site]).abs().max() > CHANGE:
                found.add((shown(cause), shown(site)))

    for name, seed in itertools.product(latent, (1, 2)):  # a class may be drawn the same again
        compare(name, densities(entry, x, {**values, name: drawn(entry, x, seed)[name]}, at))
    for name in parameter_symbols(entry):
        compare(name, with_parameter_changed(entry, name, lambda: densities(entry, x, values, at)))
    return {(a, b) for a, b in found | edges_of_data(entry, x, values, at) if a != b}


def with_parameter_changed(entry: Entry, name: str, run: Callable[[], Any]) -> Any:
    parameters = [
        p for n, p in entry.named_parameters() if n.removesuffix("_unconstrained") == name or n.startswith(f"{name}.")
    ]
    kept = [parameter.clone() for parameter in parameters]
    with torch.no_grad():
        for place, parameter in enumerate(parameters):
            # Not by one number for all: weights are shares, and the same factor leaves them as they are.
            parameter.add_(
                torch.linspace(0.1, 0.3, parameter.numel(), dtype=parameter.dtype).reshape(parameter.shape) + place
            )
        result = run()
        for parameter, old in zip(parameters, kept, strict=True):
            parameter.copy_(old)
    return result


def edges_of_data(entry: Entry, x: Tensor, values: dict[str, Tensor], at: dict[str, Tensor]) -> Edges:
    """Return the conditions that the observed site depends on: its density, or else a draw from one seed, differs.

    A number of words is no part of the density of counts that add up to another, and is of a draw.
    """
    draws, densities_of_x = [], []
    for rows in (x, entry.simulate(ROWS, seed=3)[0]):
        program = poutine.condition(poutine.uncondition(entry), data=values)
        with isolated(0), torch.no_grad(), pyro.settings.context(validate_poutine=False):
            draws.append(poutine.trace(program).get_trace(Batch.full(rows)).nodes["x"]["value"])
        densities_of_x.append(densities(entry, rows, values, at)["x"])
    differs = not torch.equal(*draws) or not torch.equal(*densities_of_x)
    return {(name, "x") for name in entry.constant_data(x)} if differs else set()


def without_the_computed(structure: Any) -> Edges:
    """Return the edges of a structure with each deterministic node replaced by what it is computed from."""
    edges = set(structure.edges)
    for name, node in structure.nodes.items():
        if node.kind == DETERMINISTIC:
            causes = {a for a, b in edges if b == name}
            effects = {b for a, b in edges if a == name}
            edges |= set(itertools.product(causes, effects))
            edges = {(a, b) for a, b in edges if name not in (a,)}
    return edges


@pytest.mark.parametrize("name", entry_names())
def test_edges_are_what_a_disturbance_of_the_program_finds(name: str):
    entry = get_entry(name).example()
    structure = structure_for(entry)
    labels = {"label"} if PARTLY in {node.kind for node in structure.nodes.values()} else set()
    found = {(a, b) for a, b in edges_by_disturbance(entry) if a not in labels}
    assert without_the_computed(structure) == found


def test_a_loading_of_zero_cuts_the_edge_that_is_drawn():
    entry = get_entry("ppca").example()
    with torch.no_grad():
        entry.loading.zero_()
    # The disturbance is no copy of the drawing: here the two disagree, by z alone.
    assert set(structure_for(entry).edges) - edges_by_disturbance(entry) == {("z", "x")}


# ---- both engines draw that ------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def graphviz_is_said_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its source is compared, for which nothing is run; the one test that runs `dot` is skipped where there is none."""
    monkeypatch.setattr(plates.shutil, "which", lambda name: f"/usr/bin/{name}")


def drawn_by_graphviz(name: Any, data: Any = None) -> tuple[set[str], Edges]:
    source = render_model(name, data, engine="graphviz").source
    nodes = set(re.findall(r'^\s*"?([^\s"]+)"? \[label=<', source, flags=re.MULTILINE))
    edges = set(re.findall(r'^\s*"?([^\s"]+)"? -> "?([^\s"]+)"?', source, flags=re.MULTILINE))
    return {unquote(node) for node in nodes}, {(unquote(a), unquote(b)) for a, b in edges}


def drawn_by_matplotlib(name: Any, data: Any = None) -> tuple[set[str], Edges]:
    ids = [artist.get_gid() or "" for artist in render_model(name, data, engine="matplotlib").axes[0].patches]
    nodes = {text.removeprefix("node ") for text in ids if text.startswith("node ")}
    return nodes, {tuple(text.split(" ")[1:]) for text in ids if text.startswith("edge ")}  # type: ignore[misc]


ENGINES = {"graphviz": drawn_by_graphviz, "matplotlib": drawn_by_matplotlib}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", entry_names())
def test_all_nodes_and_edges_are_drawn(name: str, engine: str):
    structure = structure_of_name(name)
    assert ENGINES[engine](name) == (set(structure.nodes), set(structure.edges))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_drawing_of_another_model_is_told_apart(engine: str):
    nodes, edges = ENGINES[engine]("vae")
    structure = structure_for("hierarchical-vae")
    assert nodes != set(structure.nodes)
    assert edges != set(structure.edges)


@pytest.mark.parametrize("name", entry_names())
def test_without_graphviz_no_node_hides_another_and_plates_hold_what_is_theirs(name: str):
    structure = structure_of_name(name)
    layout = layout_of(structure)
    boxes = {n: corners(box) for n, box in layout.nodes.items()}
    assert overlapping(boxes) == []
    for plate in structure.plates:
        frame = corners(layout.plates[plate])
        held = {n for n in boxes if overlap(boxes[n], frame)}
        assert held == {n for n in boxes if plate in plates_around(structure, n)}
    assert overlapping({**boxes, "a second x": boxes["x"]}) == [("x", "a second x")]


def layout_of(structure: Any) -> Any:
    widths = dict.fromkeys(structure.plates, 1.0)
    return with_matplotlib.lay_out(structure, with_matplotlib._sizes(structure), widths)


def plates_around(structure: Any, name: str) -> set[str]:
    plate, found = structure.nodes[name].plate, set()
    while plate is not None:
        found.add(plate)
        plate = structure.plates[plate].parent
    return found


def corners(box: Any) -> tuple[float, float, float, float]:
    return box.x - box.width / 2, box.y - box.height / 2, box.x + box.width / 2, box.y + box.height / 2


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def overlapping(boxes: dict[str, tuple[float, ...]]) -> list[tuple[str, str]]:
    return [pair for pair in itertools.combinations(boxes, 2) if overlap(boxes[pair[0]], boxes[pair[1]])]


@pytest.mark.parametrize("name", entry_names())
def test_without_graphviz_no_arrow_runs_through_a_third_node(name: str):
    structure = structure_of_name(name)
    layout = layout_of(structure)
    for source, target in structure.edges:
        ends = [with_matplotlib._anchor(structure.nodes[n], layout) for n in (source, target)]
        bend = with_matplotlib._bend(source, target, structure, layout)
        third = [n for n, node in structure.nodes.items() if n not in (source, target) and node.kind != PARAMETER]
        curve = with_matplotlib._curve(ends, bend)
        assert with_matplotlib._crossed(curve, [layout.nodes[n] for n in third]) == 0
        assert with_matplotlib._crossed(curve, [layout.nodes[target]]) == 1


def test_an_arrow_is_bent_only_where_a_node_is_in_its_way():
    structure = structure_for("normal-gamma")
    layout = layout_of(structure)
    assert with_matplotlib._bend("mean", "x", structure, layout) == 0
    assert with_matplotlib._bend("precision", "x", structure, layout) != 0, "the mean stands between them"


# ---- what is said in the picture -------------------------------------------------------------------------------------


def words(picture: Picture) -> list[str]:
    return [text.get_text() for text in picture.axes[0].texts]


def test_kinds_of_nodes_look_different():
    source = render_model("eight-schools", engine="graphviz").source
    assert "filled,dashed" in source.split("theta [")[1].split("\n")[0]
    assert "shape=box" in source.split("standard_error [")[1].split("\n")[0]
    assert "filled,dashed" not in source.split("mu [")[1].split("\n")[0]
    kinds = {name: node.kind for name, node in structure_for("eight-schools").nodes.items()}
    assert (kinds["theta"], kinds["standard_error"]) == (DETERMINISTIC, GIVEN)
    assert structure_for("semi-supervised-vae").nodes["y"].kind == PARTLY


def test_small_print_names_the_distribution_and_the_site():
    gamma = words(render_model("gamma-poisson", engine="matplotlib"))
    assert "rate ~ Gamma" in gamma
    assert "Poisson" in gamma
    assert "data: N rows" in gamma
    hidden = words(render_model("hidden-markov-model", engine="matplotlib"))
    assert {"MarkovChain", "a chain over the steps", "Normal", "data: S sequences"} <= set(hidden)
    assert "flat" in words(render_model("autoencoder", engine="matplotlib"))
    assert "flat" not in words(render_model("vae", engine="matplotlib"))


def test_groups_stand_in_a_plate_of_groups():
    structure = structure_for("multi-level-vae")
    assert {name: node.plate for name, node in structure.nodes.items() if node.kind != PARAMETER} == {
        "u": "data",
        "v": "rows",
        "x": "rows",
    }
    assert structure.plates["rows"].parent == "data"


def test_data_put_their_number_at_the_plate():
    table = pd.DataFrame({"a": [0.0, 1.0, 2.5, 4.0], "b": [1.0, 0.0, 2.0, 3.0]})
    assert "data: N = 4 rows" in words(render_model("normal-mean", table, engine="matplotlib"))
    assert "data: N = 4 rows" in words(render_model(nested, table, engine="matplotlib"))
    assert "data: N = 4 rows" not in words(render_model("ppca", engine="matplotlib"))


# ---- programs of the user's ------------------------------------------------------------------------------------------


def nested(batch: Batch) -> Tensor:
    """Two plates inside each other, beside a third."""
    with pyro.plate("groups", 3):
        centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
        with pyro.plate("draws:inner", 2):
            pyro.sample("theta_1", dist.Normal(centre, 1.0))
    with pyro.plate("data", batch.total, subsample=batch.index):
        z = pyro.sample("z", dist.Normal(centre.sum(), 1.0))
        return pyro.sample("x", dist.Normal(z[:, None], torch.ones(batch.x.shape[1])).to_event(1), obs=batch.x)


def masked(batch: Batch) -> Tensor:
    """A site that Pyro takes for observed in some rows."""
    with pyro.plate("data", batch.total, subsample=batch.index):
        seen = batch.x[:, 0] > 0
        y = pyro.sample("y", dist.Normal(torch.zeros(len(seen)), 1.0), obs=batch.x[:, 0], obs_mask=seen)
        return pyro.sample("x", dist.Normal(y, 1.0), obs=batch.x[:, 1])


@pytest.mark.parametrize("engine", ENGINES)
def test_plates_of_a_users_program_are_nested_as_it_nests_them(engine: str):
    nodes, edges = ENGINES[engine](nested, torch.rand(4, 2))
    assert nodes == {"centre", "theta_1", "z", "x"}
    assert edges == {("centre", "theta_1"), ("centre", "z"), ("z", "x")}
    found = structure_for(nested, torch.rand(4, 2)).plates
    assert {plate.name: (plate.label, plate.parent) for plate in found.values()} == {
        "groups": ("groups: 3", None),
        "draws:inner": ("draws:inner: 2", "groups"),
        "data": ("data: N = 4 rows", None),
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_a_masked_observation_is_one_node(engine: str):
    nodes, edges = ENGINES[engine](masked, torch.tensor([[1.0, 2.0], [-1.0, 0.0]]))
    assert (nodes, edges) == ({"y", "x"}, {("y", "x")})
    node = structure_for(masked, torch.tensor([[1.0, 2.0], [-1.0, 0.0]])).nodes["y"]
    assert (node.kind, node.distribution) == (PARTLY, "Normal")


def test_modules_of_a_users_program_are_its_parameters():
    class Decoder(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.unused = nn.Linear(1, 2), nn.Linear(1, 2)

        def forward(self, batch: Batch) -> Tensor:
            with pyro.plate("data", batch.total, subsample=batch.index):
                z = pyro.sample("z", dist.Normal(batch.x.new_zeros(1), 1.0).to_event(1))
                return pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=batch.x)

    with pyro.settings.context(module_local_params=True):
        structure = structure_for(Decoder(), torch.rand(5, 2))
    assert set(structure.edges) == {("program.net", "x"), ("z", "x")}, "what nothing depends on is not drawn"


# ---- engines, errors, state ------------------------------------------------------------------------------------------


def test_graphviz_draws_where_it_is_there_and_matplotlib_where_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plates.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert isinstance(ez.render_model("ppca"), graphviz.Digraph)
    monkeypatch.setattr(plates.shutil, "which", lambda name: None)
    picture = ez.render_model("ppca")
    assert isinstance(picture, Picture)
    assert picture._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(InvalidInput, match=r"engine=graphviz: found no program dot, expected Graphviz; install it"):
        render_model("ppca", engine="graphviz")


def test_the_python_package_may_be_missing_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plates.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(plates.importlib.util, "find_spec", lambda name: None)
    assert isinstance(render_model("ppca"), Picture)
    with pytest.raises(InvalidInput, match="no Python package graphviz"):
        render_model("ppca", engine="graphviz")


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz's program dot is not installed")
def test_dot_takes_what_it_is_given():
    svg = render_model("multi-level-vae", engine="graphviz").pipe(format="svg", encoding="utf-8")
    assert svg.count('class="cluster"') == 2
    assert svg.count('class="edge"') == len(structure_for("multi-level-vae").edges)
    assert "the rows of a group" in svg
    with pytest.raises(graphviz.CalledProcessError):
        graphviz.Source("digraph { a [label=<<I>>] }").pipe(format="svg", quiet=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ppcaa",), "ppcaa"),
        ((nested,), r"found a program of your own and no data, expected both; give render_model\(model, data\)"),
        ((lambda batch: pyro.sample("z", dist.Normal(0.0, 1.0)), torch.rand(3, 2)), "expected an observed site 'x'"),
        ((3, torch.rand(3, 2)), "found a int as model; expected an entry's name or a callable"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments: tuple[Any, ...], message: str):
    with pytest.raises(InvalidInput, match=message):
        render_model(*arguments)


def test_an_unknown_engine_is_refused():
    with pytest.raises(InvalidInput, match="engine: found 'tikz', expected auto, graphviz or matplotlib"):
        render_model("ppca", engine="tikz")  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_picture_every_time_and_nothing_left_behind(engine: Any):
    entry = get_entry("hidden-markov-model").example()
    state, settings, figures = torch.get_rng_state(), dict(matplotlib.rcParams), plt.get_fignums()
    before = [p.clone() for p in entry.parameters()]
    one, two = [render_model(entry, engine=engine) for _ in range(2)]
    if isinstance(one, Picture):
        assert one._repr_png_() == two._repr_png_()
        assert one._repr_png_() != render_model("ppca", engine=engine)._repr_png_()
    else:
        assert one.source == two.source
        assert one.source != render_model("ppca", engine=engine).source
    assert torch.equal(torch.get_rng_state(), state)
    assert (dict(matplotlib.rcParams), plt.get_fignums()) == (settings, figures)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, entry.parameters(), strict=True))


def test_arrows_end_at_the_ellipse():
    picture = render_model("ppca", engine="matplotlib")
    arrows = [patch for patch in picture.axes[0].patches if isinstance(patch, FancyArrowPatch)]
    assert len(arrows) == len(structure_for("ppca").edges)
    assert all(arrow.patchA is not None and arrow.patchB is not None for arrow in arrows)
