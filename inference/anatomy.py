r"""What an ELBO is made of: rate and distortion, and what the rate pays for.

$$
-\mathrm{ELBO} = \underbrace{-\mathrm E_q \log p(x \mid z)}_{\text{distortion}}
+ \underbrace{\mathrm{KL}\bigl(q(z \mid x)\,\|\,p(z)\bigr)}_{\text{rate}},
\qquad
\tfrac1N \sum_n \mathrm{rate}_n = I_q(n; z) + \mathrm{KL}\bigl(\bar q(z)\,\|\,p(z)\bigr),
\quad \bar q(z) = \tfrac1N \sum_n q(z \mid x_n)
$$

The first is Alemi et al. (2018), the second ELBO surgery (Hoffman & Johnson 2016): of the rate, the mutual information
says how much z tells of which datum it came from, at most log N, and the rest how far the aggregated posterior
is from the prior, which no datum needs and a better prior would save. A latent dimension is *active* where the
mean of q moves over the data with a variance above 0.01 (Burda et al. 2016).

Everything is taken over one set of draws from q, or over all values of a finite latent with their probabilities, so
that both identities hold to rounding. Where the KL to the prior has a closed form the rate can be that instead;
the identities then hold within the standard errors.

References
----------
```bibtex
@inproceedings{alemi2018fixing,
  author = {Alemi, Alexander A. and Poole, Ben and Fischer, Ian and Dillon, Joshua V. and Saurous, Rif A. and
            Murphy, Kevin}, title = {Fixing a Broken {ELBO}},
  booktitle = {International Conference on Machine Learning}, pages = {159--168}, year = {2018}
}
@inproceedings{hoffman2016elbo,
  author = {Hoffman, Matthew D. and Johnson, Matthew J.},
  title = {{ELBO} surgery: yet another way to carve up the variational evidence lower bound},
  booktitle = {NIPS Workshop in Advances in Approximate Bayesian Inference}, year = {2016}
}
@inproceedings{burda2016importance,
  author = {Burda, Yuri and Grosse, Roger and Salakhutdinov, Ruslan},
  title = {Importance Weighted Autoencoders},
  booktitle = {International Conference on Learning Representations}, year = {2016}
}
```
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution

from elbozoo.guides.base import Guide
from elbozoo.guides.local import ExactGuide
from elbozoo.inference.divergence import closed_form_kl
from elbozoo.inference.evidence import summarised
from elbozoo.inference.weights import CHUNK_ELEMENTS
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.collapse import PARTICLE_DIM
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.joint import Joint
from elbozoo.models.contract.sequences import StackedEntry
from elbozoo.models.contract.sites import log_density

DRAWS = 100
ACTIVE = 0.01  # variance over the data of the mean of a dimension above which it is active (Burda et al. 2016, 5.1)

RateForm = Literal["auto", "closed", "sampled"]


class Part(NamedTuple):
    """One term of an ELBO.

    Attributes
    ----------
    per_datum : Tensor (N,)
        Each row's part, nats.
    standard_error : float
        Monte Carlo standard error of the total, nats; zero where nothing was drawn.
    """

    per_datum: Tensor
    standard_error: float

    def __repr__(self) -> str:
        return summarised(self)

    @property
    def total(self) -> float:
        """Sum over the rows, nats."""
        return float(self.per_datum.sum())

    @property
    def mean(self) -> float:
        """Mean over the rows, nats per datum."""
        return self.total / len(self.per_datum)


@dataclass(frozen=True)
class Anatomy:
    """The parts of an ELBO, and what they say about the latents; nats.

    Attributes
    ----------
    rate : Part
        KL(q(z given x_n) ‖ p(z)), the KL part of the ELBO.
    distortion : Part
        -E_q[log p(x_n given z)], minus the reconstruction part of the ELBO.
    information : Part
        E_q[log q(z given x_n) - log q̄(z)]: its mean is the mutual information of z and the datum's index.
    surplus : Part
        E_q[log q̄(z) - log p(z)]: its mean is KL(q̄ ‖ p), from the aggregated posterior to the prior.
    elbo_se : float
        Monte Carlo standard error of ``elbo``; less than that of its parts where their errors cancel.
    rate_form : str
        ``closed`` or ``sampled``.
    unit_variances : Tensor (K,)
        Variance over the data of the mean of q of each latent dimension, or of each probability of a finite latent.
    """

    rate: Part
    distortion: Part
    information: Part
    surplus: Part
    elbo_se: float
    rate_form: str
    unit_variances: Tensor

    @property
    def elbo(self) -> float:
        """ELBO of all rows at β = 1: total, nats."""
        return -self.rate.total - self.distortion.total

    @property
    def reconstruction(self) -> Tensor:
        """E_q[log p(x_n given z)] of each row, (N,), nats."""
        return -self.distortion.per_datum

    @property
    def mutual_information(self) -> float:
        """I_q(n; z) of the datum's index and the latent, nats; at most log N."""
        return self.information.mean

    @property
    def marginal_kl(self) -> float:
        """KL(q̄(z) ‖ p(z)) from the aggregated posterior to the prior, nats."""
        return self.surplus.mean

    @property
    def active_units(self) -> int:
        """Number of latent dimensions whose mean of q moves over the data with a variance above 0.01."""
        return int((self.unit_variances > ACTIVE).sum())

    def as_dict(self) -> dict[str, float | int | str]:
        """Return the figures by name: totals, and per datum where the name says so, nats."""
        rows = len(self.rate.per_datum)
        return {
            "elbo": self.elbo,
            "elbo_se": self.elbo_se,
            "rate": self.rate.total,
            "rate_se": self.rate.standard_error,
            "distortion": self.distortion.total,
            "distortion_se": self.distortion.standard_error,
            "rate_per_datum": self.rate.mean,
            "distortion_per_datum": self.distortion.mean,
            "mutual_information": self.mutual_information,
            "mutual_information_se": self.information.standard_error / rows,
            "marginal_kl": self.marginal_kl,
            "marginal_kl_se": self.surplus.standard_error / rows,
            "active_units": self.active_units,
            "units": len(self.unit_variances),
            "rate_form": self.rate_form,
            "rows": rows,
        }


