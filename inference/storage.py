"""Fits on disk: JSON for what people read, safetensors for parameters, CSV for the trajectory; never pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from elbozoo.guides.base import Guide, GuideOptions
from elbozoo.guides.conjugate import ConjugateGuide
from elbozoo.guides.draws import DrawsGuide
from elbozoo.guides.registry import build_guide
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry, Program
from elbozoo.models.contract.errors import InvalidInput
from elbozoo.models.contract.isolation import isolated
from elbozoo.models.contract.registry import get_entry
from elbozoo.models.contract.sequences import StackedEntry

if TYPE_CHECKING:
    from elbozoo.inference.fit import Fit

FORMAT = 3
CARD, MODEL, GUIDE, TRAJECTORY = "fit.json", "model.safetensors", "guide.safetensors", "trajectory.csv"
VALIDATION = "validation.csv"  # where validation rows were asked for


def save_fit(fit: Fit, directory: str | Path) -> Path:
    """Write ``fit`` to ``directory``, which is made if need be, and return it.

    Raises
    ------
    InvalidInput
        For a program of the user's, which only its own code can rebuild, or a directory that cannot be written.
    """
    if isinstance(fit.entry, Program):
        raise InvalidInput(
            "found a program of your own, expected an entry of the zoo: save fit.entry.state_dict() beside your code"
        )
    folder = writable_directory(directory)
    save_file(_tensors(fit.entry), folder / MODEL)
    save_file(_tensors(fit.guide), folder / GUIDE)
    fit.trajectory.to_csv(folder / TRAJECTORY, index=False)
    (folder / VALIDATION).unlink(missing_ok=True)  # what an earlier fit left there is not of this one
    if fit.validation is not None:
        fit.validation.to_csv(folder / VALIDATION, index=False)
    (folder / CARD).write_text(json.dumps(_card(fit), indent=2) + "\n", encoding="utf-8")
    return folder


def read_fit(directory: str | Path) -> dict[str, Any]:
    """Read what :func:`save_fit` wrote: the fields of a fit, by name, without its data.

    Raises
    ------
    InvalidInput
        If the directory holds no fit, or one that is damaged or of another format.
    """
    folder = Path(directory)
    for name in (CARD, MODEL, GUIDE, TRAJECTORY):
        if not (folder / name).is_file():
            raise InvalidInput(f"{folder}: found no file {name}, expected a directory written by Fit.save")
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        if card["format"] != FORMAT:
            raise InvalidInput(
                f"{folder}: found a fit of format {card['format']}, expected {FORMAT}: fit again with this version"
            )
        return _restore(card, folder)
    except InvalidInput:
        raise
    except (KeyError, SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"{folder}: the saved fit is damaged ({str(error).splitlines()[0]}); expected files as Fit.save wrote them"
        ) from None


def writable_directory(directory: str | Path) -> Path:
    """Make ``directory`` if need be and return it.

    Raises
    ------
    InvalidInput
        If it cannot be made or written to.
    """
    folder = Path(directory)
    probe = folder / ".elbozoo-write-test"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InvalidInput(
            f"output directory {folder}: {error.strerror or error}; choose one that can be written to"
        ) from None
    return folder


def _card(fit: Fit) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": fit.model,
        "method": fit.method,
        "guide": fit.guide.name,
        "objective": fit.objective,
        "seed": fit.seed,
        "shape": list(fit.shape),
        "columns": fit.entry.columns,
        "names": list(fit.entry.table_names),
        "levels": fit.entry.levels,
        "model_options": fit.entry.options.model_dump(),
        "guide_options": fit.guide_options.model_dump(),
        "options": fit.options,
        "seconds": fit.seconds,
        "converged": fit.converged,
        "interrupted": fit.interrupted,
        "notes": fit.notes,
        "provenance": fit.provenance,
    }


def _restore(card: dict[str, Any], folder: Path) -> dict[str, Any]:
    entry_class = get_entry(card["model"])
    entry = entry_class(entry_class.Options.parse(card["model_options"]), card["columns"]).double()
    entry.load_state_dict(load_file(folder / MODEL))
    guide_options = GuideOptions.parse(card["guide_options"])
    entry.table_names, entry.levels = tuple(card["names"]), card["levels"]
    guide = _restore_guide(card["guide"], entry, tuple(card["shape"]), guide_options, load_file(folder / GUIDE))
    kept = (
        "model",
        "method",
        "seed",
        "objective",
        "seconds",
        "converged",
        "interrupted",
        "options",
        "notes",
        "provenance",
    )
    return {
        **{key: card[key] for key in kept},
        "shape": tuple(card["shape"]),
        "entry": entry,
        "guide": guide,
        "guide_options": guide_options,
        "trajectory": pd.read_csv(folder / TRAJECTORY),
        "validation": pd.read_csv(folder / VALIDATION) if (folder / VALIDATION).is_file() else None,
    }


def _restore_guide(
    name: str, entry: Entry, shape: tuple[int, ...], options: GuideOptions, tensors: dict[str, torch.Tensor]
) -> Guide:
    if name == DrawsGuide.NAME:
        return DrawsGuide.from_state(tensors)
    if name == ConjugateGuide.NAME:
        return ConjugateGuide.from_state(entry, tensors)
    # The guide takes its shapes from data: any data of the right size will do, and any starting values.
    x, options = placeholder(entry, shape), options.without_search()
    with isolated(0):
        guide = build_guide(name, entry, x, options)
        guide.prepare_to_load(Batch.full(x))
    guide.load_state_dict(tensors)
    return guide


def placeholder(entry: Entry, shape: tuple[int, ...]) -> torch.Tensor:
    """Return data of ``shape`` that the entry could have made."""
    if isinstance(entry, StackedEntry):
        return entry.simulate(shape[0], 0, steps=shape[1])[0]
    return entry.simulate(shape[0], 0)[0]


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().contiguous().clone() for name, value in module.state_dict().items()}
