r"""Disentanglement: whether each dimension of a code holds one factor of the data, and each factor stands in one.

The codes of N rows, the means of q in K dimensions, are compared with F factors that are known and take finitely
many values. Three measures are customary. All are largest for codes that are the factors, in any order, sign and
scale, and differ in what else they forgive: two dimensions that hold the same factor have no gap and are not
complete, but each is disentangled. None looks at the model, so that any codes can be measured.

*Mutual information gap* (Chen et al. 2018, equation 6): of each factor $v_f$, by how much the dimension that knows most
of it knows more than the next one, as a share of the factor's entropy,

$$
\mathrm{MIG} = \frac1F \sum_f \frac{I(z_{k(f)}; v_f) - \max_{k \ne k(f)} I(z_k; v_f)}{H(v_f)}.
$$

The information is that between the factor and the mean of q, counted in 20 bins of equal width over the range of each
dimension, as Locatello et al. (2019) do, and not that with draws from q, as Chen et al. do.

*Separated attribute predictability* (Kumar et al. 2018): the same gap of a score that says how well a factor is
predicted from one dimension by cutting it at C - 1 thresholds, for C values: the balanced accuracy on the rows
themselves. Blind guesses have an accuracy of 1/C, so that the gap is at most the mean of 1 - 1/C. The thresholds here
are the best ones; a linear classifier, which is often put in their place, cannot tell the middle values of an ordered
factor from one dimension.

*DCI* (Eastwood & Williams 2018): forests of trees predict each factor from all dimensions, and what a dimension
contributes to each is its importance $R_{kf}$. *Disentanglement* is one minus the entropy, base F, of a dimension's
importances over the factors, *completeness* one minus that, base K, of a factor's over the dimensions; dimensions are
weighed by their share of all importance. *Informativeness* is the accuracy of the forests on rows that their trees
have not seen.

What to mind: a measure sees the range of a dimension and not its worth to the model, so a dimension that q leaves at
the prior still has 20 bins of whatever it moves. With few rows for each bin information is overestimated, by
about (bins - 1)(C - 1) / 2N nats (Miller 1955). And what is measured cannot be learnt from the rows alone: without
knowledge of the factors every well-fitting model has an equivalent that mixes them (Locatello et al. 2019,
theorem 1).

References
----------
```bibtex
@inproceedings{chen2018isolating,
  author = {Chen, Ricky T. Q. and Li, Xuechen and Grosse, Roger B. and Duvenaud, David K.},
  title = {Isolating Sources of Disentanglement in Variational Autoencoders},
  booktitle = {Advances in Neural Information Processing Systems}, volume = {31}, year = {2018}
}
@inproceedings{kumar2018variational,
  author = {Kumar, Abhishek and Sattigeri, Prasanna and Balakrishnan, Avinash},
  title = {Variational Inference of Disentangled Latent Concepts from Unlabeled Observations},
  booktitle = {International Conference on Learning Representations}, year = {2018}
}
@inproceedings{eastwood2018framework,
  author = {Eastwood, Cian and Williams, Christopher K. I.},
  title = {A Framework for the Quantitative Evaluation of Disentangled Representations},
  booktitle = {International Conference on Learning Representations}, year = {2018}
}
@inproceedings{locatello2019challenging,
  author = {Locatello, Francesco and Bauer, Stefan and Lucic, Mario and R{\"a}tsch, Gunnar and Gelly, Sylvain and
            Sch{\"o}lkopf, Bernhard and Bachem, Olivier},
  title = {Challenging Common Assumptions in the Unsupervised Learning of Disentangled Representations},
  booktitle = {International Conference on Machine Learning}, pages = {4114--4124}, year = {2019}
}
@incollection{miller1955note,
  author = {Miller, George A.}, title = {Note on the bias of information estimates},
  booktitle = {Information Theory in Psychology}, pages = {95--100}, year = {1955}
}
```
"""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch import Tensor

from elbozoo.models.contract.errors import InvalidInput

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

BINS = 20  # of each dimension, for its mutual information with a factor (Locatello et al. 2019, appendix C)
TREES = 100
LEAST_TREES = 50  # so that no row is in the bag of every tree: 0.632^50 = 1e-10
LEAF_ROWS = 5  # at least, so that trees stop before what they learn is noise, which has no importance


