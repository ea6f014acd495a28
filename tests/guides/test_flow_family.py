"""The family of flows: densities against Jacobians and integrals, its start, its gap, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from elbozoo.guides import GuideOptions, build_guide, resolve_guide
from elbozoo.guides.bound import placed
from elbozoo.guides.families import FAMILIES, Flow
from elbozoo.inference import best_flow as module
from elbozoo.inference.best_flow import best_flow
from elbozoo.inference.best_member import best_member
from elbozoo.inference.evidence import log_evidence
from elbozoo.inference.method import plan
from elbozoo.inference.weights import importance_weights
from elbozoo.models import Batch, Entry, get_entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.sites import LatentSite

KINDS = ["affine-autoregressive", "spline-coupling"]
CASES = [("affine-autoregressive", 2), ("affine-autoregressive", 5), *[("spline-coupling", dim) for dim in (1, 2, 5)]]
ROWS = 3
Z = 6.0  # two-sided false-alarm rate 2e-9 for each comparison

cases = pytest.mark.parametrize(("kind", "dim"), CASES)


def real_site(dim: int) -> LatentSite:
    return LatentSite("z", torch.Size([dim]), constraints.real_vector, True, None)


def bent_flow(kind: str, dim: int, site: LatentSite | None = None) -> tuple[Flow, Tensor]:
    """A flow whose networks are far from the identity, and parameters (ROWS, P) of members unlike one another."""
    torch.manual_seed(3)
    family = Flow(site or real_site(dim), GuideOptions(flow=kind, flow_layers=3)).double()
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return family, 0.5 * torch.randn(ROWS, family.size, dtype=torch.float64)


def normal_density(noise: Tensor) -> Tensor:
    return -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1)


@cases
def test_density_is_the_noise_density_over_the_jacobian(kind: str, dim: int) -> None:
    """log q(z) = log N(noise) - log |dz / dnoise|, the Jacobian taken entry by entry by autograd (1e-8 nats)."""
    family, parameters = bent_flow(kind, dim)
    torch.manual_seed(4)
    for row in range(ROWS):
        q = family.distribution(parameters[row : row + 1])
        noise = torch.randn(dim, dtype=torch.float64)

        def draw(point: Tensor, q: Distribution = q) -> Tensor:
            return placed(q, point[None, None])[0, 0]

        jacobian = torch.autograd.functional.jacobian(draw, noise)
        volume = torch.linalg.slogdet(jacobian).logabsdet
        with torch.no_grad():
            found = q.log_prob(draw(noise)[None, None])[0, 0]
        assert float(found) == pytest.approx(float(normal_density(noise) - volume), abs=1e-8)
        # Negative control: without the volume, and of another row's q, the density is another.
        assert abs(float(volume)) > 1e-3
        other = family.distribution(parameters[(row + 1) % ROWS][None])
        with torch.no_grad():
            assert float(other.log_prob(draw(noise)[None, None])) != pytest.approx(float(found), abs=1e-3)


@cases
def test_density_of_a_draw_is_that_of_the_same_point_from_elsewhere(kind: str, dim: int) -> None:
    """What the transforms remember and what they invert agree (1e-5 nats: Pyro's spline finds bins to 1e-6)."""
    family, parameters = bent_flow(kind, dim)
    q = family.distribution(parameters)
    with torch.no_grad():
        z = q.rsample((7,))
        remembered = q.log_prob(z)
        inverted = family.distribution(parameters).log_prob(z.clone())
        moved = family.distribution(parameters).log_prob(z + 0.01)
    assert remembered.shape == (7, ROWS)
    assert float((remembered - inverted).abs().max()) < 1e-5
    assert float((remembered - moved).abs().max()) > 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_density_integrates_to_one(kind: str) -> None:
    """Over a grid in two dimensions, to 1e-3: a coarse sum of a density with kinks."""
    family, parameters = bent_flow(kind, 2)
    q = family.distribution(parameters[:1])
    with torch.no_grad():
        draws = q.sample((20_000,))[:, 0]
        centre, reach = draws.mean(0), 1.5 * (draws - draws.mean(0)).abs().amax(0)
        axes = [torch.linspace(-1, 1, 301, dtype=torch.float64) * reach[d] + centre[d] for d in range(2)]
        cell = float((axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0]))
        log_density = q.log_prob(torch.cartesian_prod(*axes)[:, None])
    assert float(log_density.exp().sum()) * cell == pytest.approx(1.0, abs=1e-3)
    assert float((1.01 * log_density).exp().sum()) * cell != pytest.approx(1.0, abs=1e-3)


