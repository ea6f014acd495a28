"""What comes after the runs: what goes wrong, exercises, references."""

from __future__ import annotations

import re
from collections.abc import Iterator

from elbozoo.citations import reference_lines
from elbozoo.guides.registry import guide_names
from elbozoo.inference.fit import provenance as versions_in_use
from elbozoo.models.contract.entry import HasPosterior
from elbozoo.notebook.cells import Code, Text
from elbozoo.tutorials.subject import Subject

# A fence at the margin whose language is Python; what it holds is run.
RUNNABLE = re.compile(r"^```python\n(.*?)^```[ ]*$", flags=re.MULTILINE | re.DOTALL)


def failures(s: Subject) -> list[Text | Code]:
    """Return what goes wrong: the entry's prose, with its blocks of Python as cells that run."""
    prose = s.parts.failures
    if not prose:
        return []
    cells: list[Text | Code] = [Text("## What goes wrong")]
    # What was captured stands at the odd positions.
    for position, part in enumerate(RUNNABLE.split(prose)):
        if part.strip():
            cells.append(Code(part) if position % 2 else Text(part))
    return cells


def exercises(s: Subject) -> list[Text | Code]:
    """Return questions that the reader can answer with this page's code."""
    listed = "\n".join(f"{i}. {text}" for i, text in enumerate(_exercises(s), start=1))
    return [Text(f"## Exercises\n\n{listed}")]


def references(s: Subject) -> list[Text | Code]:
    """Return the references, to be read and to be copied."""
    bibtex = s.parts.references
    if not bibtex:
        return []
    lines = "\n".join(f"- {line}" for line in reference_lines(bibtex))
    if not lines:
        return [Text(f"## References\n\n{bibtex}")]
    return [Text(f"## References\n\n{lines}\n\nThe same as BibTeX:\n\n{bibtex}")]


def provenance(s: Subject) -> list[Text | Code]:
    """Return with what the page was made."""
    versions = versions_in_use()
    made_with = ", ".join(f"{name} {versions[name]}" for name in ("elbozoo", "torch", "pyro-ppl", "numpy", "python"))
    text = f"Made with {made_with}; with these versions the run repeats to the last digit on the same machine."
    return [Text(f"---\n\n{text}")]


def _exercises(s: Subject) -> Iterator[str]:
    if s.place is None:
        yield (
            f"`ez.list_guides('{s.model}')` says which guides fit. Give some of them to "
            "`ez.compare(..., methods=[...])`: which gap changes with the family, and which with the source?"
        )
    else:
        names = ", ".join(f"`{name}`" for name in guide_names(s.entry)[:6])
        yield (
            f"Guides such as {names} fit. Give some of them to `ez.compare(program, data, methods=[...])`: which gap "
            "changes with the family, and which with the source?"
        )
    # Where the model has an option of that name too, it would change with the encoder.
    has_own = "hidden" in type(s.entry).Options.model_fields
    if not has_own and any(name.startswith("amortized") for name in guide_names(s.entry)):
        yield "Give `guide='amortized'` an encoder of `hidden=2` units, then one of 64: which gap pays for the first?"
    if isinstance(s.entry, HasPosterior):
        yield "Show that log p(x) − ELBO = KL(q ‖ posterior), and find the two figures of the ledger that must agree."
    sizes = [option["option"] for option in type(s.entry).Options.describe() if option["type"] == "int"]
    if sizes:
        yield (
            f"Fit `{sizes[0]}=1`, and then more. Can log p(x) of the rows of the fit fall, and that of new rows, "
            "`fit.log_evidence(x)`?"
        )
    yield "Fit ten times as many rows with the same settings: which figures per datum stay as they are, and why?"
