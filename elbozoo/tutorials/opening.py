"""What a page says before anything runs: the story, the picture, the notation, the program and the guide."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

from elbozoo.guides.autoguides import AUTOGUIDES
from elbozoo.guides.families import FAMILIES
from elbozoo.guides.registry import WHOLE_GUIDES
from elbozoo.guides.sources import SOURCES
from elbozoo.models.contract.entry import HasPosterior
from elbozoo.notation import notation_table
from elbozoo.notebook.cells import Code, Text
from elbozoo.pages import code_block, options_table
from elbozoo.programs import spelled
from elbozoo.tutorials.subject import Subject

IMPORTS = """
import matplotlib.pyplot as plt
import torch

import elbozoo as ez

plt.style.use("tableau-colorblind10")
"""


def introduction(s: Subject) -> list[Text | Code]:
    """Return title, story and imports."""
    what = f"the model `{s.model}`" if s.place is None else f"the program `{s.place.seen_from(s.folder)}`"
    note = (
        f"This page is about {what} with the guide `{s.guide}`. Its numbers and pictures, those in its sentences too, "
        "come from a run of its own code."
    )
    load = "" if s.place is None else f"program = ez.load_program({spelled(s.place.seen_from(s.folder))})"
    return [Text(f"# {s.parts.title}\n\n{note}\n\n{s.parts.story}"), Code(IMPORTS + load)]


def diagram(s: Subject) -> list[Text | Code]:
    """Return the plate diagram and the table of symbols."""
    table = notation_table(s.entry)
    told = ", data" if s.is_bare else ""
    caption = (
        f"The plate diagram of `{s.model}`, drawn from its program: what is observed is shaded, and a plate stands for "
        "as many copies as it says."
    )
    cells: list[Text | Code] = [
        Text("## The model as a picture"),
        Code(f"ez.render_model({s.call}{told})", alt=_diagram_alt(s), caption=caption),
    ]
    if table:
        cells.append(Text(f"## Notation\n\nThe symbols, and what they are called in the code:\n\n{table}"))
    return cells


def _diagram_alt(s: Subject) -> str:
    local = [site.name for site in s.sites if site.is_local]
    shared = [site.name for site in s.sites if not site.is_local]
    latents = [
        *([f"latent {', '.join(shared)} outside the plate of the data"] if shared else []),
        *(
            [f"latent {', '.join(local)} inside it" if shared else f"latent {', '.join(local)} for each datum"]
            if local
            else []
        ),
    ]
    return f"Plate diagram: {' and '.join(latents) or 'no latent'}; the observed x is shaded"


def program(s: Subject) -> list[Text | Code]:
    """Return the source of the program, and its options."""
    cls = type(s.entry)
    if s.is_bare:
        return [Text(f"## The program\n\n{_source_of(_written(s.program))}")]
    told = f"The same as a Pyro program, a method of `{cls.__name__}`:"
    table = options_table(cls.Options)
    options = f"\n\nIts options:\n\n{table}" if table else ""
    return [Text(f"## The program\n\n{told}\n\n{_source_of(cls.forward)}{options}")]


def _written(program: Any) -> Any:
    """Return the function or class that a reader has to see."""
    return program if inspect.isfunction(program) else type(program)


def guide(s: Subject) -> list[Text | Code]:
    """Return what the guide is, and its source."""
    return [Text("\n\n".join(["## The guide", *_guide_texts(s)]))]


def _guide_texts(s: Subject) -> list[str]:
    name, family, source = f"`{s.card.name}`", s.card.family, s.card.source
    if isinstance(s.entry, HasPosterior) and source == "exact":
        return [
            f"The guide {name} is the posterior itself, which this model knows: its bound is the evidence.",
            _source_of(s.entry.posterior),
        ]
    if source == "global":
        return [
            f"There is one latent for the whole data set, so there is one q, and nothing to amortize. Pyro makes the "
            f"guide {name} from the program:",
            code_block(inspect.getsource(AUTOGUIDES[s.card.name]).strip().rstrip(","), "python"),
        ]
    whole = next((guide for guide in WHOLE_GUIDES if s.card.name == guide.NAME), None)
    if whole is not None:
        return [
            f"The guide {name} is not a product of one family: {_summary_of(whole)}",
            _source_of(whole.conditionals),
        ]
    return [
        f"The guide {name} is a family fed by a source. The family, `{family}`, decides how close q can come to the "
        f"posterior at best: that is the approximation gap. The source, `{source}`, decides where the q of each datum "
        "has its parameters from: that is the amortization gap.",
        f"Family `{family}`: {_summary_of(FAMILIES[family])}",
        _source_of(FAMILIES[family].distribution),
        f"Source `{source}`: {_summary_of(SOURCES[source])}",
        _source_of(SOURCES[source].forward),
    ]


def _source_of(function: Any) -> str:
    return code_block(textwrap.dedent(inspect.getsource(function)).strip(), "python")


def _summary_of(documented: Any) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]
