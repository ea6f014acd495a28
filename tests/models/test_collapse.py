"""Programs with finite local latents summed out, held against sums written by hand."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex
from torch import Tensor

from elbozoo.models import Batch
from elbozoo.models.contract.collapse import EVIDENCE_SITE, PARTICLE_DIM, collapsed
from elbozoo.models.contract.isolation import isolated

WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
X = torch.tensor([[-1.0], [0.5], [2.0], [4.0]], dtype=torch.float64)


def program(batch: Batch) -> Tensor:
    """Three means that are global latents, and the component of each row."""
    means = pyro.sample("means", dist.Normal(torch.zeros(3, dtype=torch.float64), 2.0).to_event(1))
    with pyro.plate("data", batch.total, subsample=batch.index):
        z = pyro.sample("z", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
        mean = Vindex(means)[..., z]
        return pyro.sample("x", dist.Normal(mean[..., None], 1.0).to_event(1), obs=batch.x)


def by_hand(x: Tensor, means: Tensor) -> Tensor:
    """log sum_k w_k N(x_n; m_k, 1), (N,)."""
    densities = (-0.5 * (x - means).square()).exp() / (2 * torch.pi) ** 0.5
    return (densities * WEIGHTS).sum(-1).log()


def factor(means: Tensor, batch: Batch) -> Tensor:
    conditioned = poutine.condition(collapsed(program, ["z"]), data={"means": means})
    trace = poutine.trace(conditioned).get_trace(batch)
    trace.compute_log_prob()
    assert set(trace.nodes) >= {"means", EVIDENCE_SITE} and not {"z", "x"} & set(trace.nodes)
    result: Tensor = trace.nodes[EVIDENCE_SITE]["unscaled_log_prob"]
    return result


def test_the_factor_is_the_sum_over_components() -> None:
    """To rounding, 1e-12 nats per row; other means give another sum."""
    means = torch.tensor([-1.0, 0.0, 3.0], dtype=torch.float64)
    assert factor(means, Batch.full(X)) == pytest.approx(by_hand(X, means), abs=1e-12)
    assert factor(means + 0.01, Batch.full(X)) != pytest.approx(by_hand(X, means), abs=1e-12)


def test_particles_and_minibatches_are_summed_each_for_itself() -> None:
    batch = Batch.full(X)
    with isolated(0), pyro.plate("particles", 5, dim=PARTICLE_DIM):
        trace = poutine.trace(collapsed(program, ["z"])).get_trace(batch)
    trace.compute_log_prob()
    means = trace.nodes["means"]["value"][:, 0]
    expected = torch.stack([by_hand(X, draw) for draw in means])
    assert trace.nodes[EVIDENCE_SITE]["unscaled_log_prob"] == pytest.approx(expected, abs=1e-12)

    half = Batch(X[:2], torch.arange(2), 4)
    scaled = poutine.trace(poutine.condition(collapsed(program, ["z"]), data={"means": means[0]})).get_trace(half)
    scaled.compute_log_prob()
    assert float(scaled.nodes[EVIDENCE_SITE]["log_prob"].sum()) == pytest.approx(2 * float(expected[0, :2].sum()))


def test_pyros_enumeration_gives_the_same_objective() -> None:
    """TraceEnum_ELBO with a point mass on the means is minus the log joint that the collapsed program has."""
    means = torch.tensor([-1.0, 0.0, 3.0], dtype=torch.float64)

    def guide(batch: Batch) -> None:
        pyro.sample("means", dist.Delta(means, event_dim=1))

    loss = TraceEnum_ELBO(max_plate_nesting=1)
    with isolated(0):
        theirs = SVI(config_enumerate(program), guide, pyro.optim.Adam({}), loss).evaluate_loss(Batch.full(X))
    prior = float(dist.Normal(0.0, 2.0).log_prob(means).sum())
    assert -theirs == pytest.approx(float(by_hand(X, means).sum()) + prior, abs=1e-5)  # the loss passes through float32
    assert -theirs != pytest.approx(float(by_hand(X, means + 0.1).sum()) + prior, abs=1e-5)


def test_nothing_to_sum_out_changes_nothing() -> None:
    assert collapsed(program, []) is program
