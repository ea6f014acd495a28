"""How each estimator of log p(x) degrades as the latent space grows, where the truth is known: the linear VAE.

Each dimension carries the same information whatever their number: its posterior has half the prior's standard
deviation. q is the best diagonal normal of each datum, which misses what the columns of the loading have in common.
Run as a script, it writes ``results/evidence_estimators.json`` and draws ``docs/images/evidence-estimators.png``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import torch
from matplotlib.figure import Figure

from elbozoo.guides.base import GuideOptions
from elbozoo.inference.best_member import best_member
from elbozoo.inference.estimators import ESTIMATORS, EvidenceEstimate, estimate_log_evidence
from elbozoo.inference.fit import provenance
from elbozoo.models import get_entry
from elbozoo.models.linear_vae import LinearVAE
from elbozoo.plots import FAINT, MARKERS, PALETTE, STYLE

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "evidence-estimators.png"
RESULTS = Path(__file__).resolve().parent / "results"
LATENT_DIMS = (1, 2, 5, 10, 20, 50)
SHOWN_ERRORS = (0.1, 0.01, 0.0, -0.01, -0.1, -1.0, -10.0)
COLUMNS = 100
INFORMATION = 3.0  # precision that the data add to that of the prior, which is 1
FULL: dict[str, dict[str, int]] = {
    "prior": {"draws": 10_000},
    "importance": {"draws": 10_000},
    "iwae": {"draws": 10_000, "particles": 50},
    "annealed": {"draws": 64, "temperatures": 500},
    "bidirectional": {"draws": 64, "temperatures": 500},
    "quadrature": {},
}


def evidence_study(
    latent_dims: Sequence[int], rows: int, estimators: dict[str, dict[str, int]], *, seed: int = 0
) -> list[dict[str, Any]]:
    """Return a record for each latent dimension and estimator, totals over the rows in nats.

    Parameters
    ----------
    latent_dims : sequence of int
        Numbers K of latent dimensions.
    rows : int
        Rows simulated from the model.
    estimators : mapping
        Options of each estimator, by name; one that does not apply to K dimensions is left out there.
    seed : int
        Of parameters, data and draws.
    """
    records = []
    for latent_dim in latent_dims:
        entry = informative_linear_vae(latent_dim, seed)
        x, z = entry.simulate(rows, seed + 1)
        with torch.no_grad():
            truth = float(entry.log_evidence(x).sum())
        best = best_member(entry, "diagonal-normal", x, GuideOptions())
        assert best is not None
        for name, options in estimators.items():
            if ESTIMATORS[name].refusal(entry, entry.latent_sites(x), x, best.guide):
                continue
            latents = z if name == "bidirectional" else None
            before = time.perf_counter()
            found = estimate_log_evidence(entry, x, name, guide=best.guide, latents=latents, seed=seed + 2, **options)
            seconds = time.perf_counter() - before
            records.append({"latent_dim": latent_dim, "rows": rows, **_record(found, truth), "seconds": seconds})
    return records


def informative_linear_vae(latent_dim: int, seed: int) -> LinearVAE:
    """Return a linear VAE whose loading gives about ``INFORMATION`` to each latent dimension."""
    entry = get_entry("linear-vae").example(COLUMNS, seed=seed, latent_dim=latent_dim)
    assert isinstance(entry, LinearVAE)
    with torch.no_grad():
        entry.loading.normal_(generator=torch.Generator().manual_seed(seed))
        entry.loading.mul_(math.sqrt(INFORMATION / COLUMNS) * entry.noise_scale)
    return entry


def picture(records: list[dict[str, Any]]) -> Figure:
    """Draw the error of each estimator per datum against the number of dimensions; hollow where it warns.

    The lower end of a bidirectional estimate is the annealed one, so that its upper end alone is drawn.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        ax = figure.add_subplot()
        ax.axhline(0.0, color=FAINT, linewidth=1.0)
        for name, colour, marker in zip(ESTIMATORS, PALETTE, MARKERS, strict=False):
            mine = [record for record in records if record["estimator"] == name]
            dims = [record["latent_dim"] for record in mine]
            errors, widths = zip(*(_error_per_datum(record) for record in mine), strict=True)
            label = "bidirectional, upper end" if name == "bidirectional" else name
            ax.errorbar(dims, errors, widths, color=colour, label=label, marker=marker, elinewidth=1.0)
            for dim, error, record in zip(dims, errors, mine, strict=True):
                if not record["reliable"]:
                    ax.plot(dim, error, marker=marker, color=colour, markerfacecolor="white", zorder=3)
        ax.set_xscale("log")
        ax.set_xticks(LATENT_DIMS, [str(dim) for dim in LATENT_DIMS])
        ax.set_yscale("symlog", linthresh=0.01)
        ax.set_yticks(SHOWN_ERRORS, [f"{error:g}".replace("-", "−") for error in SHOWN_ERRORS])
        ax.minorticks_off()
        ax.set_xlabel("latent dimensions K")
        ax.set_ylabel("estimate − truth, nats per datum")
        ax.set_title("Error of estimates of log p(x), linear VAE; hollow: said to be unreliable")
        ax.legend(loc="lower left")
    return figure


def _error_per_datum(record: dict[str, Any]) -> tuple[float, float]:
    """Error and standard error of what is drawn of an estimate, nats per datum."""
    end = "" if record["upper"] is None else "upper"
    value, error = record[end or "value"], record[f"{end}_standard_error".removeprefix("_")]
    return (value - record["truth"]) / record["rows"], error / record["rows"]


def _record(found: EvidenceEstimate, truth: float) -> dict[str, Any]:
    return {
        "estimator": found.estimator,
        "truth": truth,
        "value": found.value,
        "error": found.value - truth,
        "standard_error": found.standard_error,
        "shortfall": found.shortfall,
        "upper": found.upper.value if found.upper else None,
        "upper_standard_error": found.upper.standard_error if found.upper else None,
        "effective_size": found.effective_size if math.isfinite(found.effective_size) else None,
        "kind": found.kind,
        "reliable": found.reliable,
        "reason": found.reason,
    }


if __name__ == "__main__":
    outcome = evidence_study(LATENT_DIMS, 50, FULL)
    document = {"study": "evidence_estimators", "options": FULL, "provenance": provenance(), "records": outcome}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "evidence_estimators.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    picture(outcome).savefig(PICTURE, dpi=150)
    for r in outcome:
        print(
            f"K = {r['latent_dim']:2d} {r['estimator']:14s} error {r['error']:10.3f} ± {r['standard_error']:.3f}, "
            f"shortfall {r['shortfall']:.3f}, reliable {r['reliable']}, {r['seconds']:.1f} s"
        )