@dataclass(frozen=True, eq=False, repr=False)
class Disentanglement:
    """How codes agree with factors; each measure lies between 0 and 1, and larger is better.

    Attributes
    ----------
    information : DataFrame (K, F)
        Mutual information of each dimension and factor, nats, from binned codes.
    entropy : Series (F,)
        Entropy of each factor, nats.
    predictability : DataFrame (K, F)
        Balanced accuracy of each factor when one dimension is cut at the best thresholds.
    importance : DataFrame (K, F)
        Share of each dimension in what the forest of a factor learnt; columns add up to 1, or are zero where it learnt
        nothing.
    accuracy : Series (F,)
        Share of rows for which trees that have not seen them predict each factor.
    """

    information: pd.DataFrame
    entropy: pd.Series
    predictability: pd.DataFrame
    importance: pd.DataFrame
    accuracy: pd.Series

    def __repr__(self) -> str:
        figures = ", ".join(f"{name}={value:.4f}" for name, value in self.as_dict().items())
        return f"Disentanglement({figures})"

    @property
    def mig(self) -> float:
        """Mutual information gap (Chen et al. 2018, equation 6)."""
        return float((_gap(self.information) / self.entropy).mean())

    @property
    def sap(self) -> float:
        """Separated attribute predictability (Kumar et al. 2018)."""
        return float(_gap(self.predictability).mean())

    @property
    def disentanglement(self) -> float:
        """Disentanglement of DCI: whether a dimension matters to one factor only."""
        importance = self.importance.to_numpy()
        weights = importance.sum(1)
        return _weighted(1 - _entropies(importance) / np.log(importance.shape[1]), weights)

    @property
    def completeness(self) -> float:
        """Completeness of DCI: whether one dimension only matters to a factor."""
        importance = self.importance.to_numpy().T
        return _weighted(1 - _entropies(importance) / np.log(importance.shape[1]), importance.sum(1))

    @property
    def informativeness(self) -> float:
        """Informativeness of DCI: mean accuracy over the factors, whatever the dimensions."""
        return float(self.accuracy.mean())

    def as_dict(self) -> dict[str, float]:
        """Return the five figures by name."""
        names = ("mig", "sap", "disentanglement", "completeness", "informativeness")
        return {name: getattr(self, name) for name in names}


def disentanglement(
    codes: Any, factors: Any, *, bins: int = BINS, trees: int = TREES, seed: int = 0
) -> Disentanglement:
    """Compare ``codes`` (N, K), such as the means of q, with ``factors`` (N, F) of finitely many values.

    Parameters
    ----------
    codes : array-like (N, K)
        At least two dimensions.
    factors : array-like (N, F), DataFrame, or data set that carries its factors
        At least two factors, each with at least two values, which need not be numbers.
    bins : int
        Bins of equal width over the range of each dimension, for the mutual information.
    trees : int
        Trees of each forest.
    seed : int
        Seed of the forests.

    Raises
    ------
    InvalidInput
        For another number of rows, fewer dimensions or factors than two, codes that are not finite, a factor with
        one value, or with more than half as many values as rows.
    """
    z = _codes(codes)
    levels, names = _factors(factors, len(z))
    if bins < 2:
        raise InvalidInput(f"found bins={bins}, expected at least 2: one bin tells nothing")
    if trees < LEAST_TREES:
        raise InvalidInput(
            f"found trees={trees}, expected at least {LEAST_TREES}: every row needs some that have not seen it"
        )
    dimensions = [f"z{k}" for k in range(z.shape[1])]

    def by_factor(of: Any) -> pd.DataFrame:
        return pd.DataFrame({name: of(level) for name, level in zip(names, levels.T, strict=True)}, index=dimensions)

    importance, accuracy = _forests(z, levels, trees, seed)
    return Disentanglement(
        information=by_factor(lambda level: mutual_informations(z, level, bins)),
        entropy=pd.Series([_entropy(level) for level in levels.T], index=names),
        predictability=by_factor(lambda level: predictabilities(z, level)),
        importance=pd.DataFrame(importance, index=dimensions, columns=names),
        accuracy=pd.Series(accuracy, index=names),
    )


def mutual_informations(codes: Floats, level: Integers, bins: int = BINS) -> Floats:
    """Mutual information of each binned dimension of ``codes`` (N, K) and one factor ``level`` (N,): (K,), nats."""
    from sklearn.metrics import mutual_info_score

    return np.array([mutual_info_score(_binned(column, bins), level) for column in codes.T])


def predictabilities(codes: Floats, level: Integers) -> Floats:
    """Balanced accuracy of the best thresholds on each dimension of ``codes`` (N, K) for one factor ``level`` (N,).

    C values have C - 1 thresholds; each interval between them predicts one value. All rows are passed in the
    order of a dimension, and for each number of thresholds so far and each value that is predicted there, the best
    sum of recalls is kept: exact, in N C² steps for all dimensions together. Rows with equal codes are not cut apart.

    Returns
    -------
    array (K,)
        Between 1 / C, when a dimension is no help, and 1.
    """
    rows, dimensions = codes.shape
    classes = int(level.max()) + 1
    order = codes.argsort(0, kind="stable")
    passed = level[order]  # (N, K)
    ordered = np.take_along_axis(codes, order, 0)
    is_new = np.vstack([np.zeros((1, dimensions), bool), ordered[1:] > ordered[:-1]])
    recall = 1.0 / np.bincount(level, minlength=classes)
    best = np.full((dimensions, classes, classes), -np.inf)  # by thresholds so far, by value predicted now
    best[:, 0] = 0.0
    each = np.arange(dimensions)
    for row in range(rows):
        cut = best[:, :-1].max(-1, keepdims=True)  # a threshold here leaves any value for any other
        cut[~is_new[row]] = -np.inf
        best[:, 1:] = np.maximum(best[:, 1:], cut)
        best[each, :, passed[row]] += recall[passed[row]][:, None]
    result: Floats = best.max((1, 2)) / classes
    return result


