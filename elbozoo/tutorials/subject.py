"""What a page is about: a model, a guide, data, and the settings with which it runs in time."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from elbozoo.guides.registry import ALL_NAMES, GuideCard, guide_cards
from elbozoo.inference.method import (
    default_guide,
    default_methods,
    method_names,
    plan,
    resolve_method,
    schemas_of,
    schemas_of_method,
)
from elbozoo.models.contract.entry import Entry, SupportsEM
from elbozoo.models.contract.entry import Program as UserProgram
from elbozoo.models.contract.errors import InvalidInput, unknown_name
from elbozoo.models.contract.registry import get_entry
from elbozoo.models.contract.sequences import SequenceEntry
from elbozoo.models.contract.sites import LatentSite
from elbozoo.pages import PageParts, page_parts
from elbozoo.programs import Place, is_place, load_program, parse, place_of
from elbozoo.tutorials.sources import Source, source_of


class Effort(NamedTuple):
    """How much a page computes.

    Attributes
    ----------
    rows : int
        Rows of simulated data.
    seeds : int
        Seeds of the comparison.
    steps : int
        Steps of variational inference.
    sequence_rows, sequence_steps : int
        Both where a step runs over time, which takes as much longer.
    draws : int
        Draws of q and of a posterior.
    em_iterations, em_restarts : int
        Of EM in closed form.
    """

    rows: int = 200
    seeds: int = 2
    steps: int = 1000
    sequence_rows: int = 60
    sequence_steps: int = 300
    draws: int = 2000
    em_iterations: int = 200
    em_restarts: int = 3


@dataclass(frozen=True)
class Subject:
    """A model and a guide, with what the page can show of them.

    Attributes
    ----------
    model : str
        Name of the entry, or of the program of the user's.
    place : Place or None
        Where that program is.
    program : callable or None
        The program, unless an entry of the zoo.
    guide : str
        As it was asked for.
    entry : Entry
        The model as it starts on the data.
    card : GuideCard
        Canonical name, family and source of the guide.
    methods : list of str
        Methods that the page compares, the guide among them.
    source : Source
        The data.
    x : Tensor
        Its rows as the entry arranges them.
    options : dict
        Options that the user gave.
    folder : Path
        Where the page will be: its code runs there.
    effort : Effort
        How much is computed.
    """

    model: str
    place: Place | None
    program: Any
    guide: str
    entry: Entry
    card: GuideCard
    methods: list[str]
    source: Source
    x: torch.Tensor
    options: dict[str, Any]
    folder: Path
    effort: Effort

    @classmethod
    def of(
        cls,
        model: Any,
        page: Path,
        *,
        guide: str | None = None,
        data: Any = None,
        options: Mapping[str, Any] | None = None,
        effort: Effort = Effort(),  # noqa: B008  a named tuple cannot change
    ) -> Subject:
        """Look up all of it and check that it goes together.

        Raises
        ------
        InvalidInput
            For anything unknown, out of range, or that does not fit together.
        """
        place, program = _program(model)
        options = dict(options or {})
        if place is None:
            get_entry(model)
        source = source_of(model if place is None else program, place, data, page, options, effort)
        found = model if place is None else program
        if guide is not None and guide not in ALL_NAMES:
            raise unknown_name("guide", guide, ALL_NAMES)
        # All that the user gave is checked here; what the page adds for speed is known to fit.
        ready = plan(found, source.rows.x, guide, options, source.rows.columns)
        entry = ready.entry
        options = _typed(options, entry)
        guide = default_guide(entry) if guide is None else guide
        (card,) = [card for card in guide_cards(entry) if card.name == ready.method]
        methods = default_methods(entry)
        if card.name not in [resolve_method(method, entry) for method in methods]:
            methods.append(guide)
        name = model if place is None else place.name
        return cls(name, place, program, guide, entry, card, methods, source, ready.x, options, page.parent, effort)

    @property
    def call(self) -> str:
        """The model as the page's code spells it."""
        return f'"{self.model}"' if self.place is None else "program"

    @property
    def is_bare(self) -> bool:
        """Whether the model is a program with no capability beyond running."""
        return isinstance(self.entry, UserProgram)

    @property
    def parts(self) -> PageParts:
        """The entry's page; for a program the docstring of its function."""
        if self.is_bare:
            story = inspect.cleandoc(getattr(self.program, "__doc__", None) or "")
            return page_parts(story or f"The program {self.model}")
        return page_parts(self.entry.page())

    @property
    def sites(self) -> list[LatentSite]:
        """The latent sites."""
        return self.entry.latent_sites() if not self.is_bare else self.entry.latent_sites(self.source.rows.x)

    @property
    def latent_numbers(self) -> int:
        """Latent numbers outside the plate of the data; how many there are may depend on the rows."""
        return sum(site.dim for site in self.entry.latent_sites(self.x) if not site.is_local)

    @property
    def learns(self) -> bool:
        """Whether there is a θ to learn."""
        return any(parameter.requires_grad for parameter in self.entry.parameters())

    @property
    def has_evidence(self) -> bool:
        """Whether p(x) exists: not where a prior is flat."""
        return all(site.is_proper for site in self.sites)

    @property
    def settings(self) -> dict[str, Any]:
        """Options with which the page runs in under a minute; what the user gave goes before."""
        is_sequence = isinstance(self.entry, SequenceEntry)
        steps = min(self.effort.steps, self.effort.sequence_steps) if is_sequence else self.effort.steps
        quick = {"steps": steps, "learning_rate": self._learning_rate(), "schedule": "cosine"}
        return quick | {name: value for name, value in self.options.items() if name not in self._em_names}

    @property
    def em_settings(self) -> dict[str, Any]:
        """Options with which EM, if the page compares it, ends in time."""
        if "em" not in self.methods:
            return {}
        given = {name: value for name, value in self.options.items() if name in self._em_names}
        if isinstance(self.entry, SupportsEM):
            return {"iterations": self.effort.em_iterations, "restarts": self.effort.em_restarts} | given
        # A step of Monte Carlo EM costs more where there are several latents.
        return {"iterations": self.effort.steps // (10 if len(self.sites) == 1 else 40)} | given

    @property
    def _em_names(self) -> set[str]:
        """Options that EM alone reads."""
        if "em" not in method_names(self.entry):
            return set()
        of_em = {name for schema in schemas_of_method("em", self.entry) for name in schema.model_fields}
        of_guides = {name for schema in schemas_of_method(self.card.name, self.entry) for name in schema.model_fields}
        return of_em - of_guides

    def _learning_rate(self) -> float:
        """Return the step size that gets far in so few steps: small for networks, large for a single q."""
        sites = self.sites
        if isinstance(self.entry, SequenceEntry) or self.entry.dtype == torch.float32 or self.is_bare:
            return 0.02
        if not sites[0].is_local:
            return 0.2
        return 0.1 if sites[0].is_discrete else 0.05


def _typed(options: Mapping[str, Any], entry: Entry) -> dict[str, Any]:
    """Return options that came as text, as those of the command line do, in the types that their schemas declare."""
    schemas = (type(entry.options), *schemas_of(entry))
    found = {}
    for name, value in options.items():
        schema = next(schema for schema in schemas if name in schema.model_fields)
        typed = getattr(schema.parse({name: value}), name) if isinstance(value, str) else value
        found[name] = typed if isinstance(typed, bool | int | float) else value
    return found


def _program(model: Any) -> tuple[Place | None, Any]:
    """Return where a program of the user's is, and itself; nothing for an entry of the zoo."""
    if isinstance(model, str):
        return (parse(model), load_program(model)) if is_place(model) else (None, None)
    if isinstance(model, type) and issubclass(model, Entry) and model.__module__.startswith("elbozoo.models."):
        raise InvalidInput(f"found the class {model.__name__}, expected its name; pass {model.name()!r}")
    return place_of(model), model
