"""The best flow for each datum, at fixed θ: it marks the approximation gap of the family ``flow``.

The family is that of one set of networks for all data, with mean, scale and context of each datum free. No closed form
and no natural gradient finds its best member, so Adam searches: each step takes fresh noise, the same for all data,
so that the networks have no fixed points to bend the flow about; draws set apart judge each block of steps, and the
best of all is kept. The search begins at the better of two members: the guide's own q, and the best diagonal normal,
which is a flow that bends nothing. So what it ends with is not worse than either on those draws, and, as a local
maximum of a stochastic search, bounds the best member from below.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from elbozoo.guides.base import GuideOptions
from elbozoo.guides.bound import Parameters, noise_dim, row_elbo, whitened_noise
from elbozoo.guides.families import Flow
from elbozoo.guides.local import LocalGuide
from elbozoo.inference.best_member import BestMember, best_member
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry
from elbozoo.models.contract.isolation import isolated

DRAWS, MANY_ROWS, DRAWS_OF_MANY = 32, 1000, 16
JUDGING_DRAWS = 128
OF_DATUM, OF_NETWORK = 0.02, 0.007  # step sizes of Adam
BLOCK, BLOCKS = 40, 50
GAIN, PATIENCE, SHRINK = 1e-4, 3, 0.3  # nats per datum in a block below which it is a standstill
CHUNK_ELEMENTS = 2**20


def best_flow(entry: Entry, guide: LocalGuide, x: Tensor, options: GuideOptions) -> BestMember:
    """Return the free flow with the largest ELBO for the rows ``x`` (N, D) that a search from ``guide`` finds.

    ``converged`` says whether three standstills came, each followed by smaller steps, before 2000 steps were over.
    """
    batch = Batch.full(x)
    with isolated(0), torch.enable_grad():
        search = _Search(entry, _own(guide, batch, options), batch)
        plain = _plain(entry, guide, x, options)
        if plain is not None:
            judged = _Search(entry, plain, batch)
            search = judged if judged.value > search.value else search
        converged = search.run()
    return BestMember(search.guide, converged, "Adam")


def _free(guide: LocalGuide, x: Tensor, options: GuideOptions) -> LocalGuide:
    sites = [family.site for family in guide.families.values()]
    return LocalGuide("free-flow", "flow", "free", sites, x, options)


def _own(guide: LocalGuide, batch: Batch, options: GuideOptions) -> LocalGuide:
    """Return the free guide with the q of ``guide``."""
    free = _free(guide, batch.x, options)
    free.networks.load_state_dict(guide.networks.state_dict())
    _set(free, guide.parameters_of(batch))
    return free


def _plain(entry: Entry, guide: LocalGuide, x: Tensor, options: GuideOptions) -> LocalGuide | None:
    """Return the free guide whose q are the best diagonal normals, where those can be found."""
    best = best_member(entry, "diagonal-normal", x, options)
    if best is None:
        return None
    assert isinstance(best.guide, LocalGuide)
    free = _free(guide, x, options)
    found = best.guide.parameters_of(Batch.full(x))
    for site, family in free.families.items():
        if isinstance(family, Flow):
            found[site] = family.from_diagonal(found[site])
    _set(free, found)
    return free


def _set(guide: LocalGuide, parameters: Parameters) -> None:
    with torch.no_grad():
        for site, values in parameters.items():
            guide.sources[site].values.copy_(values)  # type: ignore[operator]


class _Search:
    def __init__(self, entry: Entry, guide: LocalGuide, batch: Batch) -> None:
        self.entry, self.guide, self.batch = entry, guide, batch
        self.dim = noise_dim(guide.families)
        self.judging = self._noise(JUDGING_DRAWS, seed=0)
        self.value = self._judge()

    def run(self) -> bool:
        """Ascend to a standstill, leave the guide at the best state met, and say whether it stands still."""
        optimizer = torch.optim.Adam(
            [
                {"params": self.guide.sources.parameters(), "lr": OF_DATUM},
                {"params": self.guide.networks.parameters(), "lr": OF_NETWORK},
            ]
        )
        draws = DRAWS_OF_MANY if len(self.batch.x) > MANY_ROWS else DRAWS
        best, standstills = self._state(), 0
        for block in range(BLOCKS):
            for step in range(BLOCK):
                optimizer.zero_grad()
                self._descend(self._noise(draws, seed=1 + block * BLOCK + step))
                optimizer.step()
            gain = self._judge() - self.value
            if gain > 0:
                best, self.value = self._state(), self.value + gain
            if not gain > GAIN * len(self.batch.x):
                standstills += 1
                for group in optimizer.param_groups:
                    group["lr"] *= SHRINK
            if standstills == PATIENCE:
                break
        self.guide.load_state_dict(best)
        return standstills == PATIENCE

    def _noise(self, draws: int, seed: int) -> Tensor:
        return whitened_noise(draws, self.dim, seed=seed, like=self.batch.x)

    def _state(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.guide.state_dict().items()}

    def _judge(self) -> float:
        with torch.no_grad():
            total = math.fsum(float(self._elbo(part, self.judging)) for part in self._parts(JUDGING_DRAWS))
        return total if math.isfinite(total) else -math.inf

    def _descend(self, noise: Tensor) -> None:
        # The model stays where it is, so that gradients in its parameters would be of no use.
        mine = list(self.guide.parameters())
        for part in self._parts(len(noise)):
            (-self._elbo(part, noise)).backward(inputs=mine)

    def _elbo(self, part: Batch, noise: Tensor) -> Tensor:
        """Total ELBO of the rows of ``part``, nats."""
        return row_elbo(self.entry, self.guide.families, part, self.guide.parameters_of(part), noise).sum()

    def _parts(self, draws: int) -> list[Batch]:
        rows = max(1, CHUNK_ELEMENTS // (draws * self.entry.elements(self.batch.x)))
        return [self.batch.rows(i, i + rows) for i in range(0, len(self.batch.x), rows)]
