"""The best member of a guide's family for each group of rows, at fixed θ, where the posterior is normal.

The families are products of a q for what a group shares and one for each of its rows, and the nearest of those to a
normal posterior is known: its means, and of its precision the blocks on the diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elbozoo.guides.base import Guide, GuideOptions
from elbozoo.guides.families import DiagonalNormal
from elbozoo.guides.grouped import GroupGuide, ProductOfNormals
from elbozoo.inference.best_member import BestMember
from elbozoo.models.contract.entry import HasPosterior
from elbozoo.models.contract.groups import GROUP_SITE, ROW_SITE, GroupEntry
from elbozoo.models.contract.isolation import isolated


def best_group_member(entry: GroupEntry, guide: Guide, x: Tensor, options: GuideOptions) -> BestMember | None:
    """Return the free guide of ``guide``'s family with the largest ELBO for the groups ``x`` (S, T, 1 + D).

    For a product of the rows' normals that family is the independent normals: any of them is the product of some.
    Returns None where the posterior is not known.
    """
    if not isinstance(entry, HasPosterior):
        return None
    family = DiagonalNormal.name if isinstance(guide, ProductOfNormals) else guide.family
    with isolated(0):
        best = GroupGuide(f"free-{family}", family, "free", entry.latent_sites(x), x, options)
    with torch.no_grad():
        nearest = entry.nearest_product(x)
        for member, source, site in ((best.of_group, best.groups, GROUP_SITE), (best.of_row, best.rows, ROW_SITE)):
            closest = member.closest(nearest[site])
            assert closest is not None
            source.values.copy_(closest)
    return BestMember(best, True, "closed form")
