"""What every guide has: a name, whether its ELBO is a bound, and its options."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, Self

import torch
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import Distribution

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.isolation import private_parameters
from elbozoo.models.contract.options import Field, Options

DRAWS = 1000
INITIAL_SCALE = 0.1


class GuideOptions(Options):
    """Options that all guides share; a guide reads those that apply to it."""

    encoder: Literal["auto", "mlp", "linear", "conv"] = Field(
        "auto", description="encoder of an amortized guide; auto takes conv where rows have an image_shape, else mlp"
    )
    encoder_input: Literal["auto", "values", "log1p"] = Field(
        "auto", description="what an encoder sees of a value x: x itself or log(1 + x); auto takes what suits the model"
    )
    hidden: int = Field(64, ge=1, description="width of the encoder's hidden layers")
    layers: int = Field(1, ge=1, description="number of the encoder's hidden layers")
    channels: int = Field(16, ge=1, description="channels of the feature maps under encoder=conv")
    image_shape: str | None = Field(
        None, description="shape of a row that is an image, such as 8x8 or 3x32x32; none takes the model's, or a square"
    )
    rank: int | None = Field(None, ge=1, description="rank of a low-rank covariance; the root of the dimension if none")
    flow: Literal["auto", "affine-autoregressive", "spline-coupling"] = Field(
        "auto", description="flow of a local latent; auto takes the first, and splines for one dimension"
    )
    flow_layers: int = Field(2, ge=1, description="number of layers of the flow of a local latent")
    refinements: int = Field(5, ge=0, description="gradient steps of a semi-amortized guide from its encoder's q")
    refinement_rate: float = Field(
        0.5, gt=0, le=1, description="length at which those steps start, as a share of a natural gradient"
    )
    refinement_gradient: Literal["first-order", "full"] = Field(
        "first-order", description="whether the encoder's gradient looks past those steps or passes through them"
    )
    initial_scale: float | None = Field(
        None,
        gt=0,
        description="standard deviation at which normal families start; none takes 0.1, and for global latents "
        "the curvature at their mode where there is one",
    )

    def without_search(self) -> Self:
        """Return options with which a guide is made for its shape alone: its starting values do not matter.

        Returns
        -------
        GuideOptions
            A copy.
        """
        return self.model_copy(update={"initial_scale": self.scale})

    def suited_to(self, entry: Entry) -> Self:
        """Return options with what they leave to the model filled in: shapes of images, form and input of encoders.

        Parameters
        ----------
        entry : Entry
            The model.

        Returns
        -------
        GuideOptions
            A copy, in which ``encoder`` and ``encoder_input`` are no longer ``auto``.
        """
        shape = self.image_shape or (entry.image_shape and str(entry.image_shape))
        encoder = ("conv" if shape else "mlp") if self.encoder == "auto" else self.encoder
        seen = entry.encoder_input if self.encoder_input == "auto" else self.encoder_input
        return self.model_copy(update={"image_shape": shape, "encoder": encoder, "encoder_input": seen})

    @property
    def scale(self) -> float:
        """Standard deviation at which normal families start where nothing better is known."""
        return self.initial_scale or INITIAL_SCALE


class Guide(PyroModule):
    """Base of all guides: called as ``guide(batch)``, it samples every latent site of its model.

    Parameters
    ----------
    name : str
        Canonical name, such as ``"amortized-diagonal-normal"``.
    family : str
        Family of the distribution, or ``"posterior"`` for the exact one.
    source : str
        Where its parameters come from: shared, free, amortized, semi-amortized, exact, or global.
    is_discrete : bool
        Whether every latent takes finitely many values, so that expectations under q are sums.
    has_discrete : bool
        Whether some latent does, so that an enumerated objective sums over it.
    summed_out : collection of str
        Finite local sites of the model that the guide leaves to be summed out of it.
    """

    def __init__(
        self,
        name: str,
        family: str,
        source: str,
        *,
        is_discrete: bool = False,
        has_discrete: bool = False,
        summed_out: Collection[str] = (),
    ) -> None:
        with private_parameters():
            super().__init__()
        self.is_discrete = is_discrete
        self.has_discrete = is_discrete or has_discrete
        self.summed_out = tuple(summed_out)
        self.name = name
        self.family = family
        self.source = source

    @property
    def is_bound(self) -> bool:
        """Whether E_q[log p(x, z) - log q(z)] bounds the evidence: false for point masses on a continuous latent."""
        return self.family != "delta"

    @property
    def is_local(self) -> bool:
        """Whether the guide gives one q per datum."""
        return self.source != "global"

    @property
    def has_rows(self) -> bool:
        """Whether q says something about each row."""
        return self.is_local

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sample the latent sites of a batch.

        Parameters
        ----------
        batch : Batch
            Rows with their positions in the data set.

        Returns
        -------
        dict of Tensor
            A draw of each site, by its name.
        """
        raise NotImplementedError

    def distributions(self, batch: Batch) -> dict[str, Distribution]:
        """Return q of each latent site for the rows of a batch.

        Parameters
        ----------
        batch : Batch
            Rows with their positions in the data set.

        Returns
        -------
        dict of Distribution
            By site: batch shape (B,) for local latents, () for global ones.
        """
        raise NotImplementedError(f"{self.name} gives draws but no distribution object")

    def means(self, batch: Batch) -> Tensor:
        """Mean of q of each row, (B, K), or probabilities where the latent is discrete; sites side by side.

        Where the mean has no formula it is that of 1000 draws.

        Parameters
        ----------
        batch : Batch
            Rows with their positions in the data set.

        Returns
        -------
        Tensor (B, K)
            In the units of the latents.
        """
        means = [mean_of(q) for q in self.distributions(batch).values()]
        return torch.cat([mean.reshape(len(mean), -1) for mean in means], -1)

    def finalize(self, batch: Batch) -> None:
        """Do what is left to do once the optimiser has finished, such as a Laplace approximation.

        Parameters
        ----------
        batch : Batch
            Rows with their positions in the data set.
        """

    def prepare_to_load(self, batch: Batch) -> None:
        """Take the form that :meth:`finalize` leaves, with parameters that are yet to be loaded.

        Parameters
        ----------
        batch : Batch
            Rows with their positions in the data set.
        """


def mean_of(q: Distribution) -> Tensor:
    """Mean of q, its probabilities if it is finite, or the mean of 1000 draws where there is no formula."""
    probabilities = getattr(q, "probs", None)
    if isinstance(probabilities, Tensor):
        return probabilities
    try:
        return q.mean
    except NotImplementedError:
        return q.sample((DRAWS,)).mean(0)
