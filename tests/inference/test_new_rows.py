"""Rows that a fit has not seen: what it could not have been fitted to it does not score either."""

import numpy as np
import pandas as pd
import pytest

import elbozoo as ez
from elbozoo.inference.evidence import _quadrature
from elbozoo.models import get_entry
from elbozoo.models.contract.errors import InvalidInput


def simulated(model, rows, **options):
    return get_entry(model).example(seed=1, **options).simulate(rows, seed=2)[0]


def test_other_values_than_zero_and_one_have_no_probability():
    """Three times a binary row had a log probability above zero; rows of the right kind are scored as before."""
    x = simulated("bernoulli-mixture", 30)
    fit = ez.fit("bernoulli-mixture", x, method="em", components=2, progress=False)
    assert fit.log_evidence(x[:5]).value < 0
    with pytest.raises(InvalidInput, match="the rows, which stand after the 30 of the fit: "):
        fit.log_evidence(3 * x)


@pytest.mark.parametrize("shift", [0.5, -3.0])
def test_halves_and_negative_numbers_are_no_counts(shift, tmp_path):
    """Of a fit, and of one that was loaded, which has no rows to stand beside."""
    x = simulated("product-lda", 12)
    fit = ez.fit("product-lda", x, guide="amortized", steps=5, progress=False)
    fit.save(tmp_path)
    for each in (fit, ez.load_fit(tmp_path)):
        assert each.score_samples(x[:3]).shape == (3,)
        with pytest.raises(InvalidInput, match="expected counts of words"):
            each.score_samples(x + shift)


def groups(rows=12):
    """A frame with two columns and the name of the group of each row."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(rows, 2)), columns=["a", "b"])
    return table.assign(who=np.resize(["x", "y", "z"], rows))


def test_rows_of_groups_need_all_columns_and_a_group():
    """Too few columns, and rows without a group, which would be one group together."""
    table = groups()
    options = {"group": "who", "group_dim": 1, "row_dim": 1, "decoder": "linear", "steps": 5}
    fit = ez.fit("multi-level-vae", table, guide="amortized", progress=False, **options)
    assert fit.score_samples(table).shape == (3,)
    with pytest.raises(InvalidInput, match=r"found data of shape \(6, 2\), expected \(rows, 3\): a, b, who"):
        fit.elbo(np.zeros((6, 2)))
    with pytest.raises(InvalidInput, match="column 'who', row 2 holds no label"):
        fit.elbo(table.assign(who=["x", None, *table["who"][2:]]))


def test_a_group_of_one_row_has_its_evidence():
    """Two numbers of latents are few enough for quadrature, which agrees with the oracle (1e-6 nats)."""
    table = groups()
    options = {"group": "who", "group_dim": 1, "row_dim": 1, "allow_single": True, "steps": 5}
    fit = ez.fit("multi-level-vae", table, guide="amortized", decoder="linear", progress=False, **options)
    x = fit.entry.arrange(fit.x[:1, :1], fit.entry.options)
    exact = float(fit.entry.log_evidence(x).detach())
    assert abs(_quadrature(fit.entry, x).value - exact) < 1e-6
    assert abs(_quadrature(fit.entry, fit.entry.arrange(fit.x[1:2, :1], None)).value - exact) > 1e-3
