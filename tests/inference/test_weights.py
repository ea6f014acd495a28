"""Masks: whatever weighs a program's densities leaves out what a mask takes out, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor

from elbozoo.guides import Guide
from elbozoo.guides.base import GuideOptions
from elbozoo.guides.bound import row_elbo, whitened_noise
from elbozoo.guides.local import LocalGuide
from elbozoo.inference.anatomy import anatomy
from elbozoo.inference.estimators import estimate_log_evidence
from elbozoo.inference.evidence import log_evidence
from elbozoo.inference.inferencedata import inference_data
from elbozoo.inference.method import program_entry
from elbozoo.inference.row_annealing import RowProgram
from elbozoo.inference.unconstrained import UnconstrainedProgram
from elbozoo.inference.weights import importance_weights, log_joint
from elbozoo.models import Batch
from elbozoo.models.contract.collapse import EVIDENCE_SITE, collapsed
from elbozoo.models.contract.isolation import isolated

# A number, whether it is known, and a class: the mask travels with the rows.
X = torch.tensor([[1.5, 1, 2], [-0.5, 0, 0], [2.0, 1, 1], [0.3, 0, 0]], dtype=torch.float64)
EVERYWHERE = torch.cat([X[:, :1], torch.ones(4, 1), X[:, 2:]], 1)
VALUES, KNOWN, CODES = X[:, 0].numpy(), X[:, 1].bool().numpy(), X[:, 2].long().numpy()
POINT = torch.tensor([[0.7, -40.0]], dtype=torch.float64)  # mean and log scale of a normal that is as good as a point
SHARES = np.array([0.2, 0.5, 0.3])
CENTRES = np.array([-1.0, 0.5, 2.0])

Program = Callable[[Batch], None]


def normal(value: np.ndarray, mean: np.ndarray | float, variance: float) -> np.ndarray:
    """Log N(value; mean, variance), nats."""
    return -0.5 * ((value - mean) ** 2 / variance + math.log(2 * math.pi * variance))


def observing(batch: Batch) -> None:
    """Means of rows, z ~ N(0, 1), seen with unit noise in the rows that are known."""
    with pyro.plate("data", batch.total, subsample=batch.index):
        z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1))
        with poutine.mask(mask=batch.x[:, 1] > 0):
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=batch.x[:, :1])


def normals_of_rows(parameters: Tensor) -> LocalGuide:
    """Independent normals with means and log scales ``parameters`` (4, 2)."""
    sites = program_entry(observing, X).latent_sites(X)
    guide = LocalGuide("free-diagonal-normal", "diagonal-normal", "free", sites, X, GuideOptions())
    with torch.no_grad():
        guide.sources["z"].values.copy_(parameters)  # type: ignore[operator]
    return guide


def posterior() -> LocalGuide:
    """N(x/2, 1/2) where x is known, the prior where it is not."""
    known = torch.from_numpy(KNOWN).double()
    return normals_of_rows(torch.stack([known * X[:, 0] / 2, known * 0.5 * math.log(0.5)], -1))


def evidence_by_hand() -> np.ndarray:
    """Log N(x; 0, 2) of the rows that are known, and nothing for the others."""
    return np.where(KNOWN, normal(VALUES, 0.0, 2.0), 0.0)


def test_weights_of_the_masked_posterior_are_the_masked_evidence() -> None:
    """Every weight is log p(x_n), 1e-12 nats; if all rows are known it is not."""

    def elbo(x: Tensor) -> np.ndarray:
        return importance_weights(program_entry(observing, x), posterior(), Batch.full(x), 7, seed=0).elbo().numpy()

    assert np.abs(elbo(X) - evidence_by_hand()).max() <= 1e-12
    assert np.abs(elbo(EVERYWHERE) - evidence_by_hand()).max() > 0.5


def test_quadrature_and_log_joint_respect_masks() -> None:
    """Quadrature within 1e-6 nats of the closed form, log p(x, z) to 1e-12; without the mask neither."""
    entry = program_entry(observing, X)
    evidence, unmasked = log_evidence(entry, X), log_evidence(entry, EVERYWHERE)
    assert evidence is not None and evidence.per_datum is not None and evidence.kind == "quadrature"
    assert np.abs(evidence.per_datum.numpy() - evidence_by_hand()).max() <= 1e-6
    assert unmasked is not None and abs(unmasked.value - evidence.value) > 0.5
    z = torch.linspace(-2, 2, 3, dtype=torch.float64)[:, None, None].expand(3, 4, 1)
    points = z[..., 0].numpy()
    expected = normal(points, 0.0, 1.0) + np.where(KNOWN, normal(VALUES, points, 1.0), 0.0)
    with isolated(0):
        assert np.abs(log_joint(entry, Batch.full(X), {"z": z}).numpy() - expected).max() <= 1e-12
        assert np.abs(log_joint(entry, Batch.full(EVERYWHERE), {"z": z}).numpy() - expected).max() > 0.5


def likelihood_of_chains(x: Tensor) -> np.ndarray:
    entry = program_entry(observing, x)
    rows = RowProgram(entry, entry.latent_sites(x), Batch.full(x))
    return rows.log_likelihood(POINT[:, :1].expand(1, 4, 1))[0].numpy()


def likelihood_of_bound(x: Tensor) -> np.ndarray:
    log_scale = -12.0  # narrower, a draw would be rounded to the mean and the entropy be lost
    parameters = {"z": torch.tensor([[0.7, log_scale]], dtype=torch.float64).expand(4, -1)}
    noise = whitened_noise(4, 1, seed=0, like=x)
    with isolated(0), torch.no_grad():
        elbo = row_elbo(program_entry(observing, x), posterior().families, Batch.full(x), parameters, noise).numpy()
    return elbo - normal(np.array(0.7), 0.0, 1.0) - (0.5 * math.log(2 * math.pi * math.e) + log_scale)


def likelihood_of_anatomy(x: Tensor) -> np.ndarray:
    return anatomy(program_entry(observing, x), normals_of_rows(POINT), x, draws=2).reconstruction.numpy()


def likelihood_of_inference_data(x: Tensor) -> np.ndarray:
    data = inference_data(program_entry(observing, x), normals_of_rows(POINT), x, 2, seed=0)
    found: np.ndarray = data.log_likelihood["x"].to_numpy()[0, 0]
    return found


@pytest.mark.parametrize(
    "likelihood",
    [likelihood_of_chains, likelihood_of_bound, likelihood_of_anatomy, likelihood_of_inference_data],
    ids=["annealing", "row_elbo", "anatomy", "inferencedata"],
)
def test_likelihoods_at_a_point_are_those_of_the_rows_that_are_known(
    likelihood: Callable[[Tensor], np.ndarray],
) -> None:
    """log p(x_n given z = 0.7) where x_n is known and 0 where not, 1e-9 nats (the square of the scale of q)."""
    expected = np.where(KNOWN, normal(VALUES, 0.7, 1.0), 0.0)
    assert np.abs(likelihood(X) - expected).max() <= 1e-9
    assert np.abs(likelihood(EVERYWHERE) - expected).max() > 0.5


def test_draws_from_the_prior_say_nothing_about_rows_that_are_masked() -> None:
    """Estimator ``prior``: 0 exactly for masked rows, within 5 standard errors (6e-7) of log N(x; 0, 2) for others."""
    entry = program_entry(observing, X)
    found, unmasked = (estimate_log_evidence(entry, x, "prior", seed=0) for x in (X, EVERYWHERE))
    assert found.per_datum is not None
    truth = evidence_by_hand()
    assert (found.per_datum.numpy()[~KNOWN] == 0).all()
    assert abs(found.value - truth.sum()) <= 5 * found.standard_error + found.shortfall
    assert abs(unmasked.value - truth.sum()) > 5 * unmasked.standard_error + unmasked.shortfall


def test_a_latent_of_all_data_sees_the_rows_that_are_known() -> None:
    """Its log likelihood at μ = 0.7 is the sum over those rows, 1e-12 nats."""

    def program(batch: Batch) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))
        with pyro.plate("data", batch.total, subsample=batch.index), poutine.mask(mask=batch.x[:, 1] > 0):
            pyro.sample("x", dist.Normal(mu[..., None], 1.0).to_event(1), obs=batch.x[:, :1])

    unconstrained = UnconstrainedProgram.of(program_entry(program, X), X)
    assert unconstrained is not None
    found = float(unconstrained.log_terms(POINT[:, :1]).likelihood[0])
    terms = normal(VALUES, 0.7, 1.0)
    assert found == pytest.approx(terms[KNOWN].sum(), abs=1e-12)
    assert found != pytest.approx(terms.sum(), abs=0.5)


# ---- finite sites that are observed in some rows ---------------------------------------------------------------------


def classes(batch: Batch, *, as_pyro: bool) -> None:
    """Classes that are known in some rows, and x ~ N(centre of the class, 1).

    As Pyro's ``obs_mask`` splits such a site, with masks over both halves, or with the unobserved half drawn in all
    rows.
    """
    fn = dist.Categorical(torch.tensor(SHARES))
    known, codes = batch.x[:, 1] > 0, batch.x[:, 2].long()
    with pyro.plate("data", batch.total, subsample=batch.index):
        with poutine.mask(mask=~known if as_pyro else torch.ones_like(known)):
            drawn = pyro.sample("y_unobserved", fn)
        with poutine.mask(mask=known):
            pyro.sample("y_observed", fn, obs=codes)
        y = torch.where(known, codes, drawn)
        pyro.sample("x", dist.Normal(torch.tensor(CENTRES)[y][..., None], 1.0).to_event(1), obs=batch.x[:, :1])


def drawn_everywhere(batch: Batch) -> None:
    classes(batch, as_pyro=False)


def masked_by_pyro(batch: Batch) -> None:
    classes(batch, as_pyro=True)


def joint_by_hand() -> np.ndarray:
    """Log p(x, y) of each row and class, (4, 3), nats."""
    return np.log(SHARES) + normal(X[:, :1].numpy(), CENTRES, 1.0)


def classes_by_hand() -> np.ndarray:
    """Log p(x, y) of rows with a known class, log p(x) of the others, nats."""
    joint = joint_by_hand()
    return np.where(KNOWN, joint[np.arange(4), CODES], np.logaddexp.reduce(joint, 1))


@pytest.mark.parametrize("program", [drawn_everywhere, masked_by_pyro])
def test_a_masked_class_counts_once_when_it_is_summed_over(program: Program) -> None:
    """The collapsed program is exact, 1e-12 nats per row, and Pyro's own enumeration agrees with it.

    Had a masked value no probability, each of the three would count as one, and a row be log 3 too high.
    """
    with isolated(0):
        trace = poutine.trace(collapsed(program, ["y_unobserved"])).get_trace(Batch.full(X))
        pyros = -TraceEnum_ELBO(max_plate_nesting=1).loss(config_enumerate(program), lambda batch: None, Batch.full(X))
    trace.compute_log_prob()
    found = trace.nodes[EVIDENCE_SITE]["unscaled_log_prob"].numpy()
    assert np.abs(found - classes_by_hand()).max() <= 1e-12
    assert np.abs(found - classes_by_hand()[::-1]).max() > 0.5
    assert float(pyros) == pytest.approx(found.sum(), abs=1e-9)


class Classifier(Guide):
    """Given probabilities of the class in each row; its site may be masked where the class is known."""

    def __init__(self, probabilities: np.ndarray, *, masked: bool) -> None:
        super().__init__("classifier", "categorical", "amortized", is_discrete=True)
        self.probabilities, self.masked = torch.from_numpy(probabilities), masked

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        mask = batch.x[:, 1] <= 0 if self.masked else torch.ones(len(batch.x), dtype=torch.bool)
        with pyro.plate("data", batch.total, subsample=batch.index), poutine.mask(mask=mask):
            q = dist.Categorical(self.probabilities)
            return {"y_unobserved": pyro.sample("y_unobserved", q, infer={"enumerate": "parallel"})}


def test_enumerated_bounds_of_classes_that_are_known_in_some_rows() -> None:
    """E_q[log p - log q] by hand, 1e-12 nats per row, as weights and as Pyro's loss (1e-9 in total).

    With masks on both sides, or without any and the prior as q where the class is known, rows pay nothing for what
    they know. A q that is not the prior pays where the program draws. Where the program alone is masked it gains its
    entropy, so that nothing is bounded.
    """
    uniform = np.full((4, 3), 1 / 3)
    prior = np.where(KNOWN[:, None], SHARES, uniform)
    joint = joint_by_hand()
    bound = np.where(KNOWN, joint[np.arange(4), CODES], (joint + math.log(3)).mean(1))
    entropy, paid = np.where(KNOWN, math.log(3), 0.0), np.where(KNOWN, (np.log(SHARES) + math.log(3)).mean(), 0.0)

    def check(program: Program, guide: Classifier, expected: np.ndarray) -> None:
        elbo = importance_weights(program_entry(program, X), guide, Batch.full(X), 1, seed=0).elbo()[0].numpy()
        assert np.abs(elbo - expected).max() <= 1e-12
        with isolated(0):
            loss = TraceEnum_ELBO(max_plate_nesting=1).loss(program, guide, Batch.full(X))
        assert -float(loss) == pytest.approx(expected.sum(), abs=1e-9)

    check(drawn_everywhere, Classifier(prior, masked=False), bound)
    check(masked_by_pyro, Classifier(uniform, masked=True), bound)
    check(drawn_everywhere, Classifier(uniform, masked=False), bound + paid)
    check(masked_by_pyro, Classifier(uniform, masked=False), bound + entropy)
    evidence = classes_by_hand()
    assert (bound <= evidence + 1e-12).all() and paid.min() < -0.05
    assert (bound + entropy > evidence + 0.5)[KNOWN].all()