def test_a_flow_over_positive_numbers_and_over_scalars() -> None:
    """The way to the support counts in the density, and a scalar site has scalar draws."""
    positive = LatentSite("z", torch.Size([2]), constraints.independent(constraints.positive, 1), True, None)
    family, parameters = bent_flow("affine-autoregressive", 2, positive)
    real, _ = bent_flow("affine-autoregressive", 2)
    q, plain = family.distribution(parameters), real.distribution(parameters)
    with torch.no_grad():
        z = q.sample((5,))
        assert (z > 0).all()
        carried = plain.log_prob(z.log()) - z.log().sum(-1)
        # Nats; the same formula in another order errs by 1e-12.
        assert float((q.log_prob(z) - carried).abs().max()) < 1e-9
        assert float((q.log_prob(z) - plain.log_prob(z.log())).abs().max()) > 1e-3
    scalar = LatentSite("z", torch.Size([]), constraints.real, True, None)
    family, parameters = bent_flow("auto", 1, scalar)
    draws = family.distribution(parameters).sample((5,))
    assert draws.shape == (5, ROWS) and family.distribution(parameters).log_prob(draws).shape == (5, ROWS)


@cases
def test_it_starts_as_the_diagonal_normal_beneath_it(kind: str, dim: int) -> None:
    """At every context, so that a search can start there (1e-7 nats: networks are born in float32)."""
    flow = Flow(real_site(dim), GuideOptions(flow=kind)).double()
    diagonal = FAMILIES["diagonal-normal"](real_site(dim), GuideOptions())
    torch.manual_seed(5)
    parameters = torch.randn(ROWS, flow.size, dtype=torch.float64)
    normal = diagonal.distribution(parameters[:, : 2 * dim])
    z = normal.sample((6,))
    with torch.no_grad():
        assert float((flow.distribution(parameters).log_prob(z) - normal.log_prob(z)).abs().max()) < 1e-7
        carried = flow.distribution(flow.from_diagonal(parameters[:, : 2 * dim]))
        assert float((carried.log_prob(z) - normal.log_prob(z)).abs().max()) < 1e-7
    bent, _ = bent_flow(kind, dim)
    with torch.no_grad():
        assert float((bent.distribution(parameters).log_prob(z) - normal.log_prob(z)).abs().max()) > 1e-3


def trained_decoder() -> tuple[Entry, Tensor, float]:
    """A VAE with posteriors that are bent, rows from it, and their evidence by quadrature."""
    entry = get_entry("vae").example(seed=1).double()
    x, _ = entry.simulate(24, seed=2)
    evidence = log_evidence(entry, x)
    assert evidence is not None and evidence.kind == "quadrature"
    return entry, x, evidence.value


def elbo(entry: Entry, guide: torch.nn.Module, x: Tensor) -> tuple[float, float]:
    weights = importance_weights(entry, guide, Batch.full(x), 2000, seed=1).elbo()  # type: ignore[arg-type]
    return float(weights.mean(0).sum()), float((weights.var(0) / len(weights)).sum().sqrt())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_gap_of_the_flow_is_below_the_diagonal_normals_and_above_zero(kind: str) -> None:
    """On posteriors that are no normals, by more than six standard errors; before the search it is not."""
    entry, x, evidence = trained_decoder()
    options = GuideOptions(flow=kind)
    with isolated(0):
        guide = build_guide("amortized-flow", entry, x, options).double()
    best = best_flow(entry, guide, x, options)  # type: ignore[arg-type]
    assert best.converged and best.method == "Adam"
    flow, flow_error = elbo(entry, best.guide, x)
    normal = best_member(entry, "diagonal-normal", x, options)
    assert normal is not None
    diagonal, diagonal_error = elbo(entry, normal.guide, x)
    error = Z * math.hypot(flow_error, diagonal_error)
    assert flow <= evidence + Z * flow_error
    assert evidence - flow < evidence - diagonal - error
    untrained, _ = elbo(entry, guide, x)
    assert not evidence - untrained < evidence - diagonal - error


