r"""Eight schools: effects of which each comes with a known standard error.

Eight schools coached their pupils for a test, and each reports the effect of the coaching with its standard error.
Are the effects one number, eight numbers, or something in between? The hierarchy lets the data say: the true effects
vary about a mean $\mu$ with a standard deviation $\tau$, and both are latent. It is the smallest model of
meta-analysis, and the best known example of a posterior that is hard to sample.

$$
\mu \sim \mathcal N(0, s_\mu^2), \qquad \tau \sim \mathrm{HalfCauchy}(s_\tau), \qquad
\theta_j \mid \mu, \tau \sim \mathcal N(\mu, \tau^2), \qquad x_j \mid \theta_j \sim \mathcal N(\theta_j, \sigma_j^2)
$$

The data have two columns: the effect $x_j$ and its standard error $\sigma_j$, which is conditioned on. A row is a
school, and all effects together are one latent site, `theta`. With `parameterization=non-centred` the program draws
$\eta_j \sim \mathcal N(0, 1)$ instead and sets $\theta_j = \mu + \tau \eta_j$: the same model, another geometry.

Given $(\mu, \tau)$ the effects integrate out, $x_j \sim \mathcal N(\mu, \sigma_j^2 + \tau^2)$, so that the evidence is
an integral over two dimensions. Given $\tau$ alone $\mu$ is normal as well (Gelman et al. 2013, section 5.4), so that
every posterior moment and marginal is an integral over $\log\tau$ only.

What goes wrong:

*The funnel*. Where $\tau$ is small the centred effects are squeezed into a funnel that no single step size suits
(Betancourt & Girolami 2015). NUTS diverges there, and mean-field VI has a gap several times that of the non-centred
form. The tables turn when the data are so many or so precise that they pin each $\theta_j$ down: then it is the centred
form that is easy. Here are the eight schools as reported, and with standard errors a thirtieth as large:

```python
schools = ez.load_data("eight-schools").x
precise = schools / torch.tensor([1.0, 30.0])
gaps = {}
for name, rows in {"as reported": schools, "precise": precise}.items():
    for form in ("centred", "non-centred"):
        options = {"parameterization": form, "steps": 120, "learning_rate": 0.1}
        effects = ez.fit("eight-schools", rows, **options, seed=0, progress=False)
        gaps[name, form] = effects.log_evidence().value - effects.elbo()
        print(f"{name}, {form}: gap {gaps[name, form]:.2f} nats, total")
assert gaps["as reported", "centred"] > gaps["as reported", "non-centred"] + 1
assert gaps["precise", "non-centred"] > gaps["precise", "centred"] + 1
```

*No mode*. The centred density grows without bound as $\tau \to 0$ with all $\theta_j = \mu$, so that `delta` falls into
the neck and `laplace` finds no maximum. The longer `delta` climbs, the smaller its $\tau$:

```python
tau = {}
for steps in (150, 600):
    options = {"parameterization": "centred", "steps": steps, "seed": 0}
    point = ez.fit("eight-schools", schools, guide="delta", **options, progress=False)
    tau[steps] = float(point.to_inferencedata(draws=4).posterior.tau.mean())
    height = point.trajectory.objective.iloc[-1]
    print(f"{steps} steps: τ {tau[steps]:.4f} points, log density {height:.1f} nats")
assert tau[600] < 0.2 * tau[150]
```

*Few schools*. With so few, the prior of $\tau$ decides (Gelman 2006).

References
----------
```bibtex
@article{rubin1981estimation,
  author = {Rubin, Donald B.},
  title = {Estimation in Parallel Randomized Experiments},
  journal = {Journal of Educational Statistics}, volume = {6}, number = {4}, pages = {377--401}, year = {1981}
}
@book{gelman2013bayesian,
  author = {Gelman, Andrew and Carlin, John B. and Stern, Hal S. and Dunson, David B. and Vehtari, Aki and
            Rubin, Donald B.},
  title = {Bayesian Data Analysis}, edition = {3}, publisher = {CRC Press}, year = {2013},
  note = {sections 5.4 and 5.5}
}
@article{gelman2006prior,
  author = {Gelman, Andrew},
  title = {Prior distributions for variance parameters in hierarchical models},
  journal = {Bayesian Analysis}, volume = {1}, number = {3}, pages = {515--534}, year = {2006}
}
@incollection{betancourt2015hamiltonian,
  author = {Betancourt, Michael and Girolami, Mark},
  title = {{H}amiltonian {M}onte {C}arlo for Hierarchical Models},
  booktitle = {Current Trends in {B}ayesian Methodology with Applications}, publisher = {CRC Press}, year = {2015}
}
```
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, NamedTuple

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import ParameterFreeEntry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.options import Field, Options

EFFECT, STANDARD_ERROR = 0, 1
STEP, TAIL = 0.1, 37.0  # spacing of the lattice over log τ, and how far it goes beyond all scales: e^-37 < 1e-16


class EightSchoolsOptions(Options):
    """Options of :class:`EightSchools`."""

    parameterization: Literal["non-centred", "centred"] = Field(
        "non-centred", description="whether the program draws standardised effects or the effects themselves"
    )
    mu_scale: float = Field(5.0, gt=0, description="prior standard deviation of the mean effect μ")
    tau_scale: float = Field(5.0, gt=0, description="scale of the half-Cauchy prior of τ")


class Moments(NamedTuple):
    """Posterior mean and standard deviation of a latent, each in the latent's shape and the data's unit."""

    mean: Tensor
    sd: Tensor


class EightSchools(ParameterFreeEntry):
    """Normal hierarchy with known standard errors: θ ~ N(μ, τ²), x ~ N(θ, σ²); all is latent, no θ to learn."""

    Options = EightSchoolsOptions
    options: EightSchoolsOptions
    reduced_dim: ClassVar[int] = 2
    example_columns = 2
    site_dims: ClassVar[dict[str, tuple[str, ...]]] = {"theta": ("school",), "eta": ("school",)}

    @classmethod
    def check_data(cls, x: Tensor, options: Any) -> None:
        """Refuse other than two columns, and standard errors that are not positive."""
        if x.shape[1] != 2:
            raise InvalidInput(
                f"found {x.shape[1]} columns, expected 2, an effect and its standard error: "
                "pick them in this order with --columns"
            )
        wrong = torch.nonzero(x[:, STANDARD_ERROR] <= 0).flatten().tolist()
        if wrong:
            raise InvalidInput(
                f"row {wrong[0] + 1}: found the standard error {x[wrong[0], STANDARD_ERROR]:g}, expected a positive "
                "number in the second column; put the effect first, or leave that row out"
            )

    def forward(self, batch: Batch) -> Tensor:
        """μ (), τ () and θ (N,) outside the plate, one θ per school; x (B,) ~ N(θ, σ²)."""
        options = self.options
        zeros = batch.x.new_zeros(batch.total)
        mu = pyro.sample("mu", dist.Normal(zeros.new_zeros(()), options.mu_scale))
        tau = pyro.sample("tau", dist.HalfCauchy(zeros.new_tensor(options.tau_scale)))
        # Particles put dimensions in front: μ and τ may be (S, 1), and the schools are always the last dimension.
        if options.parameterization == "centred":
            theta = pyro.sample("theta", dist.Normal(mu[..., None] + zeros, tau[..., None]).to_event(1))
        else:
            eta = pyro.sample("eta", dist.Normal(zeros, 1.0).to_event(1))
            theta = pyro.deterministic("theta", mu[..., None] + tau[..., None] * eta, event_dim=1)
        with pyro.plate("data", batch.total, subsample=batch.index):
            effects = _in_the_plate(theta)[..., batch.index]
            return pyro.sample("x", dist.Normal(effects, batch.x[:, STANDARD_ERROR]), obs=batch.x[:, EFFECT])

    def template(self, n: int) -> Tensor:
        """Return ``n`` schools with effect 0 and standard errors about 5, drawn at random."""
        template = super().template(n)
        template[:, STANDARD_ERROR] = 5 * torch.randn_like(template[:, STANDARD_ERROR]).mul(0.3).exp()
        return template

    def complete(self, template: Tensor, observed: Tensor) -> Tensor:
        """Put simulated effects beside the standard errors that they were drawn with."""
        return torch.stack([observed, template[:, STANDARD_ERROR]], -1)

    def constant_data(self, x: Tensor) -> dict[str, Tensor]:
        """Return the standard errors."""
        return {"standard_error": x[:, STANDARD_ERROR]}

    def reduced_log_joint(self, x: Tensor, u: Tensor) -> Tensor:
        """Log p(x, μ, log τ) at the points ``u`` (G, 2) with the effects integrated out: (G,), total nats."""
        mu, tau = u[:, 0], u[:, 1].exp()
        scale = _marginal_variance(x, tau).sqrt()
        log_likelihood = dist.Normal(mu[:, None], scale).log_prob(x[:, EFFECT]).sum(-1)
        return log_likelihood + self._log_prior_mu(mu) + self._log_prior_tau(tau) + u[:, 1]

    def posterior_moments(self, x: Tensor) -> dict[str, Moments]:
        """Posterior mean and standard deviation of ``mu`` (), ``tau`` () and ``theta`` (N,), exact to rounding.

        Given τ all are normal (Gelman et al. 2013, section 5.4); over log τ the trapezoid rule converges faster
        than any power of its spacing. One school alone leaves τ without a variance: its ``sd`` is infinite.
        """
        tau, weight = self._tau_posterior(x)
        mean, variance = self._mu_given_tau(x, tau)
        tau_sd = _mixed(weight, tau, torch.zeros_like(tau)).sd if len(x) > 1 else tau.new_tensor(math.inf)
        return {
            "mu": _mixed(weight, mean, variance),
            "tau": Moments((weight * tau).sum(), tau_sd),
            "theta": _mixed(weight, *self._theta_given_tau(x, tau)),
        }

    def posterior_marginal(self, x: Tensor, site: str, values: Tensor) -> Tensor:
        """Posterior density of a latent at ``values`` (V,): (V,) for ``mu`` and ``tau``, (V, N) for ``theta``.

        Raises
        ------
        InvalidInput
            For another name.
        """
        tau, weight = self._tau_posterior(x)
        if site == "tau":
            log_normaliser = (self._log_joint_tau(x, tau) + tau.log()).logsumexp(0) + math.log(STEP)
            return (self._log_joint_tau(x, values) - log_normaliser).exp()
        if site not in ("mu", "theta"):
            raise InvalidInput(f"found the site {site!r}, expected mu, tau or theta; name one of them")
        mean, variance = self._mu_given_tau(x, tau) if site == "mu" else self._theta_given_tau(x, tau)
        points = values.reshape(-1, 1, *[1] * (mean.ndim - 1))
        return torch.tensordot(dist.Normal(mean, variance.sqrt()).log_prob(points).exp(), weight, ([1], [0]))

    def _tau_posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Lattice of τ (G,), even in log τ, and the posterior probability of each point."""
        options = self.options
        sizes = torch.cat([x[:, STANDARD_ERROR], x.new_tensor([options.mu_scale, options.tau_scale])])
        largest = torch.maximum(sizes.max(), x[:, EFFECT].abs().max())
        # Below all scales the density of log τ falls like τ, above them like 1/τ or faster.
        tau = torch.arange(float(sizes.min().log()) - TAIL, float(largest.log()) + TAIL, STEP, dtype=x.dtype).exp()
        return tau, (self._log_joint_tau(x, tau) + tau.log()).softmax(0)

    def _log_joint_tau(self, x: Tensor, tau: Tensor) -> Tensor:
        """Log p(x, τ), (G,): p(x, μ, τ) / p(μ given x, τ) at the mean of the latter."""
        mean, variance = self._mu_given_tau(x, tau)
        scale = _marginal_variance(x, tau).sqrt()
        log_joint = dist.Normal(mean[:, None], scale).log_prob(x[:, EFFECT]).sum(-1)
        log_prior = self._log_prior_mu(mean) + self._log_prior_tau(tau)
        return log_joint + log_prior + 0.5 * (2 * math.pi * variance).log()

    def _log_prior_mu(self, mu: Tensor) -> Tensor:
        return dist.Normal(mu.new_zeros(()), self.options.mu_scale).log_prob(mu)

    def _log_prior_tau(self, tau: Tensor) -> Tensor:
        return dist.HalfCauchy(tau.new_tensor(self.options.tau_scale)).log_prob(tau)

    def _mu_given_tau(self, x: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of μ given x and τ, (G,)."""
        precision = 1 / _marginal_variance(x, tau)
        variance = 1 / (precision.sum(-1) + 1 / self.options.mu_scale**2)
        return variance * (precision @ x[:, EFFECT]), variance

    def _theta_given_tau(self, x: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each θ given x and τ, (G, N): what is left of σ² and of the doubt about μ."""
        mean, variance = self._mu_given_tau(x, tau)
        pooling = x[:, STANDARD_ERROR].square() / _marginal_variance(x, tau)
        effects = pooling * mean[:, None] + (1 - pooling) * x[:, EFFECT]
        return effects, pooling * tau[:, None].square() + pooling.square() * variance[:, None]


def _marginal_variance(x: Tensor, tau: Tensor) -> Tensor:
    """Variance σ² + τ² of each effect given μ and τ, (G, N)."""
    return x[:, STANDARD_ERROR].square() + tau[:, None].square()


def _mixed(weight: Tensor, mean: Tensor, variance: Tensor) -> Moments:
    """Moments of a mixture with weights (G,) of distributions with those means and variances (G, ...)."""
    together = torch.tensordot(weight, mean, 1)
    return Moments(together, torch.tensordot(weight, variance + (mean - together).square(), 1).sqrt())


def _in_the_plate(theta: Tensor) -> Tensor:
    """Return θ (..., 1, N), one for each particle, as (..., N): the schools take the place of the data plate."""
    return theta.squeeze(-2) if theta.ndim > 1 else theta
