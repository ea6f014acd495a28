"""The JSON document that ``fit --json`` and ``compare --json`` print, field by field: its schema is made from here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

DIALECT = "https://json-schema.org/draft/2020-12/schema"
EvidenceKind = Literal["exact", "quadrature", "estimate"]


class _Part(BaseModel):
    """A part of the document; a field that is not described here is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Data(_Part):
    """The data that were fitted."""

    name: str = Field(description="name of the data set, or where it came from")
    rows: int = Field(ge=0, description="rows that the fits learned from")
    columns: int = Field(ge=1, description="number of its columns")
    methods: Literal["all"] | None = Field(
        default=None, description="where all ways to a q were fitted to one model, which was learned before"
    )
    arguments: dict[str, Any] | None = Field(
        default=None, description="what was done to the data: columns picked, pixels made binary, rows set aside"
    )


class Row(_Part):
    """A fit: one method from one seed. Nats, totals over the rows of the data; null where a figure does not apply."""

    method: str = Field(description="name by which the method was asked for")
    guide: str = Field(description="canonical name of the guide that the figures are about")
    seed: int = Field(ge=0, description="seed of the fit")
    elbo: float | None = Field(description="ELBO at β = 1, nats; null for a q without a density")
    elbo_se: float | None = Field(description="its Monte Carlo standard error, nats; 0 where nothing was drawn")
    log_evidence: float | None = Field(description="log p(x) at the θ of the fit, nats")
    log_evidence_se: float | None = Field(
        description="its error, nats: 0 if exact, an upper estimate if by quadrature, a standard error if estimated"
    )
    log_evidence_kind: EvidenceKind | None = Field(description="how log p(x) is known")
    gap: float | None = Field(description="log_evidence - elbo, nats")
    approximation_gap: float | None = Field(description="from log p(x) down to the best member of the family, nats")
    amortization_gap: float | None = Field(description="from there down to the ELBO, nats")
    learning_gap: float | None = Field(description="from the best log p(x) known on these rows down to this one, nats")
    kl: float | None = Field(
        description="KL(q ‖ posterior), nats, found without the evidence; null where the posterior is not known"
    )
    khat_max: float | None = Field(
        description="largest Pareto k-hat of a datum; above 0.7 importance weights cannot correct q"
    )
    seconds: float = Field(ge=0, description="wall-clock time of the fit, its evaluation left out, seconds")
    steps: int = Field(ge=0, description="gradient steps or EM iterations")
    parameters: int = Field(ge=0, description="number of parameters that were fitted, of model and guide")
    converged: bool = Field(description="whether the convergence test was met")


class HeldOutFit(_Part):
    """Figures of one fit on rows that it did not learn from; nats, totals over those rows."""

    method: str = Field(description="name by which the method was asked for")
    seed: int = Field(ge=0, description="seed of the fit")
    rows: int = Field(ge=0, description="number of the rows")
    elbo: float | None = Field(description="ELBO at β = 1, nats; null without a q for new rows")
    elbo_se: float | None = Field(description="its Monte Carlo standard error, nats")
    log_evidence: float | None = Field(description="log p(x'), or log p(x' given x) where a latent is global, nats")
    log_evidence_se: float | None = Field(description="its error, nats")
    log_evidence_kind: EvidenceKind | None = Field(description="how it is known")


class HeldOut(_Part):
    """Rows that were held out."""

    part: Literal["test", "validation"] = Field(description="the part that the figures are about")
    rows: int = Field(ge=0, description="number of its rows")
    validation_rows: int | None = Field(description="number of the rows that fits were stopped by; null without any")
    fits: list[HeldOutFit] = Field(description="figures of each fit")


class Failure(_Part):
    """A fit that broke down, which has no row."""

    method: str = Field(description="name by which the method was asked for")
    seed: int = Field(ge=0, description="seed of the fit")
    cause: str = Field(description="what broke it")


class Document(_Part):
    """What ``elbozoo fit --json`` and ``elbozoo compare --json`` print: fits of one model to the same rows."""

    model_config = ConfigDict(extra="forbid", strict=True, title="elbozoo comparison")

    model: str = Field(description="name of the entry")
    data: Data = Field(description="what was fitted")
    rows: list[Row] = Field(description="one object per method and seed")
    heldout: HeldOut | None = Field(default=None, description="where rows were held out")
    failures: list[Failure] | None = Field(default=None, description="where fits broke down")


PARTS: tuple[type[BaseModel], ...] = (Document, Data, Row, HeldOut, HeldOutFit, Failure)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the document, draft 2020-12."""
    return {"$schema": DIALECT, **Document.model_json_schema()}