@pytest.mark.slow
def test_the_search_never_ends_below_the_guide_it_starts_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short it is: a trained flow, better than every normal, is kept or bettered (six standard errors)."""
    entry, x, _ = trained_decoder()
    with isolated(0):
        guide = build_guide("free-flow", entry, x).double()
    monkeypatch.setattr(module, "BLOCKS", 12)
    trained = best_flow(entry, guide, x, GuideOptions()).guide  # type: ignore[arg-type]
    before, before_error = elbo(entry, trained, x)
    monkeypatch.setattr(module, "BLOCKS", 1)
    after, after_error = elbo(entry, best_flow(entry, trained, x, GuideOptions()).guide, x)  # type: ignore[arg-type]
    error = Z * math.hypot(before_error, after_error)
    assert after >= before - error
    # Negative control: from the start that knows nothing, as short a search does not get there.
    other, _ = elbo(entry, best_flow(entry, guide, x, GuideOptions()).guide, x)  # type: ignore[arg-type]
    assert not other >= before - error


def test_an_autoregressive_flow_finds_a_correlated_normal_posterior() -> None:
    """Where mean-field leaves half a nat per datum, two autoregressive layers leave under a tenth of that."""
    entry = get_entry("ppca").example(seed=1, latent_dim=2)
    with torch.no_grad():
        entry.loading[:, 1] = entry.loading[:, 0] + 0.5 * entry.loading[:, 1]
        x, _ = entry.simulate(30, seed=2)
        truth = float(entry.log_evidence(x).sum())
    with isolated(0):
        guide = build_guide("free-flow", entry, x)
    best = best_flow(entry, guide, x, GuideOptions())  # type: ignore[arg-type]
    value, error = elbo(entry, best.guide, x)
    normal = best_member(entry, "diagonal-normal", x, GuideOptions())
    assert normal is not None
    gap = truth - elbo(entry, normal.guide, x)[0]
    assert gap > 0.5 * len(x)
    assert -Z * error <= truth - value < 0.1 * gap
    assert not truth - elbo(entry, normal.guide, x)[0] < 0.1 * gap


@pytest.mark.parametrize("source", ["shared", "free", "amortized"])
def test_every_source_feeds_it_and_a_saved_fit_comes_back(source: str, tmp_path: Path) -> None:
    """To the last bit, with one dimension too, where it is a spline."""
    entry = get_entry("ppca").example(seed=1)
    x, _ = entry.simulate(30, seed=2)
    for latent_dim in (1, 2):
        fit = plan("ppca", x, f"{source}-flow", {"steps": 20, "latent_dim": latent_dim}).run(0, progress=False)
        folder = fit.save(tmp_path / f"{source}{latent_dim}")
        loaded = type(fit).load(folder)
        assert loaded.elbo(x) == fit.elbo(x)
        assert fit.elbo(x) <= float(fit.log_evidence(x).value)  # type: ignore[union-attr]
        with torch.no_grad():
            for parameter in loaded.guide.networks.parameters():  # type: ignore[union-attr]
                parameter.add_(0.1)
        assert loaded.elbo(x) != fit.elbo(x)


def test_what_it_does_not_fit_is_refused_in_one_line() -> None:
    one = get_entry("ppca").example(seed=1, latent_dim=1)
    x, _ = one.simulate(20, seed=2)
    with pytest.raises(InvalidInput, match="one dimension, where that flow is a normal, expected 'spline-coupling'"):
        build_guide("free-flow", one, x, GuideOptions(flow="affine-autoregressive"))
    with pytest.raises(InvalidInput, match="takes 3 values, and flow is a family over real vectors"):
        resolve_guide("free-flow", get_entry("gaussian-mixture").example())
    with pytest.raises(InvalidInput, match="independent across time"):
        resolve_guide("amortized-flow", get_entry("linear-gaussian-state-space").example())
    with pytest.raises(InvalidInput, match="as in free-flow or amortized-flow"):
        resolve_guide("flow", one)
