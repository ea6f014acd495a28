"""Regressions: entries in which one column of the table is explained by the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from elbozoo.models.contract.entry import ParameterFreeEntry
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.options import Column, Field, Options


class RegressionOptions(Options):
    """Options of every :class:`RegressionEntry`."""

    target: Column = Field(-1, description="column to explain; the others are the design")
    intercept: bool = Field(True, description="whether a constant is added to the design")
    prior_scale: float = Field(10.0, gt=0, description="prior standard deviation of every slope")
    intercept_scale: float = Field(10.0, gt=0, description="prior standard deviation of the intercept")


class RegressionEntry(ParameterFreeEntry):
    """Base of regressions with one vector of coefficients β (P,) for the whole data set and no θ to learn.

    The observed site is the target given its row, so that the other columns are conditioned on.
    """

    Options = RegressionOptions
    options: RegressionOptions
    example_columns = 3
    site_dims: ClassVar[dict[str, tuple[str, ...]]] = {
        "coefficients": ("coefficient",),
        "design": ("coefficient",),
    }

    @classmethod
    def check_data(cls, x: Tensor, options: Any) -> None:
        """Refuse a table without anything to regress on."""
        if x.shape[1] < 2 and not options.intercept:
            raise InvalidInput(
                "found no column beside the target, expected at least one to regress on: add columns, or set "
                "intercept=true"
            )

    def template(self, n: int) -> Tensor:
        """Rows (n, D) with standard normal covariates, and zeros for the target."""
        rows = torch.randn(n, self.columns, dtype=self.dtype)
        rows[:, self._target] = 0
        return rows

    def complete(self, template: Tensor, observed: Tensor) -> Tensor:
        """Put the simulated targets (n,) into their column."""
        rows = template.clone()
        rows[:, self._target] = observed
        return rows

    def constant_data(self, x: Tensor) -> dict[str, Tensor]:
        """Return the design (N, P), with the intercept's column of ones."""
        return {"design": self.design(x)}

    def coords(self) -> dict[str, Sequence[Any]]:
        """Names of the coefficients: those of their columns."""
        names = [self.names[position] for position in self._covariates]
        return {"coefficient": ["intercept", *names] if self.options.intercept else names}

    def design(self, x: Tensor) -> Tensor:
        """Return the design Φ (N, P): ones for the intercept, then the columns beside the target."""
        columns = x[:, self._covariates]
        return torch.cat([x.new_ones(len(x), 1), columns], 1) if self.options.intercept else columns

    def response(self, x: Tensor) -> Tensor:
        """Return the target y (N,)."""
        return x[:, self._target]

    def prior_scale(self, x: Tensor) -> Tensor:
        """Return the prior standard deviations of the coefficients, (P,), in the dtype of ``x``."""
        intercept = [self.options.intercept_scale] if self.options.intercept else []
        return x.new_tensor([*intercept, *[self.options.prior_scale] * len(self._covariates)])

    def linear_predictor(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """Return Φβ: (N,) for coefficients (P,), and (..., N) for (..., 1, P), where 1 stands for the rows."""
        return (torch.atleast_2d(coefficients) @ self.design(x).mT).squeeze(-2)

    @property
    def _target(self) -> int:
        return int(self.options.target) % self.columns

    @property
    def _covariates(self) -> list[int]:
        return [position for position in range(self.columns) if position != self._target]
