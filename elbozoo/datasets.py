"""The named data sets: what is known of each without loading it, and how it is loaded."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from elbozoo.idx import load_labelled_images
from elbozoo.sprites import FACTOR_NAMES, SIDE, sprites

STANDARDISED = "-standardised"


class Table(NamedTuple):
    """What a loader returns: rows (N, D), column names, classes (N,) where known, factors (N, F) with names likewise.

    The image shape is given where it is known from the files alone.
    """

    x: npt.NDArray[np.float64]
    columns: list[str]
    labels: npt.NDArray[np.int64] | None
    factors: npt.NDArray[np.int64] | None = None
    factor_names: tuple[str, ...] = ()
    image_shape: tuple[int, int] | None = None


@dataclass(frozen=True)
class Facts:
    """What is known of a named data set without loading it.

    ``load`` takes no argument, or ``root`` and ``split`` where ``is_brought``: the files are the user's. ``top`` is the
    largest value that a cell can take, where that is known.
    """

    load: Callable[..., Table]
    rows: int
    columns: int
    kind: str
    description: str
    source: str
    image_shape: tuple[int, int] | None = None
    top: float | None = None
    is_brought: bool = False


def list_datasets() -> pd.DataFrame:
    """Return a table of the named data sets; loads none of them.

    Besides these names, :func:`load_data` takes ``simulate:MODEL``, files, frames, arrays and tensors. The files of
    ``mnist`` and ``fashion-mnist`` are brought by the user; the rows are those of ``split="train"``.

    Returns
    -------
    DataFrame
        Indexed by ``name``, with ``rows``, ``columns``, ``kind`` (continuous, count, binary, or estimates with their
        standard errors; a series has its rows in the order of time), ``description`` (with units) and ``source``
        (with citation).

    Examples
    --------
    >>> import elbozoo as ez
    >>> ez.list_datasets()["kind"].head(3).to_dict()
    {'digits': 'count', 'digits-binary': 'binary', 'iris': 'continuous'}
    """
    shown = ["rows", "columns", "kind", "description", "source"]
    table = {name: [getattr(facts, key) for key in shown] for name, facts in NAMED.items()}
    return pd.DataFrame.from_dict(table, orient="index", columns=shown).rename_axis("name")


def _scikit_learn(name: str, has_classes: bool = True) -> Table:
    # Imported here because scikit-learn is slow to import and files need none of it.
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    labels = bunch.target.astype(np.int64) if has_classes else None
    return Table(bunch.data.astype(np.float64), [str(column) for column in bunch.feature_names], labels)


def _digits_binary() -> Table:
    digits = _scikit_learn("digits")
    return digits._replace(x=(digits.x >= 8).astype(np.float64))


def _eight_schools() -> Table:
    effect = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
    standard_error = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]
    return Table(np.column_stack([effect, standard_error]), ["effect", "standard_error"], None)


def _series(name: str, values: list[int]) -> Table:
    return Table(np.array(values, dtype=np.float64)[:, None], [name], None)


# fmt: off
def _nile() -> Table:
    return _series("flow", [
        1120, 1160, 963, 1210, 1160, 1160, 813, 1230, 1370, 1140, 995, 935, 1110, 994, 1020, 960, 1180, 799, 958, 1140,
        1100, 1210, 1150, 1250, 1260, 1220, 1030, 1100, 774, 840, 874, 694, 940, 833, 701, 916, 692, 1020, 1050, 969,
        831, 726, 456, 824, 702, 1120, 1100, 832, 764, 821, 768, 845, 864, 862, 698, 845, 744, 796, 1040, 759, 781, 865,
        845, 944, 984, 897, 822, 1010, 771, 676, 649, 846, 812, 742, 801, 1040, 860, 874, 848, 890, 744, 749, 838, 1050,
        918, 986, 797, 923, 975, 815, 1020, 906, 901, 1170, 912, 746, 919, 718, 714, 740,
    ])


def _earthquakes() -> Table:
    return _series("earthquakes", [
        13, 14, 8, 10, 16, 26, 32, 27, 18, 32, 36, 24, 22, 23, 22, 18, 25, 21, 21, 14, 8, 11, 14, 23, 18, 17, 19, 20,
        22, 19, 13, 26, 13, 14, 22, 24, 21, 22, 26, 21, 23, 24, 27, 41, 31, 27, 35, 26, 28, 36, 39, 21, 17, 22, 17, 19,
        15, 34, 10, 15, 22, 18, 15, 20, 15, 22, 19, 16, 30, 27, 29, 23, 20, 16, 21, 21, 25, 16, 18, 15, 18, 14, 10, 15,
        8, 15, 6, 11, 8, 7, 18, 16, 13, 12, 13, 20, 15, 16, 12, 18, 15, 16, 13, 15, 16, 11, 11,
    ])
# fmt: on


def _role_conflict() -> Table:
    # Respondents of each pattern of answers, from universalistic in all four situations to none.
    counts = [42, 23, 6, 25, 6, 24, 7, 38, 1, 4, 1, 6, 2, 9, 2, 20]
    patterns = np.array(list(itertools.product([1.0, 0.0], repeat=4)))
    return Table(np.repeat(patterns, counts, axis=0), ["A", "B", "C", "D"], None)


def _idx(name: str, folder: str, root: str | os.PathLike[str] | None = None, split: str = "train") -> Table:
    images, labels = load_labelled_images(name, root, folder, split)
    height, width = images.shape[1:]
    columns = [f"pixel_{row}_{column}" for row in range(height) for column in range(width)]
    x = images.reshape(len(images), -1).astype(np.float64)
    return Table(x, columns, labels, image_shape=(height, width))


def _sprites() -> Table:
    images, factors = sprites()
    columns = [f"pixel_{row}_{column}" for row in range(SIDE) for column in range(SIDE)]
    return Table(images, columns, factors[:, FACTOR_NAMES.index("shape")], factors, FACTOR_NAMES)


def _standardise(load: Callable[[], Table]) -> Table:
    table = load()
    return table._replace(x=(table.x - table.x.mean(axis=0)) / table.x.std(axis=0))


def _standardised(facts: Facts) -> Facts:
    rule = "each column minus its mean, over its standard deviation (N in the denominator)"
    load = functools.partial(_standardise, facts.load)
    return replace(facts, load=load, description=f"{facts.description}; {rule}")


_DIGITS = Facts(
    functools.partial(_scikit_learn, "digits"),
    rows=1797,
    columns=64,
    kind="count",
    description="handwritten digits, 8 x 8 pixels, each a count of ink from 0 to 16; labels: the digit",
    source="scikit-learn load_digits; E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, "
    "UCI Machine Learning Repository, 1998 (its test set)",
    image_shape=(8, 8),
    top=16.0,
)
_MNIST = Facts(
    functools.partial(_idx, "mnist", "MNIST/raw"),
    rows=60_000,
    columns=784,
    kind="count",
    description="handwritten digits, 28 x 28 pixels, each a byte of ink from 0 to 255; labels: the digit; from your "
    "own IDX files in root=DIR, 60000 to train with and 10000 to test with (split=train, test or all)",
    source="Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, Gradient-based learning applied to document recognition, "
    "Proceedings of the IEEE 86, 2278-2324, 1998",
    image_shape=(28, 28),
    top=255.0,
    is_brought=True,
)
_FASHION_MNIST = replace(
    _MNIST,
    load=functools.partial(_idx, "fashion-mnist", "FashionMNIST/raw"),
    description="articles of clothing, 28 x 28 pixels, each a byte of grey from 0 to 255; labels: the kind, 0 to 9; "
    "from your own IDX files in root=DIR, 60000 to train with and 10000 to test with (split=train, test or all)",
    source="H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST: a novel image dataset for benchmarking machine learning "
    "algorithms, arXiv 1708.07747, 2017",
)
_RAW = {
    "digits": _DIGITS,
    "digits-binary": replace(
        _DIGITS,
        load=_digits_binary,
        kind="binary",
        description="handwritten digits, 8 x 8 pixels: 1 where digits has 8 or more of 16, otherwise 0; "
        "labels: the digit",
        top=1.0,
    ),
    "iris": Facts(
        functools.partial(_scikit_learn, "iris"),
        rows=150,
        columns=4,
        kind="continuous",
        description="length and width of sepals and petals of iris flowers, in cm; labels: the species",
        source="scikit-learn load_iris (the values of R, not of UCI); R. A. Fisher, The use of multiple measurements "
        "in taxonomic problems, Annals of Eugenics 7, 179-188, 1936",
    ),
    "wine": Facts(
        functools.partial(_scikit_learn, "wine"),
        rows=178,
        columns=13,
        kind="continuous",
        description="chemical analysis of Italian wines, each column in its own unit; labels: the cultivar",
        source="scikit-learn load_wine; M. Forina et al., PARVUS; S. Aeberhard and M. Forina, Wine, UCI Machine "
        "Learning Repository, 1991",
    ),
    "breast-cancer": Facts(
        functools.partial(_scikit_learn, "breast_cancer"),
        rows=569,
        columns=30,
        kind="continuous",
        description="mean, error and worst value of ten measures of cell nuclei, in pixels and their ratios; "
        "labels: 0 malignant, 1 benign",
        source="scikit-learn load_breast_cancer; W. N. Street, W. H. Wolberg and O. L. Mangasarian, Nuclear feature "
        "extraction for breast tumor diagnosis, SPIE 1905, 861-870, 1993",
    ),
    "diabetes": Facts(
        functools.partial(_scikit_learn, "diabetes", has_classes=False),
        rows=442,
        columns=10,
        kind="continuous",
        description="age, sex, body mass index, blood pressure and six serum measures of patients, each column centred "
        "and scaled to a sum of squares of 1 (no unit); the disease progression is left out",
        source="scikit-learn load_diabetes; B. Efron, T. Hastie, I. Johnstone and R. Tibshirani, Least angle "
        "regression, Annals of Statistics 32, 407-499, 2004",
    ),
    "eight-schools": Facts(
        _eight_schools,
        rows=8,
        columns=2,
        kind="estimates with standard errors",
        description="effect of coaching on SAT-V scores in eight schools and its standard error, in points",
        source="D. B. Rubin, Estimation in parallel randomized experiments, Journal of Educational Statistics 6, "
        "377-401, 1981; A. Gelman et al., Bayesian Data Analysis, section 5.5; the effects as in ArviZ centered_eight",
    ),
    "nile": Facts(
        _nile,
        rows=100,
        columns=1,
        kind="continuous series",
        description="annual flow of the Nile at Aswan, 1871 to 1970, in 10^8 cubic metres, to the whole unit",
        source="R datasets::Nile; J. Durbin and S. J. Koopman, Time Series Analysis by State Space Methods, 2nd "
        "edition, Oxford University Press, 2012, section 2.2.5",
    ),
    "earthquakes": Facts(
        _earthquakes,
        rows=107,
        columns=1,
        kind="count series",
        description="number of earthquakes of magnitude 7 or more in the world in each year, 1900 to 2006",
        source="W. Zucchini, I. L. MacDonald and R. Langrock, Hidden Markov Models for Time Series, 2nd edition, "
        "CRC Press, 2016, table 1.1; from the US Geological Survey",
    ),
    "role-conflict": Facts(
        _role_conflict,
        rows=216,
        columns=4,
        kind="binary",
        description="answers of 216 students to four situations of role conflict, A to D: 1 universalistic, "
        "0 particularistic; rows of equal answers stand together",
        source="S. A. Stouffer and J. Toby, Role conflict and personality, American Journal of Sociology 56, 395-406, "
        "1951, as in L. A. Goodman, Exploratory latent structure analysis using both identifiable and unidentifiable "
        "models, Biometrika 61, 215-231, 1974",
    ),
    "sprites": Facts(
        _sprites,
        rows=768,
        columns=256,
        kind="binary",
        description="a square, an ellipse or a heart of 4 sizes at 8 x 8 places, one image of 16 x 16 pixels for each "
        "combination of these factors; labels: the shape",
        source="drawn by elbozoo; after L. Matthey et al., dSprites: Disentanglement testing Sprites dataset, 2017",
        image_shape=(SIDE, SIDE),
        top=1.0,
    ),
    "mnist": _MNIST,
    "fashion-mnist": _FASHION_MNIST,
}
NAMED = _RAW | {name + STANDARDISED: _standardised(facts) for name, facts in _RAW.items() if facts.kind == "continuous"}
