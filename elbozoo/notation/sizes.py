"""Shapes in letters: which dimension of an entry's tensors is N, D or K.

A letter is found by its number. The entry is built a second time, its sizes set to numbers of which no two are alike,
nor any sum of two of them, so that a dimension of 7 is K wherever it stands; an entry of one's own needs no list.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry, Program
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.regression import RegressionEntry
from elbozoo.models.contract.sequences import StackedEntry
from elbozoo.models.contract.sites import OBSERVED_SITE

ROWS, STEPS, COLUMNS, HIDDEN, OTHERS = 17, 13, 23, 31, (3, 7, 19, 37)
# Sizes whose options do not name a letter.
LETTERS = {"hidden": "H", "group_dim": "Ku", "row_dim": "Kv", "categories": "C"}
MEANINGS = {
    "N": ("`len(x)`", "number of rows"),
    "S": ("`len(x)`", "number of {0}s"),
    "T": ("`x.shape[1]`", "number of {1}s of a {0}, the longest one's"),
    "D": ("`columns`", "number of columns"),
    "P": ("`design(x).shape[1]`", "number of coefficients, the intercept's among them"),
}


@dataclass(frozen=True)
class Sizes:
    """An entry beside one of telling sizes.

    Attributes
    ----------
    meanings : dict
        For each letter its name in the code, as Markdown, and what it is.
    entry, probe : Entry
        The entry, and the one of telling sizes.
    letters : dict
        Letters of the probe's sizes.
    values, probe_values : dict of Tensor
        The sites of each, and what it conditions on, by name, on ``ROWS`` rows of its own.
    """

    meanings: dict[str, tuple[str, str]]
    entry: Entry
    probe: Entry
    letters: dict[int, str]
    values: Mapping[str, Tensor] = field(default_factory=dict)
    probe_values: Mapping[str, Tensor] = field(default_factory=dict)

    def of_site(self, name: str) -> str:
        """Return the shape of the site ``name``, or of what the program conditions on."""
        return self._text(self.values[name].shape, self.probe_values[name].shape)

    def of_attribute(self, name: str) -> list[str]:
        """Return the shape of the attribute ``name``, or those of all parameters, or else buffers, of a module."""
        real, probed = _tensors(self.entry, name), _tensors(self.probe, name)
        # A module may have more of them in an entry of more columns: then there are no letters.
        pairs = zip(real, probed if len(probed) == len(real) else real, strict=True)
        return [self._text(tensor.shape, telling.shape) for tensor, telling in pairs]

    def of_values(self, name: str) -> str | None:
        """Return how many values the site ``name`` takes, None where they are not finitely many."""
        sites = {site.name: site.cardinality for site in self.probe.latent_sites()}
        number = sites.get(name) or sites.get(f"{name}_unobserved")
        return None if number is None else self.letters.get(number, str(number))

    def renamed(self, letter: str, other: str) -> Sizes:
        """Return the sizes with the ``other`` letter in place of ``letter``."""
        letters = {number: other if text == letter else text for number, text in self.letters.items()}
        meanings = {other if name == letter else name: meaning for name, meaning in self.meanings.items()}
        return replace(self, letters=letters, meanings=meanings)

    def _text(self, real: torch.Size, probed: torch.Size) -> str:
        dims = [self._letter(number, telling) for number, telling in zip(real, probed, strict=True)]
        return f"({dims[0]},)" if len(dims) == 1 else f"({', '.join(dims)})"

    def _letter(self, real: int, probed: int) -> str:
        return self.letters.get(probed, str(real))


def sizes_of(entry: Entry) -> Sizes:
    """Return what the shapes of ``entry`` are made of.

    Where an entry of telling sizes cannot be built, as for a user's program, dimensions other than that of the rows
    stay numbers.
    """
    options = _size_options(entry)
    try:
        probe = _probe(entry, options)
    except InvalidInput:
        probe, options = entry, []
    values, probe_values = _values(entry), _values(probe)
    known = {**_data_letters(probe, probe_values), **_option_letters(options)}
    meanings = {
        **{letter: _meaning(probe, number, letter) for number, letter in known.items() if letter in MEANINGS},
        **{letter: (f"option `{o.name}`", o.meaning) for o in options for letter in o.letters},
    }
    return Sizes(meanings, entry, probe, _with_sums(known), values, probe_values)


# ---- the entry of telling sizes --------------------------------------------------------------------------------------


class _SizeOption(NamedTuple):
    """An option that sets sizes: their letters, their numbers in the probe, and what they are."""

    name: str
    letters: list[str]
    numbers: list[int]
    meaning: str

    @property
    def value(self) -> int | str:
        """The option as the probe has it: a number, or a list of numbers as text."""
        return self.numbers[0] if len(self.letters) == 1 else ",".join(map(str, self.numbers))


def _size_options(entry: Entry) -> list[_SizeOption]:
    """Return the options of ``entry`` that state a size which it has, with a number of its own for each."""
    unused, found = iter(OTHERS), []
    for option in type(entry).Options.describe():
        name, meaning = option["option"], re.split(";|, such as", option["description"])[0]
        # What the options leave open is an attribute of the entry.
        value = getattr(entry, name, None)
        value = value if isinstance(value, int | tuple) else getattr(entry.options, name)
        if isinstance(value, tuple):
            letters = [f"K_{level}" for level in range(1, len(value) + 1)]
            found.append(_SizeOption(name, letters, list(itertools.islice(unused, len(value))), meaning))
        elif option["type"].startswith("int") and isinstance(value, int) and (letter := _letter(name, meaning)):
            number = HIDDEN if name == "hidden" else next(unused)
            found.append(_SizeOption(name, [letter], [number], meaning.replace(f" {letter} of ", " of ")))
    return found


def _letter(option: str, description: str) -> str | None:
    stated = re.match(r"(?:number|dimension) ([A-Z]) of ", description)
    return stated[1] if stated else LETTERS.get(option)


def _probe(entry: Entry, options: list[_SizeOption]) -> Entry:
    if isinstance(entry, Program):
        raise InvalidInput("found a program, which cannot be built a second time; expected an entry")
    stated = {**entry.options.model_dump(exclude_none=True), **{option.name: option.value for option in options}}
    # The number of columns of an image is its height times its width.
    columns = COLUMNS if entry.image_shape is None else entry.columns
    return type(entry).example(columns, **stated)


def _values(entry: Entry) -> dict[str, Tensor]:
    x = entry.simulate(ROWS, seed=0, steps=STEPS)[0] if isinstance(entry, StackedEntry) else entry.simulate(ROWS, 0)[0]
    with isolated(0), torch.no_grad(), pyro.settings.context(validate_poutine=False):
        trace = poutine.trace(entry).get_trace(Batch.full(x))
    return {**entry.constant_data(x), **{n: v["value"] for n, v in trace.nodes.items() if v["type"] == "sample"}}


def _tensors(entry: Entry, name: str) -> list[Tensor]:
    value = attrgetter(name)(entry)
    if isinstance(value, nn.Module):
        return list(value.parameters()) or list(value.buffers())
    return [value] if isinstance(value, Tensor) else []


# ---- letters ---------------------------------------------------------------------------------------------------------


def _data_letters(probe: Entry, values: Mapping[str, Tensor]) -> dict[int, str]:
    if isinstance(probe, StackedEntry):
        return {ROWS: "S", STEPS: "T", probe.columns: "D"}
    if isinstance(probe, Program):
        return {ROWS: "N"}
    if isinstance(probe, RegressionEntry):
        return {ROWS: "N", values["design"].shape[1]: "P"}
    observed = values[OBSERVED_SITE]
    return {ROWS: "N", observed.shape[-1] if observed.ndim > 1 else probe.columns: "D"}


def _option_letters(options: list[_SizeOption]) -> dict[int, str]:
    return {number: letter for option in options for letter, number in zip(option.letters, option.numbers, strict=True)}


def _with_sums(known: dict[int, str]) -> dict[int, str]:
    """Add what networks have for dimensions: the sum of two sizes, and twice a size or their product."""
    others = {number: letter for number, letter in known.items() if letter not in "NST"}
    pairs = list(itertools.combinations(others.items(), 2))
    return {
        **{2 * number: f"2{letter}" for number, letter in others.items()},
        **{a * b: f"{first}{second}" for (a, first), (b, second) in pairs},
        **{a + b: f"{first} + {second}" for (a, first), (b, second) in pairs},
        **known,
    }


def _meaning(probe: Entry, number: int, letter: str) -> tuple[str, str]:
    if letter == "D" and number != probe.columns:
        return "`len(explained)`", "number of columns that are explained"
    name, meaning = MEANINGS[letter]
    dims = probe.stack_dims if isinstance(probe, StackedEntry) else ("", "")
    return name, meaning.format(*dims)
