r"""Linear variational autoencoder: PPCA learned like a VAE.

A VAE whose decoder is a matrix and whose encoder may be one too. Its program is that of `ppca`, so that everything
is known of it: the evidence, the posterior, and the global maximum. It is where to look for the reason of what a
VAE does, because what is true of it cannot be blamed on networks.

$$
z_n \sim \mathcal N(0, I_K), \qquad x_n \mid z_n \sim \mathcal N(W z_n + \mu,\ \sigma^2 I_D)
$$

Given $\sigma$, let $\lambda_1 \ge \lambda_2 \ge \dots$ be the eigenvalues of the covariance of the rows, and $u_k$ its
eigenvectors. The likelihood is largest at

$$
W = \bigl(w_1, \dots, w_K\bigr)\, R, \qquad w_k = \sqrt{\max(\lambda_k - \sigma^2,\, 0)}\; u_k, \qquad R^\top R = I
$$

so that the column $w_k$ is zero exactly where $\lambda_k \le \sigma^2$: that latent dimension is not used,
its posterior is the prior, and its KL is zero. This is *posterior collapse*, and it is the likelihood's own optimum: no
better encoder, no tighter bound and no longer training brings the dimension back, only less noise does. With
`noise_scale` unset $\sigma$ is learned. Its best value is the mean of the eigenvalues left over,
$\sigma^2 = \tfrac{1}{D-K} \sum_{k>K} \lambda_k$, which is below $\lambda_K$ unless they are all the same: then nothing
collapses.

The posterior mean is linear in $x$ and its covariance the same for every row, so that `encoder=linear` contains it
at the rotation $R = I$, where the posterior is diagonal. The ELBO, unlike the likelihood, prefers that rotation, and
has no local maxima that the likelihood does not have (Lucas et al. 2019, theorem 1).

What goes wrong:

*Posterior collapse.* A `noise_scale` above the root of $\lambda_k$ switches $k$ off. Two of the four eigenvalues below
are smaller than the noise. The encoder is linear and the ELBO has no local maxima to be blamed, yet two columns of $W$
go to zero, as the formula above says:

```python
x = ez.load_data("wine-standardised").x
eigenvalues = torch.linalg.eigvalsh(x.T.cov(correction=0)).flip(0)
settings = {"encoder": "linear", "latent_dim": 4, "noise_scale": 1.3, "progress": False}
fit = ez.fit("linear-vae", x, guide="amortized", seed=0, **settings)
learned = fit.entry.loading.detach().norm(dim=0).sort(descending=True).values
for k, length in enumerate(learned):
    formula = float((eigenvalues[k] - 1.3**2).clamp(min=0).sqrt())
    print(f"{k + 1}: √λ {eigenvalues[k].sqrt():.2f},", end=" ")
    print(f"|w| {length:.2f}, by the formula {formula:.2f}")
assert learned[1] > 0.8 and learned[2] < 0.1
```

*No noise left.* With $\sigma$ learned, $K$ must stay below the rank of the centred rows, or the noise vanishes and the
likelihood is unbounded. Four rows have rank three at most:

```python
refused = False
try:
    ez.fit("linear-vae", x[:4], latent_dim=3, progress=False)
except ez.InvalidInput as error:
    refused = True
    print(error)
assert refused
```

*Columns in different units* are weighed by their variance, so standardise them first; the page of `ppca` shows what
happens otherwise.

References
----------
```bibtex
@inproceedings{lucas2019dont,
  author = {Lucas, James and Tucker, George and Grosse, Roger and Norouzi, Mohammad},
  title = {Don't Blame the {ELBO}! A Linear {VAE} Perspective on Posterior Collapse},
  booktitle = {Advances in Neural Information Processing Systems}, volume = {32}, year = {2019}
}
@article{tipping1999probabilistic,
  author = {Tipping, Michael E. and Bishop, Christopher M.},
  title = {Probabilistic Principal Component Analysis},
  journal = {Journal of the Royal Statistical Society B},
  volume = {61}, number = {3}, pages = {611--622}, year = {1999}
}
```
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.options import Field
from elbozoo.models.numerics.linear_gaussian import LinearGaussianStatistics
from elbozoo.models.ppca import PPCA, PPCAOptions

LEAST_SHARE = 0.1


class LinearVAEOptions(PPCAOptions):
    """Options of :class:`LinearVAE`."""

    noise_scale: float | None = Field(None, gt=0, description="standard deviation σ of the noise; none learns it")


class LinearVAE(PPCA):
    """Linear VAE: z ~ N(0, I), x ~ N(W z + μ, σ² I), with σ learned or given.

    Attributes
    ----------
    loading : Parameter (D, K)
        W, the linear decoder.
    loc : Parameter (D,)
        μ, mean of each column.
    noise_scale : PyroParam () or buffer ()
        σ, standard deviation of the noise; a buffer where the option gives it.
    """

    Options = LinearVAEOptions
    options: LinearVAEOptions

    def __init__(self, options: LinearVAEOptions, columns: int) -> None:
        super().__init__(options, columns)
        if options.noise_scale is not None:
            del self.noise_scale
            self.register_buffer("noise_scale", torch.tensor(options.noise_scale, dtype=self.dtype))

    @classmethod
    def check_data(cls, x: Tensor, options: Any) -> None:
        """Refuse more latent dimensions than the data's rank allows, or than there is anything to explain."""
        if options.noise_scale is None:
            super().check_data(x, options)
        elif options.latent_dim > min(x.shape):
            raise InvalidInput(
                f"option latent_dim: found {options.latent_dim} for {len(x)} rows x {x.shape[1]} columns, expected at "
                f"most {min(x.shape)}: the covariance has no more eigenvalues, and further columns of W would be zero"
            )

    def initialize(self, x: Tensor, restart: int = 0) -> None:
        """Start at the data's mean, in the plane of random mixtures of rows, with the best scales for that plane.

        See :meth:`PPCA.initialize <elbozoo.models.ppca.PPCA.initialize>`. No scale starts at zero, where the gradient
        vanishes whether the dimension is worth having or not.
        """
        if self.options.noise_scale is None:
            super().initialize(x, restart)
            return
        noise = self.noise_scale.square()
        with torch.no_grad():
            centred = x - x.mean(0)
            mixtures = torch.randn(len(x), self.options.latent_dim, dtype=x.dtype)
            basis = torch.linalg.qr(centred.mT @ mixtures).Q
            inside = centred @ basis
            variances, axes = torch.linalg.eigh(inside.mT @ inside / len(x))
            self.loc.copy_(x.mean(0))
            self.loading.copy_(basis @ axes * torch.maximum(variances - noise, LEAST_SHARE * noise).sqrt())

    def randomize(self) -> None:
        """Draw a loading of unit variance; the noise has half that scale where the option does not give it."""
        if self.options.noise_scale is None:
            super().randomize()
            return
        with torch.no_grad():
            self.loading.normal_()
            self.loc.normal_()

    def maximize(self, statistics: LinearGaussianStatistics) -> None:
        """M step: that of PPCA, in which W and μ do not depend on σ."""
        given = self.noise_scale
        super().maximize(statistics)
        if self.options.noise_scale is not None:
            self.noise_scale = given

    def fit_exact(self, x: Tensor) -> None:
        """Set θ to the global maximum: Lucas et al. (2019), equation 7, at the noise that is given."""
        if self.options.noise_scale is None:
            super().fit_exact(x)
            return
        k = self.options.latent_dim
        with torch.no_grad():
            loc = x.mean(0)
            _, singular, directions = torch.linalg.svd(x - loc, full_matrices=False)
            surplus = singular[:k].square() / len(x) - self.noise_scale.square()
            self.loc.copy_(loc)
            self.loading.copy_(directions[:k].mT * surplus.clamp(min=0).sqrt())
