r"""Denoising autoencoder: an autoencoder whose encoder is trained on corrupted rows.

The encoder sees a row with noise on it, and the decoder has to give back the row as it was. Copying no longer pays,
however wide the code, so that what is learned is how the columns hang together. With a flat prior this is the
denoising autoencoder of Vincent et al. (2008); with a normal one, and a q with a density, the denoising VAE of Im
et al. (2017).

$$
\tilde x_n \sim c(\tilde x \mid x_n), \qquad z_n \sim q(z \mid \tilde x_n), \qquad
x_n \mid z_n \sim \prod_d \mathrm{Bernoulli}\bigl(\mathrm{sigmoid}(y_{nd})\bigr)
\quad\text{or}\quad \prod_d \mathcal N\bigl(m_d + s_d\, y_{nd},\ (s_d\, \sigma)^2\bigr)
$$

with $y_n$ the output of the decoder at $z_n$, as in `autoencoder`. The corruption $c$ works on each cell alone, and is
drawn anew at each step: `gaussian` adds $\mathcal N(0, (\nu s_d)^2)$; `masking` blanks a cell with probability $\nu$,
to 0 where the cells are zeros and ones and to the column's mean where they are numbers; `salt-and-pepper` sets it to
the column's least or largest value with probability $\nu/2$ each. It belongs to the training of the encoder and not
to the program, which knows $x$ alone: codes and figures of a fit are those of the rows as they are.

What is maximised is the *denoising criterion*. Under `prior = normal` it is

$$
\mathcal L_{\mathrm{denoising}}(x) = \mathrm E_{c(\tilde x \mid x)}\, \mathrm E_{q(z \mid \tilde x)}
\bigl[\log p(x, z) - \log q(z \mid \tilde x)\bigr].
$$

For each $\tilde x$ the inner expectation is the ELBO of $x$ for one more density over $z$, and so at most
$\log p(x)$, and so is its mean. It is a bound, and one with a price: with the mixture
$\tilde q(z \mid x) = \mathrm E_c\, q(z \mid \tilde x)$,

$$
\log p(x) \;\ge\; \mathrm E_{\tilde q}\bigl[\log p(x, z) - \log \tilde q(z \mid x)\bigr]
= \mathcal L_{\mathrm{denoising}}(x) + I(z; \tilde x \mid x),
$$

because $\mathrm E_c \mathrm{KL}(q(z \mid \tilde x) \,\|\, \tilde q(z \mid x))$ is the information that z has about the
noise: an encoder that follows the noise loses it twice. The ELBO of a fit is another number, that of $q(z \mid x)$ on
the clean row, on which the encoder has not been trained; the two are two columns, `elbo` and `denoising_elbo`, and
either may be the larger. Under `prior = flat` neither exists: the objective is
$\sum_n \mathrm E_c \log p(x_n \mid e(\tilde x_n))$, no bound, for the reasons under `autoencoder`.

If encoder and decoder are linear, $A$ being their product and the rows centred and in units of their columns, the
expected squared error is a quadratic function of $A$, with $S$ the covariance of the rows, $C$ that of the corrupted
rows and $R$ their cross-covariance:

$$
\mathrm E \|x - A \tilde x\|^2 = \bigl\|(A - A^*)\, C^{1/2}\bigr\|_F^2 + \mathrm{const}, \qquad A^* = R\, C^{-1},
\qquad A_K = \bigl[R\, C^{-1/2}\bigr]_K\, C^{-1/2}
$$

where $[\cdot]_K$ keeps the first K singular values (Eckart–Young). Gaussian noise has $R = S$ and $C = S + \nu^2 I$,
so that $A^*$ is a ridge regression of the rows on themselves and $A_K$ is PCA with each component shrunk by
$\lambda_k / (\lambda_k + \nu^2)$. Masking has $R = (1 - \nu) S$ and
$C = (1 - \nu)^2 S + \nu (1 - \nu)\, \mathrm{diag}\, S$ (Chen et al. 2012); as columns in their own units have
$\mathrm{diag}\, S = I$, it has the risk of gaussian noise of variance $\nu / (1 - \nu)$. Without noise it is PCA.

Only an amortized guide sees rows, and so only it can see corrupted ones; the others are refused.

What goes wrong:

*Too little noise* lets the identity back in where $K \ge D$: what is missing in a row then stays missing. Here the code
is as wide as the row, and a quarter of the cells of each wine are blanked before it is given back.

*A shift of the encoder*. It is trained on corrupted rows and used on clean ones, whose scale is smaller under gaussian
noise and larger under masking: clean rows come back too long.

```python
wine = ez.load_data("wine-standardised").x
blanked = torch.rand(wine.shape, generator=torch.Generator().manual_seed(0)) < 0.25
options = {"guide": "amortized-delta", "likelihood": "normal", "latent_dim": 13}
options |= {"decoder": "linear", "encoder": "linear", "steps": 500, "seed": 0}
error, length = {}, {}
for level in (0, 0.25, 0.75):
    options |= {"corruption": "masking", "corruption_level": level}
    coder = ez.fit("denoising-autoencoder", wine, **options, progress=False)
    repaired = coder.reconstruct(wine.masked_fill(blanked, 0))
    error[level] = (repaired - wine)[blanked].square().mean()
    length[level] = coder.reconstruct().square().mean()
    print(f"ν = {level}: squared error of blanked cells {error[level]:.2f},")
    print(f"    mean square of clean rows given back {length[level]:.2f}, their own 1")
assert error[0] > 1.2 * error[0.25] and length[0.75] > 1.3
```

*Too much noise* leaves the decoder the mean of all rows that one corrupted row may have come from, and reconstructions
blur; under `prior = normal` the denoising criterion then pays for a posterior that is wide enough for all of them.

```python
options |= {"corruption": "gaussian"}
square = {}
for level in (0.25, 4):
    options |= {"corruption_level": level, "progress": False}
    coder = ez.fit("denoising-autoencoder", wine, **options)
    square[level] = coder.reconstruct().square().mean()
    print(f"ν = {level}: mean square {square[level]:.2f} given back, of the rows 1")
assert square[4] < 0.3 * square[0.25]
```

*Noise that is not like the columns*. Masked cells say 0 or the mean, values that data have too, so that what is missing
cannot be told from what is there.

*Dead codes* and *holes* as under `autoencoder`.

References
----------
```bibtex
@inproceedings{vincent2008extracting,
  author = {Vincent, Pascal and Larochelle, Hugo and Bengio, Yoshua and Manzagol, Pierre-Antoine},
  title = {Extracting and Composing Robust Features with Denoising Autoencoders},
  booktitle = {International Conference on Machine Learning}, pages = {1096--1103}, year = {2008}
}
@article{vincent2010stacked,
  author = {Vincent, Pascal and Larochelle, Hugo and Lajoie, Isabelle and Bengio, Yoshua and Manzagol, Pierre-Antoine},
  title = {Stacked Denoising Autoencoders: Learning Useful Representations in a Deep Network with a Local Denoising
           Criterion},
  journal = {Journal of Machine Learning Research}, volume = {11}, pages = {3371--3408}, year = {2010}
}
@inproceedings{im2017denoising,
  author = {Im, Daniel Jiwoong and Ahn, Sungjin and Memisevic, Roland and Bengio, Yoshua},
  title = {Denoising Criterion for Variational Auto-Encoding Framework},
  booktitle = {AAAI Conference on Artificial Intelligence}, year = {2017}
}
@inproceedings{chen2012marginalized,
  author = {Chen, Minmin and Xu, Zhixiang and Weinberger, Kilian Q. and Sha, Fei},
  title = {Marginalized Denoising Autoencoders for Domain Adaptation},
  booktitle = {International Conference on Machine Learning}, year = {2012}
}
```
"""