def anatomy(
    entry: Entry, guide: Guide, x: Tensor, *, seed: int = 0, draws: int = DRAWS, kl: RateForm = "auto"
) -> Anatomy:
    """Take the ELBO of ``guide`` apart at the θ of ``entry`` on the rows ``x`` (N, D), float64.

    The aggregated posterior is that of these rows. Its density at S draws of N rows costs S N² densities.

    Parameters
    ----------
    draws : int
        Draws S from q of each row; a single finite latent is summed over instead.
    kl : str
        Rate in closed form, sampled, or (``auto``) closed where there is a form.

    Raises
    ------
    InvalidInput
        For latents that are not one for each row, a q without a density, or a closed form where there is none.
    """
    sites = entry.latent_sites(x)
    if reason := _refusal(entry, guide, draws):
        raise InvalidInput(f"no anatomy of {entry.name()} with guide {guide.name!r}: {reason}")
    batch = Batch.full(x)
    with isolated(seed), torch.no_grad():
        q = _joint(guide, batch)
        first = next(iter(q.conditionals.values()))
        single = first if len(sites) == 1 and isinstance(first, Distribution) else None
        if single is not None and sites[0].is_enumerable:
            values = {sites[0].name: single.enumerate_support(expand=True)}
            shares = single.log_prob(values[sites[0].name]).exp()
        else:
            values, shares = q.sample((draws,)), None
        terms = _log_terms(entry, batch, q, values)
        rate, form = _expected(terms.posterior - terms.prior, shares), "sampled"
        if kl != "sampled":
            closed = None if single is None else _closed_rate(entry, batch, sites[0].name, single)
            if closed is None and kl == "closed":
                raise InvalidInput(
                    f"option kl: found 'closed' for guide {guide.name!r}, whose KL to the prior of {entry.name()} has "
                    "no closed form; use kl='sampled'"
                )
            if closed is not None:
                rate, form = Part(closed, 0.0), "closed"
        distortion = _expected(-terms.likelihood, shares)
        together = _expected(terms.prior + terms.likelihood - terms.posterior, shares)
        return Anatomy(
            rate=rate,
            distortion=distortion,
            information=_expected(terms.posterior - terms.aggregate, shares),
            surplus=_expected(terms.aggregate - terms.prior, shares),
            elbo_se=(together if form == "sampled" else distortion).standard_error,
            rate_form=form,
            unit_variances=guide.means(batch).var(0, correction=0),
        )


