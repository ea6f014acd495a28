"""``methods=all``: the five ways to a q of each datum, side by side on one model."""

import pytest

from elbozoo.inference.comparison import run_comparison
from elbozoo.models import get_entry
from elbozoo.models.contract.errors import InvalidInput

OPTIONS = {"latent_dim": 2, "steps": 600, "refinements": 2}


def rows():
    """60 rows of a linear VAE, simulated."""
    return get_entry("linear-vae").example(columns=5, seed=1, latent_dim=2).simulate(60, seed=2)[0]


@pytest.fixture(scope="module")
def table():
    """The comparison of all ways, by method."""
    return run_comparison("linear-vae", rows(), ["all"], 1, OPTIONS, progress=False).table.set_index("method")


def test_every_way_is_fitted_to_one_model(table):
    """The five rows have one evidence, which fits of their own do not."""
    assert list(table.index) == ["shared", "free", "amortized", "semi-amortized", "exact"]
    # Absolute, nats: θ is copied, so the evidence is the same number.
    assert table.log_evidence.max() - table.log_evidence.min() == 0.0

    own = run_comparison("linear-vae", rows(), ["free", "amortized"], 1, OPTIONS, progress=False).table
    assert own.log_evidence.max() - own.log_evidence.min() > 1e-6


def test_gaps_tell_the_ways_apart(table):
    """One q for all pays most and the exact posterior nothing; the family's own part is the same for all others."""
    assert abs(table.gap["exact"]) < 1e-8  # nats: rounding of a sum over 60 rows
    assert table.gap["shared"] > 2 * table.gap["free"]
    normals = table.drop(index="exact")
    # Nats: the best member is found to 1e-4 per datum, and both ELBOs are taken with the same draws.
    assert normals.approximation_gap.max() - normals.approximation_gap.min() < 0.02
    assert normals.approximation_gap.min() > 0.02


def test_only_q_is_learned(table):
    """θ counts among the parameters of no row: two means and two scales, for all data or for each datum."""
    assert table.parameters["shared"] == 4
    assert table.parameters["free"] == 4 * 60
    assert table.parameters["exact"] == 0


def test_a_way_that_does_not_exist_is_left_out():
    """A neural decoder has no exact posterior; the other four are compared."""
    x = get_entry("vae").example(columns=4, seed=0, latent_dim=1, hidden=3).simulate(20, seed=1)[0]
    options = {"latent_dim": 1, "hidden": 3, "steps": 20, "refinements": 1}
    table = run_comparison("vae", x, ["all"], 1, options, progress=False).table
    assert list(table.method) == ["shared", "free", "amortized", "semi-amortized"]


@pytest.mark.parametrize(
    ("model", "methods", "message"),
    [
        ("linear-vae", ["all", "em"], "found all beside em, expected it alone"),
        ("normal-gamma", ["all"], "normal-gamma has 1 of them .*name the methods to compare"),
    ],
)
def test_what_cannot_be_compared_so_is_refused(model, methods, message):
    """Another method beside it, and a model whose latent is one for all data."""
    x = get_entry(model).example(seed=0).simulate(20, seed=1)[0]
    with pytest.raises(InvalidInput, match=message):
        run_comparison(model, x, methods, 1, {}, progress=False)
