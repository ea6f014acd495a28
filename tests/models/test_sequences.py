"""Sequences in a table: arranged, padded, and brought back in the order of the rows; columns in roles."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.options import Column, Field, Options
from elbozoo.models.contract.sequences import (
    SequenceEntry,
    SequenceOptions,
    by_row,
    lengths,
    observations,
    steps_mask,
)

# Interleaved rows of three sequences, 7, 2 and 9, of lengths 3, 1 and 2; the key stands in the middle.
TABLE = torch.tensor(
    [[10.0, 7, 100], [11, 2, 110], [12, 7, 120], [13, 9, 130], [14, 7, 140], [15, 9, 150]], dtype=torch.float64
)


def arranged(key: int | str | None = 1) -> Tensor:
    options = SequenceOptions.parse({"sequence": key}).at_positions(["a", "who", "b"])
    return SequenceEntry.arrange(TABLE, options)


@pytest.mark.parametrize("key", [1, "who", -2])
def test_rows_become_sequences_in_order_of_appearance(key: int | str) -> None:
    x = arranged(key)
    assert x.shape == (3, 3, 3)
    assert lengths(x).tolist() == [3, 1, 2]
    assert x[..., 0].tolist() == [[1, 3, 5], [2, 0, 0], [4, 6, 0]]
    assert observations(x)[0].tolist() == [[10, 100], [12, 120], [14, 140]]
    assert (x[~steps_mask(x)] == 0).all()
    assert SequenceEntry.count(x) == len(TABLE) and SequenceEntry.width(x) == 2


def test_without_a_key_the_table_is_one_sequence() -> None:
    x = arranged(None)
    assert x.shape == (1, 6, 4)
    assert torch.equal(observations(x)[0], TABLE)


def test_what_is_arranged_comes_back_unchanged() -> None:
    x = arranged()
    assert SequenceEntry.arrange(x, SequenceOptions()) is x


def test_values_of_steps_come_back_in_the_order_of_the_table() -> None:
    """The first observed column, sent there and back; the order of the sequences would be another one."""
    x = arranged()
    assert by_row(x, observations(x)[..., 0]).tolist() == TABLE[:, 0].tolist()
    assert observations(x)[..., 0][steps_mask(x)].tolist() != TABLE[:, 0].tolist()


def test_names_lose_the_key() -> None:
    entry = SequenceEntry(SequenceOptions(sequence=1), 2)
    entry.table_names = ("a", "who", "b")
    assert entry.names == ("a", "b") and list(entry.key_columns()) == ["who"]
    assert SequenceEntry(SequenceOptions(), 3).names == ("x0", "x1", "x2")


# ---- columns in roles ------------------------------------------------------------------------------------------------


class Roles(Options):
    target: Column = Field(-1, description="target")
    other: Column | None = Field(None, description="another")
    size: ClassVar[int] = 3


NAMES = ["a", "b", "c"]


@pytest.mark.parametrize(("given", "position"), [("b", 1), (0, 0), (-1, -1)])
def test_columns_become_positions(given: int | str, position: int) -> None:
    assert Roles.parse({"target": given}).at_positions(NAMES).target == position


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "bb"}, "unknown column in option target 'bb'"),
        ({"target": 3}, "found position 3"),
        ({"target": "c", "other": -1}, "found column 'c' for both"),
    ],
)
def test_columns_that_are_not_there_are_refused(options: dict[str, int | str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Roles.parse(options).at_positions(NAMES)


def test_an_option_that_names_a_column_says_so() -> None:
    assert [row["type"] for row in Roles.describe()] == ["column", "column | none"]
    assert SequenceOptions.column_roles()["sequence"].is_key