from __future__ import annotations

from typing import Any, Literal

from pyro import distributions as dist
from torch import Tensor

from elbozoo.models.autoencoder import Autoencoder, AutoencoderOptions
from elbozoo.models.contract.corruption import Corruption, CorruptionOptions
from elbozoo.models.contract.options import Field


class DenoisingAutoencoderOptions(AutoencoderOptions, CorruptionOptions):
    """Options of :class:`DenoisingAutoencoder`."""

    prior: Literal["flat", "normal"] = Field(
        "flat", description="prior of the code: none, for a point as code, or standard normal, for a q with a density"
    )


class DenoisingAutoencoder(Autoencoder):
    """Denoising autoencoder: z flat or ~ N(0, I), x ~ the likelihood at decoder(z); its guide is trained on x̃.

    Attributes
    ----------
    decoder : nn.Sequential or nn.Linear
        W_1, b_1, W_2, b_2: the network z (..., K) to y (..., D); W and b where it is linear.
    likelihood : RowLikelihood
        p(x given y), with σ, m and s.
    corruption : Corruption
        The map x to x̃.
    """

    Options = DenoisingAutoencoderOptions
    options: DenoisingAutoencoderOptions

    def __init__(self, options: DenoisingAutoencoderOptions, columns: int) -> None:
        super().__init__(options, columns)
        self.corruption = Corruption(columns, options, is_binary=self.likelihood.is_binary)

    @classmethod
    def check_data(cls, x: Tensor, options: Any) -> None:
        """Refuse a probability above 1, and cells that are neither 0 nor 1 where the likelihood is Bernoulli."""
        Corruption.check(options)
        super().check_data(x, options)

    def initialize(self, x: Tensor, restart: int = 0) -> None:
        """Start with fresh random weights about the columns' means, and take the noise's units from the rows."""
        super().initialize(x, restart)
        self.corruption.initialize(x)

    def guide_refusal(self, family: str, source: str) -> str | None:
        """Refuse what does not see the rows, and under a flat prior what needs another one."""
        if source in ("free", "shared"):
            return (
                f"a {source} q sees no row, so that corrupting rows changes nothing; models without corruption suit it"
            )
        if source == "semi-amortized":
            return "its steps would follow the likelihood of the corrupted row, which the decoder is not to explain"
        return super().guide_refusal(family, source) if self.options.prior == "flat" else None

    def prior(self) -> dist.TorchDistribution:
        """p(z), event shape (K,): flat or standard normal."""
        return super().prior() if self.options.prior == "flat" else self._standard_normal()

    def corrupt(self, x: Tensor) -> Tensor:
        """Return x̃ of the rows ``x`` (..., D), drawn anew from the global random state."""
        corrupted: Tensor = self.corruption(x)
        return corrupted
