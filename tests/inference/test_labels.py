"""Columns of labels: a fit knows its own by name, in whatever order other rows bring them."""

import numpy as np
import pandas as pd
import pytest

import elbozoo as ez
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.labels import codes_among, spelled


def table():
    """60 rows whose first column tells the three kinds apart, first met in the order c, b, a."""
    rng = np.random.default_rng(0)
    kind = np.resize(["c", "b", "a"], 60)
    shift = pd.Series(kind).map({"a": 0.0, "b": 4.0, "c": 8.0}).to_numpy()
    return pd.DataFrame({"u": rng.normal(size=60) + shift, "v": rng.normal(size=60), "kind": kind})


@pytest.fixture(scope="module")
def fit():
    """A conditional VAE of those rows."""
    options = {"condition": "kind", "latent_dim": 1, "hidden": 4, "likelihood": "normal", "steps": 50}
    return ez.fit("conditional-vae", table(), guide="amortized", progress=False, **options)


def largest_difference(a, b):
    return float((a - b).abs().max())


def test_rows_in_another_order_have_the_same_scores(fit, tmp_path):
    """As a frame, as a data set with codes of its own, and after saving and loading (1e-9 nats: rounding)."""
    backwards = table().iloc[::-1].reset_index(drop=True)
    expected = fit.score_samples().flip(0)
    assert largest_difference(fit.score_samples(backwards), expected) < 1e-9
    assert largest_difference(fit.score_samples(ez.load_data(backwards, keys=["kind"])), expected) < 1e-9
    fit.save(tmp_path)
    assert largest_difference(ez.load_fit(tmp_path).score_samples(backwards), expected) < 1e-9

    misread = backwards.assign(kind=pd.factorize(backwards["kind"])[0]).to_numpy(dtype=float)
    assert largest_difference(fit.score_samples(misread), expected) > 1.0


def test_an_unknown_label_is_refused(fit):
    """With the cell, and the labels that the fit knows."""
    with pytest.raises(InvalidInput, match=r"the label 'z' in column 'kind', row 1, expected .* c, b, a; fit again"):
        fit.elbo(table().assign(kind="z"))


def test_a_column_of_numbers_with_empty_cells_reads_as_it_was_written(tmp_path):
    """A CSV file of a float column, where -1 and an empty cell say that there is no label, and "007" is not 7."""
    frame = pd.DataFrame({"a": np.arange(6.0), "y": [0.0, 1.0, -1.0, np.nan, 1.0, 0.0]})
    frame.to_csv(tmp_path / "f.csv", index=False)
    for source in (frame, tmp_path / "f.csv"):
        data = ez.load_data(source, keys=["y"], missing_labels=True)
        assert data.levels == {"y": ["0", "1"]}
        np.testing.assert_array_equal(data.x[:, 1], [0, 1, np.nan, np.nan, 1, 0])
    (tmp_path / "g.csv").write_text("a,y\n1,007\n2,7\n3,7\n")
    assert ez.load_data(tmp_path / "g.csv", keys=["y"]).levels == {"y": ["007", "7"]}


def test_a_label_is_what_it_spells():
    """Numbers and text alike; a blank one is NaN where that is allowed, and unknown where not."""
    assert [spelled(value) for value in (1, 1.0, "1", " a  b ", float("nan"), True)] == [
        "1",
        "1",
        "1",
        "a b",
        "",
        "True",
    ]
    codes = codes_among(["b", None, float("nan"), -1, "a"], ["a", "b"], "kind", may_be_blank=True)
    np.testing.assert_array_equal(codes, [1, np.nan, np.nan, np.nan, 0])
    with pytest.raises(InvalidInput, match="the label ''"):
        codes_among(["a", None], ["a", "b"], "kind", may_be_blank=False)
