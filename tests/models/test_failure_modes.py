"""What every entry says goes wrong: prose, and blocks of code that the tutorials execute.

The blocks run in ``tests/elbozoo/test_tutorials.py``, as cells of the entry's page; here is what they must look like.
"""

from __future__ import annotations

import ast
import builtins
import re

import pytest

from elbozoo.models.contract.registry import entry_names, get_entry
from elbozoo.pages import page_parts

GIVEN = {"ez", "torch", "plt"}  # what a page has imported before the blocks
MOST_BLOCKS, SHORTEST, LONGEST = 3, 4, 14
WIDEST = 88  # characters, which a phone shows without breaking lines


def blocks_of(failures: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", failures, flags=re.MULTILINE | re.DOTALL)


def faults(block: str, known: set[str]) -> list[str]:
    """What is wrong with a block, given the names that stand before it; ``known`` gets those that it adds."""
    tree, lines = ast.parse(block), block.splitlines()
    found = [f"a line of {len(line)} characters" for line in lines if len(line) > WIDEST]
    if not SHORTEST <= len(lines) <= LONGEST:
        found.append(f"{len(lines)} lines")
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    known |= {node.id for node in names if isinstance(node.ctx, ast.Store)} | _imported_or_caught(tree)
    found += [f"the name {node.id}" for node in names if node.id not in known | GIVEN | set(vars(builtins))]
    claims = [node.test for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    if not any(isinstance(part, ast.Name) for claim in claims for part in ast.walk(claim)):
        found.append("no claim about its figures")
    return found


def _imported_or_caught(tree: ast.AST) -> set[str]:
    nodes = list(ast.walk(tree))
    imports = [alias for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for alias in n.names]
    imported = {(alias.asname or alias.name).split(".")[0] for alias in imports}
    return imported | {n.name for n in nodes if isinstance(n, ast.ExceptHandler) and n.name}


@pytest.mark.parametrize("name", entry_names())
def test_an_entry_shows_what_goes_wrong(name: str) -> None:
    failures = page_parts(get_entry(name).page()).failures
    blocks = blocks_of(failures)
    assert 1 <= len(blocks) <= MOST_BLOCKS
    assert failures.count("```") == 2 * len(blocks), "a fence that is not closed, or of another language"
    known: set[str] = set()
    assert [faults(block, known) for block in blocks] == [[] for _ in blocks]


@pytest.mark.parametrize("name", entry_names())
def test_each_failure_has_a_name(name: str) -> None:
    failures = page_parts(get_entry(name).page()).failures
    assert re.search(r"^\*{1,2}[A-Z][^*\n]+\*", failures, flags=re.MULTILINE)


GOOD = """rows = torch.randn(10, 2)
total = float(rows.sum())
print(f"total {total:.2f}")
assert total < 100
"""


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        (GOOD, []),
        (GOOD.replace("assert total < 100", "print(total)"), ["no claim about its figures"]),
        (GOOD.replace("assert total < 100", "assert 1 < 100"), ["no claim about its figures"]),
        (GOOD.replace("float(rows.sum())", "float(data.sum())"), ["the name data"]),
        (
            GOOD.replace("10, 2)", "10, 2)" + " " * 80),
            ["a line of 105 characters"],
        ),
        (GOOD * 4, ["16 lines"]),
    ],
)
def test_a_block_that_claims_nothing_or_needs_more_is_found(changed: str, fault: list[str]) -> None:
    assert faults(changed, set()) == fault
