"""Inference of a class and of what the class leaves open: a classifier, and an encoder that is told the class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import Distribution

from elbozoo.guides.base import GuideOptions, mean_of
from elbozoo.guides.families import Categorical, DiagonalNormal
from elbozoo.guides.sources import Amortized, encoder
from elbozoo.guides.whole import WholeGuide
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.classes import unit_vectors
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.joint import Conditional, Values
from elbozoo.models.contract.sites import LatentSite


@runtime_checkable
class PartlyLabelled(Protocol):
    """A program with a class that is known for some rows.

    Attributes
    ----------
    class_logits : Tensor (C,)
        Log prior probabilities of the classes, up to a constant.
    """

    class_logits: Tensor

    def codes(self, x: Tensor) -> Tensor:
        """Return the label of each row, (N,) of int64, -1 where it has none."""
        ...

    def features(self, x: Tensor) -> Tensor:
        """Return what a row shows beside its label, (N, D)."""
        ...


class LabelThenLatentGuide(WholeGuide):
    """q(y given x) q(z given x, y): a classifier, then an encoder that is told the class (Kingma et al. 2014, eq. 4).

    Where the label is known it is the class. What the program draws in such a row and leaves aside has its prior as q,
    so that the row pays nothing for it.
    """

    NAME = "label-then-latent"

    def __init__(self, entry: Entry, sites: Sequence[LatentSite], x: Tensor, options: GuideOptions) -> None:
        super().__init__(entry, sites, x, options)
        assert isinstance(entry, PartlyLabelled)
        # In a tuple, so that the model's parameters are not registered a second time as the guide's.
        self._entry: tuple[PartlyLabelled] = (entry,)
        self.label, self.latent = Categorical(sites[0], options), DiagonalNormal(sites[1], options)
        features = entry.features(x)
        # It standardises the columns for the encoder as well.
        self.classifier = Amortized(self.label.initial().to(x.dtype), features, options)
        inputs, start = features.shape[1] + self.label.size, self.latent.initial().to(x.dtype)
        self.encoder = encoder(inputs, start, options)

    @staticmethod
    def refusal(entry: Entry, sites: Sequence[LatentSite]) -> str | None:
        """Say why this guide cannot serve ``entry`` with the latent ``sites``, or return None."""
        if not isinstance(entry, PartlyLabelled):
            return "it has no class that is known for some rows"
        if len(sites) != 2 or not sites[0].is_enumerable or not sites[1].is_real or not all(s.is_local for s in sites):
            return "its latents are not a class and then a real vector of each row"
        return None

    def class_log_probabilities(self, batch: Batch) -> Tensor:
        """Log q(y given x) of each row by the classifier, whatever its label: (B, C), nats."""
        features = self._entry[0].features(batch.x)
        logits: Tensor = self.classifier(batch._replace(x=features))
        return logits.log_softmax(-1)

    def classify(self, x: Tensor) -> Tensor:
        """Return q(y given x) of the rows ``x`` (N, columns), whose labels are not looked at: (N, C)."""
        with torch.no_grad():
            return self.class_log_probabilities(Batch.full(x)).exp()

    def log_probability_of_labels(self, batch: Batch) -> Tensor:
        """Log q(y given x) of the label of each row, (B,), nats; zero where it has none."""
        labels = self._entry[0].codes(batch.x)
        chosen = self.class_log_probabilities(batch).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
        return torch.where(labels >= 0, chosen, torch.zeros_like(chosen))

    def conditionals(self, batch: Batch) -> Mapping[str, Conditional]:
        """q of the class left aside or not known, batch shape (B,), and the function that gives q of the latent."""
        entry = self._entry[0]
        is_known = entry.codes(batch.x) >= 0
        # The prior is at its optimum here for any π, so that a gradient through it would be noise.
        prior = entry.class_logits.detach().log_softmax(-1)
        logits = torch.where(is_known[:, None], prior, self.class_log_probabilities(batch))
        return {self.label.site.name: dist.Categorical(logits=logits), self.latent.site.name: self._given(batch)}

    def means(self, batch: Batch) -> Tensor:
        """Probabilities of the classes, one and zeros where the label is known, then the mean of z: (B, C + K)."""
        probabilities = self.class_log_probabilities(batch).exp()
        labels = self._entry[0].codes(batch.x)
        known = unit_vectors(labels, self.label.size, probabilities.dtype)
        probabilities = torch.where((labels >= 0)[:, None], known, probabilities)
        values = torch.arange(self.label.size, device=batch.x.device)[:, None].expand(-1, len(batch.x))
        of_class = mean_of(self._given(batch)({self.label.site.name: values}))
        mean = torch.einsum("nc,cnk->nk", probabilities, of_class.reshape(*values.shape, -1))
        return torch.cat([probabilities, mean], -1)

    def _given(self, batch: Batch) -> Callable[[Values], Distribution]:
        entry, source = self._entry[0], self.classifier
        labels = entry.codes(batch.x)
        features = source.standardised(entry.features(batch.x))

        def given(values: Values) -> Distribution:
            drawn = values[self.label.site.name].long()
            y = torch.where(labels >= 0, labels, drawn)
            told = torch.cat([features.expand(*y.shape, -1), unit_vectors(y, self.label.size, features.dtype)], -1)
            return self.latent.distribution(self.encoder(told))

        return given
