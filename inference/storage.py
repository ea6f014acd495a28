"""Fits on disk: JSON for what people read, safetensors for parameters, CSV for the trajectory; never pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

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

Module = TypeVar("Module", bound=torch.nn.Module)

FORMAT = 3
CARD, MODEL, GUIDE, TRAJECTORY = "fit.json", "model.safetensors", "guide.safetensors", "trajectory.csv"
KEPT = (
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
VALIDATION = "validation.csv"  # where validation rows were asked for
FINISHED = "finished.json"  # where a comparison left the fit, see inference/finished.py
DAMAGE = (
    AttributeError,
    KeyError,
    SafetensorError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)  # what reading damaged files raises


class Packed(NamedTuple):
    """A fit without modules and data, as files hold it and as workers send it.

    Attributes
    ----------
    card : dict
        What people read: plain values by name.
    model, guide : dict of Tensor
        Parameters and buffers by name.
    trajectory, validation : DataFrame
        Records along the fit; the second is None where there is none.
    """

    card: dict[str, Any]
    model: dict[str, torch.Tensor]
    guide: dict[str, torch.Tensor]
    trajectory: pd.DataFrame
    validation: pd.DataFrame | None


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
    # What an earlier fit left there is not of this one.
    (folder / FINISHED).unlink(missing_ok=True)
    (folder / VALIDATION).unlink(missing_ok=True)
    write_packed(pack_fit(fit), folder)
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
        packed = read_packed(folder)
        if packed.card["format"] != FORMAT:
            raise InvalidInput(
                f"{folder}: found a fit of format {packed.card['format']}, expected {FORMAT}: fit again with this "
                "version"
            )
        return unpack_fit(packed)
    except InvalidInput:
        raise
    except DAMAGE as error:
        raise InvalidInput(
            f"{folder}: the saved fit is damaged ({str(error).splitlines()[0]}); expected files as Fit.save wrote them"
        ) from None


def pack_fit(fit: Fit) -> Packed:
    """Return what :func:`unpack_fit` makes ``fit`` of again; the fit goes on as it is."""
    card = json.loads(card_text(fit))  # as it comes back from a file: lists for tuples
    return Packed(card, _tensors(fit.entry), _tensors(fit.guide), fit.trajectory, fit.validation)


def unpack_fit(packed: Packed, like: Entry | None = None, x: torch.Tensor | None = None) -> dict[str, Any]:
    """Return the fields of a fit, by name, without its data.

    Parameters
    ----------
    like : Entry, optional
        The entry to give its parameters to, float64; by default one is built by its name, as a program of the user's
        cannot be.
    x : Tensor (N, D), optional
        Data of the fit, arranged, from which the guide takes its shapes; by default some are simulated.
    """
    card = packed.card
    entry = _entry_of(card) if like is None else like
    entry.load_state_dict(packed.model)
    guide_options = GuideOptions.parse(card["guide_options"])
    entry.table_names, entry.levels = tuple(card["names"]), card["levels"]
    x = placeholder(entry, tuple(card["shape"])) if x is None else x
    guide = _restore_guide(card["guide"], entry, x, guide_options, packed.guide)
    return {
        **{key: card[key] for key in KEPT},
        "shape": tuple(card["shape"]),
        "entry": contiguous(entry),
        "guide": contiguous(guide),
        "guide_options": guide_options,
        "trajectory": packed.trajectory,
        "validation": packed.validation,
    }


def write_packed(packed: Packed, folder: Path) -> None:
    """Write a fit to files in ``folder``."""
    save_file(packed.model, folder / MODEL)
    save_file(packed.guide, folder / GUIDE)
    packed.trajectory.to_csv(folder / TRAJECTORY, index=False)
    if packed.validation is not None:
        packed.validation.to_csv(folder / VALIDATION, index=False)
    (folder / CARD).write_text(_json(packed.card), encoding="utf-8")


def read_packed(folder: Path) -> Packed:
    """Read what :func:`write_packed` wrote; errors are whatever damaged files lead to, see :data:`DAMAGE`."""
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    validation = pd.read_csv(folder / VALIDATION) if (folder / VALIDATION).is_file() else None
    return Packed(
        card, load_file(folder / MODEL), load_file(folder / GUIDE), pd.read_csv(folder / TRAJECTORY), validation
    )


def contiguous(module: Module) -> Module:
    """Lay out the tensors of a module as they come back from a file, and return it.

    Matrix products may round otherwise where a matrix is stored by columns, and a fit that comes back is to say the
    same to the last bit.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.contiguous()
    return module


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


def card_text(fit: Fit) -> str:
    """Return the card of a fit as it stands in its file."""
    return _json(_card(fit))


def _json(card: dict[str, Any]) -> str:
    return json.dumps(card, indent=2) + "\n"


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


def _entry_of(card: dict[str, Any]) -> Entry:
    """Build the entry of a card, at the starting values of its class."""
    if card["model"] == Program.name():
        raise InvalidInput(
            "found a fit of a program of your own, expected one of an entry of the zoo: only its code can rebuild it"
        )
    entry_class = get_entry(card["model"])
    return entry_class(entry_class.Options.parse(card["model_options"]), card["columns"]).double()


def _restore_guide(
    name: str, entry: Entry, x: torch.Tensor, options: GuideOptions, tensors: dict[str, torch.Tensor]
) -> Guide:
    if name == DrawsGuide.NAME:
        return DrawsGuide.from_state(tensors)
    if name == ConjugateGuide.NAME:
        return ConjugateGuide.from_state(entry, tensors)
    # The guide takes its shapes from data: any data of the right size will do, and any starting values.
    with isolated(0):
        guide = build_guide(name, entry, x, options.without_search())
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
