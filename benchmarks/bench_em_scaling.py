"""What an EM iteration of a Gaussian mixture costs per row and component, as these grow: ours beside ours.

The cost is linear if more of either costs no more apiece. The ratio is the cost apiece of the smaller job by that of
the larger one, and 1 / 1.2 leaves room for 20 %. Less apiece, where what is done once counts for less, is no fault.
"""

from __future__ import annotations

import sys
from typing import Any

from harness import Agreement, Contest, Job, Outcome, Side, em_iterations, main, marginal

COLUMNS = 10
KINDS = ("full", "diagonal")
ROWS = {"small": (10_000, [100_000]), "full": (10_000, [100_000, 1_000_000]), "tiny": (500, [1_000])}
COMPONENTS = {"small": (5, [20]), "full": (5, [10, 20, 40]), "tiny": (2, [4])}
ROWS_OF_COMPONENTS = {"small": 50_000, "full": 100_000, "tiny": 1_000}
COMPONENTS_OF_ROWS = 10
PASSES = {"small": 4_000_000, "full": 40_000_000, "tiny": 40_000}  # rows times components that the clock sees
TARGET = 1 / 1.2
AGREEMENT = Agreement("nothing to agree on: the two are different jobs", absolute=float("inf"))


def contests(size: str, device: str) -> list[Contest]:
    """Return growth in rows and in components, for each kind of covariance."""
    first_rows, more_rows = ROWS[size]
    first, more = COMPONENTS[size]
    rows = ROWS_OF_COMPONENTS[size]
    steps = [("rows", (first_rows, COMPONENTS_OF_ROWS), (n, COMPONENTS_OF_ROWS)) for n in more_rows]
    steps += [("components", (rows, first), (rows, components)) for components in more]
    return [_contest(kind, *step, PASSES[size]) for kind in KINDS for step in steps]


def _contest(kind: str, grows: str, small: tuple[int, int], large: tuple[int, int], passes: int) -> Contest:
    axis = ("rows", "components").index(grows)
    return Contest(
        name=f"{kind}-{grows}-{large[axis]}",
        peer=f"itself at {small[axis]:,} {grows}",
        packages=("elbozoo",),
        sizes={"covariance": kind, "rows": large[0], "components": large[1], "columns": COLUMNS},
        target=TARGET,
        sides=lambda: (_side(kind, *large, passes), _side(kind, *small, passes)),
        agreement=AGREEMENT,
        unit="row and component",
    )


def _side(kind: str, rows: int, components: int, passes: int) -> Side:
    import torch

    from elbozoo.models import get_entry

    options: dict[str, Any] = {"components": components, "covariance": kind}
    # In noise without groups EM goes on for long.
    x = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    entry = get_entry("gaussian-mixture").from_data(x[:500], **options)
    start = {name: value.clone() for name, value in entry.state_dict().items()}
    cells = rows * components

    def run(iterations: int) -> float:
        entry.load_state_dict(start)
        return em_iterations(entry, x, iterations) / rows

    clocked = marginal(run, max(2, passes // cells))

    def side() -> Outcome:
        outcome = clocked()
        return outcome._replace(cost=outcome.cost / cells)

    return side


JOB = Job("em-scaling", "Cost of EM in rows and components", contests)

if __name__ == "__main__":
    sys.exit(main(JOB))
