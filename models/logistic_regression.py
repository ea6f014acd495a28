r"""Bayesian logistic regression.

One column of the table, 0 or 1, is the target and the others are the design. The coefficients are one latent vector
for the whole data set with a normal prior, and no integral over them has a closed form: this is the smallest entry
without an oracle.

$$
\beta \sim \mathcal N(0, S^2), \qquad
y_n \mid \beta \sim \operatorname{Bernoulli}\bigl(1 / (1 + e^{-\phi_n^\top \beta})\bigr)
$$

$S$ is diagonal: `prior_scale` for slopes, `intercept_scale` for the intercept. The defaults take the scales that Gelman
et al. recommend for standardised columns, with normals in place of their Cauchy distributions.

The evidence is an integral over as many dimensions as there are coefficients. Up to three it is done by adaptive
cubature, with its error; above that it is estimated by annealed importance sampling, with its standard error.

What goes wrong:

*Separation.* Where a plane separates the two classes the likelihood has no maximum (Albert & Anderson 1984), and the
posterior is as wide as the prior lets it be: the answer is finite and proper, and it is the prior's. With one slope the
posterior can be summed on a grid; its mean goes where the prior's scale goes:

```python
x = torch.tensor([[-2.0, 0], [-1, 0], [-0.5, 0], [0.5, 1], [1, 1], [2, 1]]).double()
slopes = torch.linspace(-20, 200, 22001).double()
odds = slopes[:, None] * (2 * x[:, 1] - 1) * x[:, 0]
log_likelihood = torch.nn.functional.logsigmoid(odds).sum(1)
means = {}
for scale in (2.5, 10.0, 40.0):
    density = (log_likelihood - 0.5 * (slopes / scale) ** 2).softmax(0)
    means[scale] = float(density @ slopes)
    print(f"prior scale {scale}: posterior mean {means[scale]:.1f} log odds")
assert means[40.0] > 2 * means[10.0] > 4 * means[2.5]
```

*Skewness.* The posterior is then skewed, so that normal guides, and Laplace's most of all, sit on the wrong side of its
mass: Laplace's is about the mode, and reaches into slopes that the data exclude.

```python
settings = {"intercept": False, "prior_scale": 40.0, "progress": False}
fit = ez.fit("logistic-regression", x, guide="laplace", seed=0, **settings)
q = torch.tensor(fit.to_inferencedata().posterior["coefficients"].values).flatten()
figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
axes.hist(q.numpy(), bins=40, density=True, label="draws of Laplace's q")
axes.plot(slopes.numpy(), density.numpy() / 0.01, label="exact posterior")
axes.set(xlabel="slope, log odds", ylabel="density")
axes.legend()
print(f"mean of q {q.mean():.1f}, of the posterior {means[40.0]:.1f} log odds")
assert q.mean() < 0.6 * means[40.0]
```

References
----------
```bibtex
@article{gelman2008weakly,
  author = {Gelman, Andrew and Jakulin, Aleks and Pittau, Maria Grazia and Su, Yu-Sung},
  title = {A weakly informative default prior distribution for logistic and other regression models},
  journal = {The Annals of Applied Statistics}, volume = {2}, number = {4}, pages = {1360--1383}, year = {2008}
}
@article{albert1984existence,
  author = {Albert, Adelin and Anderson, J. A.},
  title = {On the existence of maximum likelihood estimates in logistic regression models},
  journal = {Biometrika}, volume = {71}, number = {1}, pages = {1--10}, year = {1984}
}
```
"""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.options import Field
from elbozoo.models.contract.regression import RegressionEntry, RegressionOptions


class LogisticRegressionOptions(RegressionOptions):
    """Options of :class:`LogisticRegression`."""

    prior_scale: float = Field(2.5, gt=0, description="prior standard deviation of every slope, in log odds")
    intercept_scale: float = Field(10.0, gt=0, description="prior standard deviation of the intercept, in log odds")


class LogisticRegression(RegressionEntry):
    """Logistic regression: β ~ N(0, S²), y ~ Bernoulli(logistic(Φβ)); no θ to learn."""

    Options = LogisticRegressionOptions
    options: LogisticRegressionOptions
    example_columns = 2  # with the intercept an integral over two dimensions

    @classmethod
    def check_data(cls, x: Tensor, options: Any) -> None:
        """Refuse a target that is not 0 or 1, and a table without anything to regress on."""
        super().check_data(x, options)
        target = x[:, options.target]
        wrong = target[(target != 0) & (target != 1)]
        if len(wrong):
            raise InvalidInput(
                f"option target: found the value {wrong[0]:g} in column {options.target % x.shape[1] + 1} (counted "
                "from 1), expected 0 or 1; recode that column, or name another with target"
            )

    def forward(self, batch: Batch) -> Tensor:
        """β (P,) ~ N(0, S²), outside the plate; x (B,), the target, ~ Bernoulli(logistic(Φβ))."""
        scale = self.prior_scale(batch.x)
        coefficients = pyro.sample("coefficients", dist.Normal(torch.zeros_like(scale), scale).to_event(1))
        logits = self.linear_predictor(batch.x, coefficients)
        with pyro.plate("data", batch.total, subsample=batch.index):
            return pyro.sample("x", dist.Bernoulli(logits=logits), obs=self.response(batch.x))
