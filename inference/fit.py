"""A fit: θ, q, how they were found, and what they say about data."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass, field, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import arviz
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent

from elbozoo.guides.base import Guide, GuideOptions
from elbozoo.inference.anatomy import Anatomy, anatomy
from elbozoo.inference.corruption import DenoisingELBO, denoising_elbo
from elbozoo.inference.disentanglement import Disentanglement, disentanglement
from elbozoo.inference.estimators import EvidenceEstimate, Latents, estimate_log_evidence
from elbozoo.inference.evidence import PARTICLES, Evidence, evidence_or_estimate
from elbozoo.inference.evidence import log_evidence as known_evidence
from elbozoo.inference.heldout import ALONE, Companions, check_new_rows, heldout_figures
from elbozoo.inference.inferencedata import inference_data
from elbozoo.inference.ledger import Ledger, compute_ledger, elbo_of
from elbozoo.inference.rows import Rows
from elbozoo.inference.steps import unique_parameters
from elbozoo.inference.storage import read_fit, save_fit
from elbozoo.inference.streamed import streamed_evidence, streamed_ledger
from elbozoo.inference.weights import importance_weights
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry, HasClosedForm, HasOracle
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.labels import codes_among
from elbozoo.models.contract.sequences import StackedEntry, by_row
from elbozoo.models.contract.sites import OBSERVED_SITE, LatentSite

EVALUATION_STREAM = 7_919  # keeps the draws of an evaluation apart from those of the fit with the same seed


def provenance() -> dict[str, str]:
    """Return versions of the libraries, the platform and the number of threads.

    Returns
    -------
    dict of str
        By name of the library, and ``python``, ``platform``, ``threads``.
    """
    packages = ("elbozoo", "torch", "pyro-ppl", "numpy", "scipy", "scikit-learn", "arviz")
    versions = {name: _version(name) for name in packages}
    return {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True)
class Fit:
    """The result of fitting one model by one method; owns its model and its guide, in float64.

    Attributes
    ----------
    model : str
        Name of the entry.
    method : str
        ``em``, ``closed-form``, ``cavi``, ``nuts`` or the name of a guide.
    seed : int
        Seed of everything random in the fit.
    entry : Entry
        The program with its fitted θ.
    guide : Guide
        The fitted q(z given x).
    objective : str
        What was optimised.
    trajectory : DataFrame
        Columns step, seconds (of that step), objective, elbo, log_evidence; nats, totals over the rows.
    seconds : float
        Wall-clock time of the fit, without its evaluation.
    converged : bool
        Whether the convergence test was met.
    interrupted : bool
        Whether the user stopped the fit; it then holds what was reached.
    options : dict
        Options that were given, by name.
    guide_options : GuideOptions
        Options of the guide.
    shape : tuple of int
        Shape of the data of the fit, arranged; of the sample that starts were taken from where they are not in memory.
    notes : list of str
        What a reader of the figures should know, such as collapsed components.
    provenance : dict
        Versions of the libraries, platform and threads.
    x : Tensor or None
        The data of the fit, arranged, float64; None after :meth:`load` and where they are not in memory.
    rows : Rows or None
        The data of the fit where they are not in memory.
    validation : DataFrame or None
        The curve of the validation rows, where one was asked for: step, objective, elbo; nats per datum.
    companions : Companions
        Data beside those of the fit, such as test rows; none after :meth:`load`.
    """

    model: str
    method: str
    seed: int
    entry: Entry
    guide: Guide
    objective: str
    trajectory: pd.DataFrame
    seconds: float
    converged: bool
    interrupted: bool
    options: dict[str, Any]
    guide_options: GuideOptions
    shape: tuple[int, ...]
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=provenance)
    x: Tensor | None = None
    rows: Rows | None = None
    validation: pd.DataFrame | None = None
    companions: Companions = ALONE

    @property
    def parameters(self) -> int:
        """Number of parameters that were fitted: those of the model and of the guide."""
        return sum(p.numel() for p in unique_parameters(self.entry, self.guide))

    def elbo(self, x: Any = None) -> float:
        """Evaluate the ELBO, always at β = 1: in closed form where q has one, else from fresh draws.

        Parameters
        ----------
        x : array-like (N, D), optional
            Rows to look at; by default those of the fit.

        Returns
        -------
        float
            Nats, total over the rows; NaN for a q without a density, which bounds nothing.

        Raises
        ------
        InvalidInput
            For rows that do not go with the model, or without any where the fit carries none.

        Examples
        --------
        The posterior of PPCA is known, and with it as q the bound touches the evidence:

        >>> import elbozoo as ez
        >>> fit = ez.fit("ppca", "iris", method="closed-form", latent_dim=2)
        >>> round(fit.elbo(), 2), round(fit.log_evidence().value, 2)
        (-404.96, -404.96)
        """
        if self._streamed(x) is not None:
            return self.full_ledger().elbo
        rows = self._rows(x)
        if not self.guide.is_bound:
            return math.nan
        return elbo_of(self.entry, self.guide, rows, self._weights(rows))[0]

    def denoising_elbo(self, x: Any = None, *, seed: int | None = None) -> DenoisingELBO:
        """Evaluate the ELBO of the denoising criterion, in which q is given corrupted rows.

        Parameters
        ----------
        x : array-like (N, D), optional
            Rows to look at; by default those of the fit.
        seed : int, optional
            Seed of corruptions and draws; that of the fit by default.

        Returns
        -------
        DenoisingELBO
            Total in nats, with its standard error; NaN for a model whose guide is trained on rows as they are, and for
            a q without a density.

        Raises
        ------
        InvalidInput
            For rows that do not go with the model, or without any where the fit carries none.
        """
        return denoising_elbo(self.entry, self.guide, self._rows(x), self._stream if seed is None else seed)

    def log_evidence(
        self, x: Any = None, *, estimator: str | None = None, latents: Latents | None = None, **options: Any
    ) -> Evidence | EvidenceEstimate | None:
        """Return log p(x) of the rows ``x`` (N, D), or of the data of the fit, with its error and its kind.

        None where there is no oracle, no quadrature and no q with a density to draw from.

        Parameters
        ----------
        x : array-like (N, D), optional
            Other data than those of the fit.
        estimator : str, optional
            ``prior``, ``importance``, ``iwae``, ``annealed``, ``bidirectional`` or ``quadrature``, instead of the best
            that the model has; see :func:`~elbozoo.inference.estimators.estimate_log_evidence`.
        latents : Tensor or dict of Tensor, optional
            The latents that the rows were simulated from, which ``bidirectional`` needs.
        **options
            Options of the estimator, such as ``draws=`` or ``temperatures=``.

        Returns
        -------
        Evidence, EvidenceEstimate or None
            Total in nats, per datum where it belongs to one, its error and its kind: ``exact``, ``quadrature`` or
            ``estimate``.
            An EvidenceEstimate where ``estimator`` is given.

        Raises
        ------
        InvalidInput
            For rows that do not go with the model, or without any where the fit carries none.

        Examples
        --------
        >>> import elbozoo as ez
        >>> fit = ez.fit("ppca", "iris", method="closed-form", latent_dim=2)
        >>> evidence = fit.log_evidence()
        >>> evidence.kind, len(evidence.per_datum)
        ('exact', 150)
        """
        if estimator is not None:
            return estimate_log_evidence(
                self.entry,
                self._rows(x),
                estimator,
                guide=self.guide,
                latents=latents,
                seed=self._stream,
                **options,
            )
        streamed = self._streamed(x)
        if streamed is not None:
            return streamed_evidence(self.entry, self.guide, streamed, self._stream)
        return evidence_or_estimate(self.entry, self.guide, self._rows(x), self._stream)

    def anatomy(self, x: Any = None, **options: Any) -> Anatomy:
        """Take the ELBO apart: rate, distortion and what the rate pays for.

        See :func:`~elbozoo.inference.anatomy.anatomy`.

        Parameters
        ----------
        x : array-like (N, D), optional
            Rows to look at; by default those of the fit.
        **options
            Options of :func:`~elbozoo.inference.anatomy.anatomy`, such as ``draws=``.

        Returns
        -------
        Anatomy
            Nats, totals over the rows.

        Raises
        ------
        InvalidInput
            For rows that do not go with the model, or without any where the fit carries none.
        """
        return anatomy(self.entry, self.guide, self._rows(x), seed=self._stream, **options)

    def disentanglement(self, factors: Any, x: Any = None, **options: Any) -> Disentanglement:
        """Return MIG, SAP and DCI of the means of q against known factors of the rows.

        See :func:`~elbozoo.inference.disentanglement.disentanglement`.

        Parameters
        ----------
        factors : array-like (N, F) or Dataset
            Values of the factors that made each row, or a data set that carries them.
        x : array-like (N, D), optional
            Rows to look at; by default those of the fit.
        **options
            Options of :func:`~elbozoo.inference.disentanglement.disentanglement`.

        Returns
        -------
        Disentanglement
            Figures from 0 to 1.

        Raises
        ------
        InvalidInput
            For rows that do not go with the model, or without any where the fit carries none.
        """
        return disentanglement(self.transform(x), factors, seed=self._stream, **options)

    def known_evidence(self) -> Evidence | None:
        """Return log p(x) of the data of the fit as far as it depends on the model alone, not on q.

        Returns
        -------
        Evidence or None
            None where it would take draws from q.
        """
        return None if self._streamed(None) is not None else known_evidence(self.entry, self._rows(None))

    def ledger(self, x: Any = None, *, best_known: float = math.nan) -> pd.Series:
        """Return the ledger: from log p(x) down to the ELBO, gap by gap; nats, totals over the rows.

        Parameters
        ----------
        x : array-like (N, D), optional
            Other data than those of the fit.
        best_known : float
            Largest log p(x) known on these rows, from which the learning gap is measured; without one, the
            closed-form maximum is used where the entry has one.

        Returns
        -------
        Series
            ``elbo``, ``log_evidence``, the gaps, ``kl``, k-hat, with errors; NaN where a figure does not apply.

        Raises
        ------
        InvalidInput
            For rows that do not go with the model, or without any where the fit carries none.

        Examples
        --------
        >>> import elbozoo as ez
        >>> fit = ez.fit("ppca", "iris", method="closed-form", latent_dim=2)
        >>> ledger = fit.ledger()
        >>> round(ledger["approximation_gap"], 6), ledger["log_evidence_kind"]
        (0.0, 'exact')
        """
        return pd.Series(self.full_ledger(x, best_known=best_known).as_dict(), name=f"{self.model} {self.method}")

    def full_ledger(self, x: Any = None, *, best_known: float = math.nan, evidence: Evidence | None = None) -> Ledger:
        """Return :meth:`ledger` as a typed record.

        Parameters
        ----------
        x : array-like (N, D), optional
            Rows to look at; by default those of the fit.
        best_known : float
            See :meth:`ledger`.
        evidence : Evidence, optional
            log p(x) of these rows where it is at hand.

        Returns
        -------
        Ledger
            With the fields of :meth:`ledger`.

        Raises
        ------
        InvalidInput
            For rows that do not go with the model, or without any where the fit carries none.
        """
        streamed = self._streamed(x)
        if streamed is not None:
            return streamed_ledger(
                self.entry, self.guide, streamed, self.guide_options, seed=self._stream, best_known=best_known
            )
        rows = self._rows(x)
        if math.isnan(best_known):
            best_known = closed_form_evidence(self.entry, rows)
        return compute_ledger(
            self.entry,
            self.guide,
            rows,
            self.guide_options,
            seed=self._stream,
            best_known=best_known,
            evidence=evidence,
        )

    def heldout(self, x: Any = None) -> pd.Series:
        """Return ELBO and log p of rows that the fit has not seen, totals in nats; NaN where a figure does not apply.

        Parameters
        ----------
        x : array-like (M, D), optional
            The rows; by default the test rows that were given beside the data, or else the validation rows.

        Returns
        -------
        Series
            Of objects: ``elbo``, ``log_evidence``, their errors and kind, in nats.

        Raises
        ------
        InvalidInput
            Without such rows, or without the data of the fit where log p(x' given x) is asked for.
        """
        rows = self.companions.heldout if x is None else x
        if rows is None:
            raise InvalidInput("found no held-out rows, expected some; pass x, or fit with test=0.2")
        figures = heldout_figures(self.entry, self.guide, self.x, self._rows(rows), self._stream)
        # Of objects, among which None stays None.
        return pd.Series(figures._asdict(), name=f"{self.model} {self.method}", dtype=object)

    def transform(self, x: Any = None) -> Tensor:
        """Return the mean of q for each row; responsibilities for a discrete latent.

        Several latents stand side by side. Where the mean has no formula it is that of 1000 draws.

        Parameters
        ----------
        x : array-like (N, D), optional
            Rows to look at; by default those of the fit.

        Returns
        -------
        Tensor (N, K)
            In the units of the latents.

        Raises
        ------
        InvalidInput
            For a model with one latent for all rows, or rows that do not go with the model.

        Examples
        --------
        >>> import elbozoo as ez
        >>> fit = ez.fit("gaussian-mixture", "iris", method="em", components=3, progress=False)
        >>> responsibilities = fit.transform()
        >>> tuple(responsibilities.shape), round(float(responsibilities.sum()), 6)
        ((150, 3), 150.0)
        """
        with isolated(self._stream), torch.no_grad():
            batch = Batch.full(self._rows(x))
            if not self.guide.has_rows:
                raise InvalidInput(
                    f"{self.model} has one latent for the whole data set, so rows have none of their own to return"
                )
            means = self.guide.means(batch)
            return by_row(batch.x, means) if isinstance(self.entry, StackedEntry) else means

    def reconstruct(self, x: Any = None) -> Tensor:
        """Return what the model makes of the code of each row: the mean of x given the mean of q.

        Columns that the model conditions on come back as they are.

        Parameters
        ----------
        x : array-like (N, D), optional
            Rows to look at; by default those of the fit.

        Returns
        -------
        Tensor (N, D)
            In the units of the data.

        Raises
        ------
        InvalidInput
            For a model without one continuous latent for each row, which is what a code is.
        """
        rows = self._rows(x)
        site = self._code(rows)
        with isolated(self._stream), torch.no_grad():
            return self._decoded(self.guide.means(Batch.full(rows)).reshape(len(rows), *site.event_shape), rows, site)

    def decode(self, z: Any) -> Tensor:
        """Return what the model makes of codes: the mean of x given each.

        Columns that the model conditions on are those of rows that it simulates.

        Parameters
        ----------
        z : Tensor (M, K)
            Codes, values of the latent.

        Returns
        -------
        Tensor (M, D)
            In the units of the data.

        Raises
        ------
        InvalidInput
            For a model without one continuous latent for each row, or for codes of another size.

        Examples
        --------
        >>> import elbozoo as ez
        >>> fit = ez.fit("ppca", "iris", method="closed-form", latent_dim=2, progress=False)
        >>> middle = fit.decode([[0.0, 0.0]])
        >>> [round(value, 3) for value in middle[0].tolist()] == [round(v, 3) for v in fit.x.mean(0).tolist()]
        True
        """
        codes = torch.as_tensor(z, dtype=torch.float64)
        site = self._code(self.entry.template(2))
        if codes.shape[1:] != site.event_shape or codes.ndim != 1 + len(site.event_shape):
            expected = ", ".join(["M", *map(str, site.event_shape)])
            raise InvalidInput(f"found codes of shape {tuple(codes.shape)}, expected ({expected}): a code for each row")
        with isolated(self._stream), torch.no_grad():
            return self._decoded(codes, self.entry.template(len(codes)), site)

    def _code(self, rows: Tensor) -> LatentSite:
        """Return the latent that is the code of a row."""
        sites = self.entry.latent_sites(rows)
        if len(sites) != 1 or not sites[0].is_local or sites[0].is_discrete or rows.ndim > 2:
            found = ", ".join(repr(site.name) for site in sites) or "none"
            raise InvalidInput(
                f"{self.model} has the latents {found}, expected one continuous latent for each row, as code of the row"
            )
        return sites[0]

    def _decoded(self, codes: Tensor, rows: Tensor, site: LatentSite) -> Tensor:
        program = poutine.condition(self.entry, data={site.name: codes})
        observed = poutine.trace(program).get_trace(Batch.full(rows)).nodes[OBSERVED_SITE]
        return self.entry.complete(rows, _mean(observed["fn"]))

    def score_samples(self, x: Any = None) -> Tensor:
        """Return log p(x_n) of each row: exact, by quadrature or estimated as the entry allows.

        Parameters
        ----------
        x : array-like (N, D), optional
            Rows to look at; by default those of the fit.

        Returns
        -------
        Tensor (N,)
            Nats.

        Raises
        ------
        InvalidInput
            For a model without log p(x), or without one for each row, or rows that do not go with it.

        Examples
        --------
        >>> import elbozoo as ez
        >>> fit = ez.fit("ppca", "iris", method="closed-form", latent_dim=2)
        >>> scores = fit.score_samples()
        >>> tuple(scores.shape), round(float(scores.sum()) - fit.log_evidence().value, 6)
        ((150,), 0.0)
        """
        evidence = self.log_evidence(x)
        if evidence is None:
            raise InvalidInput(
                f"{self.model} with {self.method} has no log p(x), expected a model that has, or a q with a density to "
                "estimate it by"
            )
        if evidence.per_datum is None:
            raise InvalidInput(
                f"{self.model} with {self.method} gives no evidence per row; use log_evidence() for the total"
            )
        return evidence.per_datum

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Draw new rows from the fitted model.

        Parameters
        ----------
        n : int
            Number of rows; of a sequence model, of the steps of one sequence.
        seed : int
            Seed of the draw.

        Returns
        -------
        Tensor (n, D)
            In the units of the data.

        Examples
        --------
        >>> import elbozoo as ez
        >>> fit = ez.fit("ppca", "iris", method="closed-form", latent_dim=2)
        >>> tuple(fit.sample(10, seed=1).shape)
        (10, 4)
        """
        return self.entry.simulate_table(n, seed)[0]

    def to_inferencedata(self, x: Any = None, *, draws: int = 1000) -> arviz.InferenceData:
        """Return draws of z, of new data and the log-likelihood as ArviZ's InferenceData.

        See :func:`~elbozoo.inference.inferencedata.inference_data`.

        Parameters
        ----------
        x : array-like (N, D), optional
            Rows to look at; by default those of the fit.
        draws : int
            Number of draws of q and of the prior.

        Returns
        -------
        InferenceData
            One chain, unless the fit is one of NUTS.

        Raises
        ------
        InvalidInput
            For rows that do not go with the model, or without any where the fit carries none.

        Examples
        --------
        >>> import elbozoo as ez
        >>> fit = ez.fit("ppca", "iris", method="closed-form", latent_dim=2)
        >>> fit.to_inferencedata(draws=20).groups()
        ['posterior', 'posterior_predictive', 'log_likelihood', 'prior', 'prior_predictive', 'observed_data']
        """
        return inference_data(self.entry, self.guide, self._rows(x), draws, self._stream)

    def save(self, directory: str | Path) -> Path:
        """Write the fit as JSON, safetensors and CSV, without its data.

        Parameters
        ----------
        directory : str or path
            Folder for the files; it is made where there is none.

        Returns
        -------
        Path
            The folder.

        Raises
        ------
        InvalidInput
            If it cannot be written, or for a program of your own.
        """
        return save_fit(self, directory)

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read a fit that :meth:`save` wrote.

        Parameters
        ----------
        directory : str or path
            Folder that :meth:`save` wrote.

        Returns
        -------
        Fit
            Without data.

        Raises
        ------
        InvalidInput
            If there is no fit in it.
        """
        return cls(**read_fit(directory))

    @property
    def _stream(self) -> int:
        return self.seed + EVALUATION_STREAM

    def _weights(self, x: Tensor) -> Any:
        return importance_weights(self.entry, self.guide, Batch.full(x), PARTICLES, self._stream)

    def _streamed(self, x: Any) -> Rows | None:
        """Return the data of the fit where figures of them are asked for and they are not in memory."""
        return self.rows if x is None and self.x is None else None

    def _rows(self, x: Any) -> Tensor:
        if x is None:
            if self.rows is not None and self.x is None:
                raise InvalidInput(
                    f"found the {len(self.rows)} rows of the fit, which are not in memory, expected some to look at; "
                    "pass rows x"
                )
            if self.x is None:
                raise InvalidInput("a loaded fit does not carry its data; pass the rows x")
            return self.x
        given = _numbers(_by_name(x, self.entry))
        is_table = given.ndim == 2 and given.shape[1] == len(self.entry.table_names)
        rows = self.entry.arrange(given, self.entry.options) if is_table else given
        if rows.ndim != len(self.shape) or self.entry.width(rows) != self.entry.columns:
            columns = ", ".join(self.entry.table_names)
            raise InvalidInput(
                f"found data of shape {tuple(given.shape)}, expected (rows, {len(self.entry.table_names)}): {columns}"
            )
        if rows.isinf().any() or (rows.isnan().any() and not self.entry.allows_missing):
            raise InvalidInput("found NaN or infinity in the rows, expected finite numbers; leave those rows out")
        if self.x is not None:
            check_new_rows(self.entry, self.x, rows, "the")
        return rows


def _mean(data: Distribution) -> Tensor:
    """Mean of a distribution of data; PyTorch has none for the values 0, 1, ... of a categorical one."""
    columns = data.base_dist if isinstance(data, Independent) else data
    if isinstance(columns, Categorical):
        values = torch.arange(columns.probs.shape[-1], dtype=columns.probs.dtype, device=columns.probs.device)
        return columns.probs @ values
    return data.mean


def _by_name(x: Any, entry: Entry) -> Any:
    """Return the columns of a frame that the entry was built for, in their order; anything else as it is.

    Labels become codes: those of the fit where it knows them, any where they say only which rows belong together.
    """
    if getattr(x, "levels", None):
        x = _spelled_out(x)
    if not isinstance(x, pd.DataFrame) or not set(entry.table_names) <= set(x.columns):
        return x
    table = x[list(entry.table_names)]
    if isinstance(entry, StackedEntry):
        return table.assign(**{key: _stacks(table[key], key) for key in entry.key_columns()})
    known = {key: role for key, role in entry.key_columns().items() if key in entry.levels}
    codes = {
        key: codes_among(_labels(table[key]), entry.levels[key], key, may_be_blank=role.may_be_blank)
        for key, role in known.items()
    }
    return table.assign(**codes)


def _stacks(column: pd.Series, name: str) -> npt.NDArray[np.int64]:
    """Return a number for each sequence or group that the rows belong to."""
    codes, _ = pd.factorize(column)
    if (codes < 0).any():
        raise InvalidInput(
            f"column {name!r}, row {int((codes < 0).argmax()) + 1} holds no label, expected one in every row, to say "
            "where the row belongs; fill it in, or leave that row out"
        )
    return codes


def _labels(column: pd.Series) -> pd.Series:
    """Return a column of labels with None for what is missing, whatever says so there."""
    return column.astype(object).where(column.notna(), None)


def _spelled_out(data: Any) -> pd.DataFrame:
    """Return a data set as a frame, with its labels in the place of their codes."""
    frame = pd.DataFrame(data.x.numpy(), columns=data.columns)
    labels = {
        name: [None if math.isnan(code) else levels[int(code)] for code in frame[name]]
        for name, levels in data.levels.items()
    }
    return frame.assign(**labels)


def _numbers(x: Any) -> Tensor:
    """Return the rows of a tensor, array, frame, nested list or data set, float64."""
    source = getattr(x, "x", x) if is_dataclass(x) else x
    if isinstance(source, Tensor):
        return source.detach().double()
    try:
        return torch.tensor(np.asarray(source, dtype=np.float64))
    except (TypeError, ValueError):
        what = "has columns that hold no numbers" if isinstance(x, pd.DataFrame) else "holds no numbers"
        raise InvalidInput(f"found a {type(x).__name__} that {what}, expected rows (N, D) of them") from None


def closed_form_evidence(entry: Entry, x: Tensor) -> float:
    """Return log p(x) at the closed-form maximum of the likelihood, total nats; NaN where none is known."""
    if not isinstance(entry, HasClosedForm) or not isinstance(entry, HasOracle):
        return math.nan
    best = type(entry)(entry.options, entry.columns).to(x.dtype)
    best.load_state_dict(entry.state_dict())
    with torch.no_grad():
        best.fit_exact(x)
        return float(best.log_evidence(x).sum())