def _forests(codes: Floats, levels: Integers, trees: int, seed: int) -> tuple[Floats, Floats]:
    """Importance (K, F) of each dimension for each factor, and accuracy (F,) on rows out of the bag."""
    from sklearn.ensemble import RandomForestClassifier

    importance, accuracy = [], []
    for level in levels.T:
        # Every split may take any dimension: from a random choice of them it may have to take a useless one.
        forest = RandomForestClassifier(
            trees, max_features=None, min_samples_leaf=LEAF_ROWS, oob_score=True, random_state=seed
        )
        forest.fit(codes, level)
        importance.append(forest.feature_importances_)
        accuracy.append(forest.oob_score_)
    return np.stack(importance, 1), np.array(accuracy)


def _binned(column: Floats, bins: int) -> Integers:
    """Bin of each value, from 0: equal widths from the least to the largest."""
    low, high = column.min(), column.max()
    if high == low:
        return np.zeros(len(column), dtype=np.int64)
    # The largest value belongs to the last bin.
    return np.minimum((bins * ((column - low) / (high - low))).astype(np.int64), bins - 1)


def _gap(scores: pd.DataFrame) -> pd.Series:
    """Difference between the largest and the second largest score of each factor."""
    ordered = np.sort(scores.to_numpy(), axis=0)
    return pd.Series(ordered[-1] - ordered[-2], index=scores.columns)


def _entropy(level: Integers) -> float:
    return float(_entropies(np.bincount(level)[None].astype(np.float64))[0])


def _entropies(weights: Floats) -> Floats:
    """Entropy of the shares in each row of ``weights``, nats; 0 for a row of zeros."""
    total = weights.sum(-1, keepdims=True)
    shares = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    entropies: Floats = -(shares * logs).sum(-1)
    return entropies


def _weighted(values: Floats, weights: Floats) -> float:
    """Mean of ``values`` with ``weights``; 0 where all of these are zero."""
    total = weights.sum()
    return float(values @ weights / total) if total > 0 else 0.0


def _codes(codes: Any) -> Floats:
    values = np.asarray(codes.detach().cpu() if isinstance(codes, Tensor) else codes, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] < 2:
        raise InvalidInput(
            f"found codes of shape {values.shape}, expected (rows, dimensions) with at least 2 dimensions, which are "
            "compared; raise latent_dim"
        )
    if not np.isfinite(values).all():
        raise InvalidInput("found NaN or infinity in the codes, expected finite numbers; fit again, more slowly")
    return values


def _factors(factors: Any, rows: int) -> tuple[Integers, list[str]]:
    """Return the levels of each factor, (N, F), from 0 without holes, and the names of the factors."""
    names: list[str] | None = None
    if is_dataclass(factors):
        data, factors = factors, getattr(factors, "factors", None)
        if factors is None:
            raise InvalidInput(
                f"{getattr(data, 'name', 'the data')}: found no factors, expected a data set that carries them, "
                "such as sprites, or the factors themselves, (rows, factors)"
            )
        names = [str(name) for name in getattr(data, "factor_names", ())]
    if isinstance(factors, pd.DataFrame):
        names = [str(name) for name in factors.columns]
    table = np.asarray(factors.detach().cpu() if isinstance(factors, Tensor) else factors)
    if table.ndim != 2 or table.shape[1] < 2:
        raise InvalidInput(
            f"found factors of shape {table.shape}, expected (rows, factors) with at least 2 factors, which are told "
            "apart; add one"
        )
    if len(table) != rows:
        raise InvalidInput(
            f"found {len(table)} rows of factors for {rows} rows of codes, expected as many; take the factors of the "
            "rows that were coded"
        )
    names = [f"factor {f}" for f in range(table.shape[1])] if names is None else names
    levels = np.column_stack([pd.factorize(column)[0] for column in table.T]).astype(np.int64)
    for name, level in zip(names, levels.T, strict=True):
        _refuse_factor(name, level)
    return levels, names


def _refuse_factor(name: str, level: Integers) -> None:
    if level.min() < 0:
        row = int((level < 0).argmax())
        raise InvalidInput(
            f"factor {name!r}: found a missing value in row {row + 1}, expected one in every row; leave that row out"
        )
    values = int(level.max()) + 1
    if values == 1:
        raise InvalidInput(
            f"factor {name!r}: found one value in all {len(level)} rows, expected at least 2; leave that factor out"
        )
    if 2 * values > len(level):
        raise InvalidInput(
            f"factor {name!r}: found {values} values in {len(level)} rows, expected at most half as many values as "
            "rows, so that they come again; bin it first"
        )
