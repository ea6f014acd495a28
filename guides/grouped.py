"""Guides of groups of rows: a q for what the rows of a group share, and one for each row; padding is masked out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import Distribution, constraints

from elbozoo.guides.base import Guide, GuideOptions, mean_of
from elbozoo.guides.families import FAMILIES, DiagonalNormal
from elbozoo.guides.sources import Amortized, Free
from elbozoo.guides.whole import WholeGuide
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.groups import GROUP_SITE, ROW_SITE, GroupEntry
from elbozoo.models.contract.sequences import observations, steps_mask
from elbozoo.models.contract.sites import DATA_PLATE, LatentSite


class OfMembers(Guide):
    """Base of guides that give a q to each group and one to each of its rows, independent of each other."""

    def members(self, batch: Batch) -> dict[str, Distribution]:
        """q of each group, batch shape (B,), and of each row, (B, T), those at padding without a meaning."""
        raise NotImplementedError(f"{type(self).__name__} gives no q to members; define members(batch)")

    def distributions(self, batch: Batch) -> dict[str, Distribution]:
        """q of each site: batch shape (B,); padded rows count for nothing."""
        return masked(self.members(batch), batch)

    def means(self, batch: Batch) -> Tensor:
        """Mean of q of its group, then of its own, for each row: (B, T, Ku + Kv)."""
        return by_member(self.members(batch))


class GroupGuide(OfMembers):
    """q of each group: a member of one family for the group and one for each of its rows, with parameters of their own.

    Mean-field variational inference on groups: all are independent of one another.

    Parameters
    ----------
    name, family, source : str
        See :class:`Guide`; the source is ``free``.
    sites : sequence of LatentSite
        The two latent sites of the model, of the group (Ku,) and of its rows (T, Kv).
    x : Tensor (S, T, 1 + D)
        The groups.
    options : GuideOptions
        Options.
    """

    def __init__(
        self, name: str, family: str, source: str, sites: Sequence[LatentSite], x: Tensor, options: GuideOptions
    ) -> None:
        super().__init__(name, family, source)
        self.of_group = FAMILIES[family](site_called(sites, GROUP_SITE), options)
        self.of_row = FAMILIES[family](row_site(sites), options)
        self.groups = Free(self.of_group.initial().to(x.dtype), x[:, 0], options)
        self.rows = Free(self.of_row.initial().to(x.dtype), x, options)

    def members(self, batch: Batch) -> dict[str, Distribution]:
        """q of each group, batch shape (B,), and of each row, (B, T), those at padding without a meaning."""
        if batch.total != len(self.groups.values):
            raise InvalidInput(
                f"found {batch.total} groups, expected the {len(self.groups.values)} groups of the fit: a free guide "
                "has one q for each of those and none for others; use the guide product-of-normals for new data"
            )
        return {
            GROUP_SITE: self.of_group.distribution(self.groups(batch)),
            ROW_SITE: self.of_row.distribution(self.rows(batch)),
        }

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sample both sites inside the data plate."""
        with pyro.plate(DATA_PLATE, batch.total, subsample=batch.index):
            return {name: pyro.sample(name, q) for name, q in self.distributions(batch).items()}


class ProductOfNormals(OfMembers, WholeGuide):
    """q(u given all rows of a group) as a product of normals, one read off each row, and q(v_n given x_n) beside it.

    One encoder gives each row four things: mean and scale of a normal over u, and of one over v. The precisions of the
    normals over u add up, and their means are averaged with the precisions as weights (Bouchacourt et al. 2018,
    section 3): rows that say more about the group count for more, and the order of rows means nothing. As there, the
    prior is no factor of the product, and q(v_n) does not depend on u; where the posterior ties the two together this
    q has an approximation gap, whatever the encoder.
    """

    NAME: ClassVar[str] = "product-of-normals"
    prior_precision: ClassVar[float] = 0.0

    def __init__(self, entry: Entry, sites: Sequence[LatentSite], x: Tensor, options: GuideOptions) -> None:
        super().__init__(entry, sites, x, options)
        self.of_group = DiagonalNormal(site_called(sites, GROUP_SITE), options)
        self.of_row = DiagonalNormal(row_site(sites), options)
        start = torch.cat([self.of_group.initial(), self.of_row.initial()]).to(x.dtype)
        self.encoder = Amortized(start, observations(x)[steps_mask(x)], options)

    @staticmethod
    def refusal(entry: Entry, sites: Sequence[LatentSite]) -> str | None:
        """Say why this guide cannot serve ``entry``, or return None."""
        return None if isinstance(entry, GroupEntry) else "a datum is no group of rows, whose normals it would multiply"

    def members(self, batch: Batch) -> dict[str, Distribution]:
        """q of each group, batch shape (B,), and of each row, (B, T), those at padding without a meaning."""
        parameters = self.encoder(Batch(observations(batch.x), batch.index, batch.total))
        of_group, of_row = parameters.split([self.of_group.size, self.of_row.size], -1)
        return {
            GROUP_SITE: product_of_normals(
                self.of_group.distribution(of_group), steps_mask(batch.x), self.prior_precision
            ),
            ROW_SITE: self.of_row.distribution(of_row),
        }

    def conditionals(self, batch: Batch) -> Mapping[str, Distribution]:
        """q of each site: batch shape (B,); the second does not look at the first."""
        return self.distributions(batch)


class ProductOfNormalsAndPrior(ProductOfNormals):
    """The same product with the prior as one more factor, as p(u given the rows) ∝ p(u) Π p(x_n given u) has it.

    Without it the precision of a group of n rows is n times that of one; the posterior's is that of the prior and n
    times what a row tells. One encoder can be right for groups of all sizes only with the prior.
    """

    NAME: ClassVar[str] = "product-of-normals-and-prior"
    prior_precision: ClassVar[float] = 1.0


def product_of_normals(q: Distribution, counts: Tensor, prior_precision: float = 0.0) -> dist.TorchDistribution:
    """Normal whose density is proportional to the product of those of ``q`` (..., T) that ``counts`` (..., T) keeps.

    Of independent normals with means m_n and variances s_n²: precision Σ 1 / s_n², and as mean the average of the m_n
    with the precisions as weights. A normal about zero of ``prior_precision`` is one more factor.
    """
    precision = counts[..., None] / q.variance
    total = precision.sum(-2) + prior_precision
    product: dist.TorchDistribution = dist.Normal((precision * q.mean).sum(-2) / total, total.rsqrt()).to_event(1)
    return product


def masked(members: Mapping[str, Distribution], batch: Batch) -> dict[str, Distribution]:
    """Return ``members`` with those of a group's rows as one distribution, in which padded rows count for nothing."""
    rows: dist.TorchDistribution = members[ROW_SITE]
    return {**members, ROW_SITE: rows.mask(steps_mask(batch.x)).to_event(1)}


def by_member(members: Mapping[str, Distribution]) -> Tensor:
    """Means of the group, then of the row, for each row: (B, T, Ku + Kv)."""
    group, rows = mean_of(members[GROUP_SITE]), mean_of(members[ROW_SITE])
    return torch.cat([group[:, None].expand(-1, rows.shape[1], -1), rows], -1)


def site_called(sites: Sequence[LatentSite], name: str) -> LatentSite:
    """Return the site of that name."""
    return next(site for site in sites if site.name == name)


def row_site(sites: Sequence[LatentSite]) -> LatentSite:
    """Return the site (Kv,) of a single row."""
    whole = site_called(sites, ROW_SITE)
    support = constraints.independent(constraints.real, 1)
    return LatentSite(whole.name, whole.event_shape[1:], support, whole.is_local, whole.cardinality)