class _LogTerms(NamedTuple):
    """Log densities at S values of z for each of N rows, (S, N), nats: q(z given x), q̄(z), p(z), p(x given z)."""

    posterior: Tensor
    aggregate: Tensor
    prior: Tensor
    likelihood: Tensor


def _refusal(entry: Entry, guide: Guide, draws: int) -> str | None:
    if isinstance(entry, StackedEntry):
        datum = entry.stack_dims[0]
        return f"a datum is a {datum}, and codes of {datum}s of different sizes have no common distribution"
    if not guide.is_local:
        return "a latent is one for the whole data set, so that rows have no codes of their own"
    if not guide.is_bound:
        return "a point mass has no density, and its rate is infinite"
    if draws < 2:
        return f"found draws={draws}, expected at least 2, to tell an error from"
    return None


def _joint(guide: Guide, batch: Batch) -> Joint:
    return guide.posterior(batch) if isinstance(guide, ExactGuide) else Joint(guide.distributions(batch))


def _log_terms(entry: Entry, batch: Batch, q: Joint, values: dict[str, Tensor]) -> _LogTerms:
    with pyro.validation_enabled(False), pyro.plate("particles", len(next(iter(values.values()))), dim=PARTICLE_DIM):
        trace = poutine.trace(poutine.condition(entry, data=values)).get_trace(batch)
    trace.compute_log_prob()
    posterior = q.log_prob(values)
    prior, likelihood = torch.zeros_like(posterior), torch.zeros_like(posterior)
    for name, node in trace.nodes.items():
        if name in values:
            prior = prior + log_density(node)
        elif "unscaled_log_prob" in node:
            likelihood = likelihood + log_density(node)
    return _LogTerms(posterior, _log_aggregate(q, values, posterior.shape), prior, likelihood)


def _log_aggregate(q: Joint, values: dict[str, Tensor], shape: torch.Size) -> Tensor:
    """Log q̄ at the values, (S, N): each value against q of every row."""
    rows = shape[1]
    flat = {name: value.reshape(shape.numel(), 1, *value.shape[2:]) for name, value in values.items()}
    width = rows * max(1, sum(value[0].numel() for value in flat.values()))
    at_once = max(1, CHUNK_ELEMENTS // width)
    parts = [
        q.log_prob({name: value[i : i + at_once] for name, value in flat.items()}).logsumexp(-1)
        for i in range(0, shape.numel(), at_once)
    ]
    return torch.cat(parts).reshape(shape) - torch.tensor(float(rows), dtype=parts[0].dtype).log()


def _expected(terms: Tensor, shares: Tensor | None) -> Part:
    """Mean of ``terms`` (S, N) over draws, or with the probabilities ``shares`` (S, N) of the values."""
    if shares is None:
        return Part(terms.mean(0), float((terms.var(0) / len(terms)).sum().sqrt()))
    # 0 log 0 = 0: a value without probability adds nothing.
    return Part(torch.where(shares > 0, shares * terms, torch.zeros_like(terms)).sum(0), 0.0)


def _closed_rate(entry: Entry, batch: Batch, site: str, q: Distribution) -> Tensor | None:
    """KL(q ‖ prior) of each row, (N,), or None where there is no closed form."""
    trace = poutine.trace(entry).get_trace(batch)
    try:
        return closed_form_kl(q, trace.nodes[site]["fn"]).expand(len(batch.x))
    except NotImplementedError:
        return None
