r"""β-VAE: a variational autoencoder whose code is paid for β times.

The program is that of `vae`, word for word: a normal latent and a neural decoder, with the same evidence. What differs
is what a fit maximises. In place of the ELBO it is

$$
\mathcal L_\beta = -D - \beta R, \qquad
D = -\mathrm E_q \log p(x \mid z), \quad R = \mathrm{KL}\bigl(q(z \mid x)\,\|\,p(z)\bigr), \qquad
\mathrm{ELBO} = -D - R,
$$

distortion and rate. Above $\beta = 1$ each nat of the code must save more than β nats of distortion, so that the code
keeps what helps most, and the hope is that each dimension then holds one factor of the data (Higgins et al. 2017).
Below it the code is cheap and reconstructions are sharp. Between the two lies a curve of rates and
distortions, of which `elbozoo.rate_distortion` draws one point for each β (Alemi et al. 2018).

What is optimised without an ELBO is still known exactly. At a given decoder the best q for $\mathcal L_\beta$ is not
the posterior but a tempered one, and the best value a power mean of the likelihood over the prior,

$$
q_\beta(z \mid x) \propto p(z)\, p(x \mid z)^{1/\beta}, \qquad
\max_q \mathcal L_\beta = \beta \log \int p(z)\, p(x \mid z)^{1/\beta}\, dz,
$$

which falls as β grows and is $\log p(x)$ at β = 1. So for $\beta \ge 1$ the objective is a lower bound of the ELBO,
since $\mathcal L_\beta = \mathrm{ELBO} - (\beta - 1) R$, and of $\log p(x)$. For $\beta < 1$ it bounds nothing: its
best value lies above $\log p(x)$. That is why the objective and the ELBO are two columns: the ELBO is always taken at
β = 1, is a bound whatever β was, and is what the ledger's gaps are measured from. Because q is tempered, a gap
remains even where the family holds the posterior.

The default is $\beta = 4$, `kl_weight`. It may rise to that along a schedule, once (`kl_schedule = annealed`) or in
`cyclical` turns, so that the decoder learns to read the code before the code is taxed; or each dimension may have
`free_bits` of rate untaxed. Another `objective`, such as `elbo`, takes the place of all this. Monte Carlo EM needs no q
to learn and so knows no β, and the steps of a `semi-amortized` q climb the ELBO itself.

What goes wrong:

*Collapse by decree*. Where β is so large that no dimension saves its price, the decoder ignores the code; the number of
active units says so.

*Another model*. The decoder is fitted under a q that is not its posterior, so that the best model for β is not the one
with the largest log p(x); far from β = 1 the learning gap shows it. Both on the same wines:

```python
options = {"guide": "amortized", "likelihood": "normal", "steps": 400, "seed": 0}
active, nats = {}, {}
for weight in (1, 4, 40):
    options["kl_weight"] = weight
    vae = ez.fit("beta-vae", "wine-standardised", **options, progress=False)
    parts = vae.anatomy()
    active[weight], nats[weight] = parts.active_units, vae.log_evidence().value
    print(f"β = {weight}: {active[weight]} active units,", end=" ")
    print(f"rate {parts.rate.mean:.2f} nats per row,", end=" ")
    print(f"log p(x) {nats[weight]:.0f} nats, total")
assert active[1] == 2 and active[40] == 0
assert nats[1] - nats[4] > 100 and nats[4] - nats[40] > 50
```

*Disentanglement by luck*. A rotation of the latent space that the decoder undoes changes neither the prior nor log
p(x), so that which axes are found is decided by the diagonal q, the seed and the data (Locatello et al. 2019). Measure
it against known factors, as `fit.disentanglement` does on `sprites`, and from several seeds: a dear code may also score
higher than a cheap one because there is less of it to mix.

References
----------
```bibtex
@inproceedings{higgins2017beta,
  author = {Higgins, Irina and Matthey, Loic and Pal, Arka and Burgess, Christopher and Glorot, Xavier and
            Botvinick, Matthew and Mohamed, Shakir and Lerchner, Alexander},
  title = {$\beta$-{VAE}: Learning Basic Visual Concepts with a Constrained Variational Framework},
  booktitle = {International Conference on Learning Representations}, year = {2017}
}
@inproceedings{alemi2018fixing,
  author = {Alemi, Alexander A. and Poole, Ben and Fischer, Ian and Dillon, Joshua V. and Saurous, Rif A. and
            Murphy, Kevin}, title = {Fixing a Broken {ELBO}},
  booktitle = {International Conference on Machine Learning}, pages = {159--168}, year = {2018}
}
@inproceedings{locatello2019challenging,
  author = {Locatello, Francesco and Bauer, Stefan and Lucic, Mario and R{\"a}tsch, Gunnar and Gelly, Sylvain and
            Sch{\"o}lkopf, Bernhard and Bachem, Olivier},
  title = {Challenging Common Assumptions in the Unsupervised Learning of Disentangled Representations},
  booktitle = {International Conference on Machine Learning}, pages = {4114--4124}, year = {2019}
}
```
"""

from __future__ import annotations

from typing import Any, ClassVar

from elbozoo.models.vae import VAE


class BetaVAE(VAE):
    """β-VAE: the program of a VAE, fitted by -distortion - β rate with β = 4 unless ``kl_weight`` says otherwise."""

    method_options: ClassVar[dict[str, Any]] = {"objective": "beta", "kl_weight": 4.0}
