"""Finished fits on disk: what a comparison that was stopped takes up instead of repeating it.

Each fit has a folder of its own, METHOD-SEED, with the files of ``Fit.save`` and one more, ``finished.json``. It says
what the fit is a fit of, so that a fit of anything else is run again; holds the checksums of the other files, so that
a damaged one is; and has the figures of the fit, which may take longer than the fit itself.

Fits are written beside their places first, those that ended together in one folder. One renaming says that they are
all there, and only then is each put in its place, by whichever process comes next if need be. So a process that is
killed at any moment leaves either all of them or none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError

from elbozoo.inference.checkpoints import first_difference
from elbozoo.inference.heldout import HeldOut
from elbozoo.inference.ledger import Ledger
from elbozoo.inference.storage import (
    CARD,
    DAMAGE,
    FINISHED,
    FORMAT,
    Packed,
    card_text,
    read_packed,
    writable_directory,
    write_packed,
)

if TYPE_CHECKING:
    from elbozoo.inference.fit import Fit

logger = logging.getLogger(__name__)

PARTIAL, READY = ".partial-", ".ready-"
NOT_FINITE = ("nan", "inf", "-inf")  # which JSON has no numbers for


class Figures(NamedTuple):
    """What is computed of a fit once it has ended: its ledger, and figures of held-out rows where there are some."""

    ledger: Ledger
    heldout: HeldOut | None


class Stored(NamedTuple):
    """A finished fit that was found on disk; its figures are None where they were not computed in time."""

    packed: Packed
    figures: Figures | None


class FinishedFits:
    """The finished fits of a comparison in one folder.

    Parameters
    ----------
    folder : path
        Directory of the folders of the fits; it is made if need be.

    Raises
    ------
    InvalidInput
        If it cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = writable_directory(folder)
        for left_over in self.folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(left_over, ignore_errors=True)
        for ready in self.folder.glob(f"{READY}*"):
            self._put_in_place(ready)

    def find(self, name: str, identity: Mapping[str, Any]) -> Stored | None:
        """Return the fit called ``name`` if it is there and what ``identity`` says; a log line says why it is not."""
        folder = self.folder / name
        if not (folder / FINISHED).is_file():
            return None  # never begun, interrupted, or written by Fit.save
        try:
            marker = _read(folder)
            difference = first_difference(marker["identity"], _as_read(identity))
            if difference is not None:
                logger.warning("%s: found a fit of %s; it is run again and replaced", folder, difference)
                return None
            damaged = _damaged(folder, marker)
            if damaged is not None:
                raise ValueError(f"the checksum of {damaged} is another")
            packed = read_packed(folder)
            figures = marker["figures"] and _decoded(marker["figures"])
        except DAMAGE as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            logger.warning("%s: the finished fit is damaged (%s); it is run again and replaced", folder, reason)
            return None
        logger.info("%s: taken as it is", folder)
        return Stored(packed, figures)

    def keep(self, fits: Mapping[str, tuple[Packed, Mapping[str, Any]]]) -> None:
        """Write finished fits, by name, with their identities: all or none. What stood in their places is replaced."""
        partial, ready = (self.folder / f"{state}{os.getpid()}" for state in (PARTIAL, READY))
        try:
            for name, (packed, identity) in fits.items():
                folder = partial / name
                folder.mkdir(parents=True)
                write_packed(packed, folder)
                checksums = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
                _write(folder, {"identity": _as_read(identity), "files": checksums, "figures": None})
            partial.rename(ready)
            self._put_in_place(ready)
        except (OSError, SafetensorError) as error:
            # Hours of work are worth more than a copy of them, and what was there may still be.
            reason = getattr(error, "strerror", None) or error
            logger.warning("%s: %s not written: %s", self.folder, ", ".join(fits), reason)
            shutil.rmtree(partial, ignore_errors=True)

    def keep_figures(self, name: str, identity: Mapping[str, Any], figures: Figures) -> None:
        """Write the figures of the fit called ``name`` beside it, unless another fit is still there."""
        folder = self.folder / name
        if not (folder / FINISHED).is_file():
            return  # the fit could not be written, which has been said
        try:
            marker = _read(folder)
            if first_difference(marker["identity"], _as_read(identity)) is None:
                _write(folder, {**marker, "figures": _encoded(figures)})
        except DAMAGE as error:
            logger.warning("%s: the figures were not written: %s", folder, error)

    def _put_in_place(self, ready: Path) -> None:
        for fit in sorted(ready.iterdir()):
            place = self.folder / fit.name
            try:
                if place.is_dir():
                    shutil.rmtree(place)
                elif place.exists():
                    place.unlink()
                fit.rename(place)
            except OSError as error:
                logger.warning("%s not written: %s", place, error.strerror or error)
        shutil.rmtree(ready, ignore_errors=True)


def holds(folder: Path, fit: Fit) -> bool:
    """Whether ``folder`` has this very fit, finished and whole, so that it need not be written again."""
    try:
        marker, card = _read(folder), card_text(fit).encode()
        return marker["files"][CARD] == hashlib.sha256(card).hexdigest() and _damaged(folder, marker) is None
    except DAMAGE:
        return False


def _read(folder: Path) -> dict[str, Any]:
    marker: dict[str, Any] = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
    return marker


def _write(folder: Path, marker: Mapping[str, Any]) -> None:
    """Write the marker as a whole or not at all."""
    partial = folder / f"{FINISHED}{PARTIAL}{os.getpid()}"
    try:
        partial.write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / FINISHED)
    finally:
        partial.unlink(missing_ok=True)


def _damaged(folder: Path, marker: Mapping[str, Any]) -> str | None:
    """Return the first file that is not as it was written, or None."""
    return next((name for name, checksum in marker["files"].items() if _checksum(folder / name) != checksum), None)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _as_read(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity as it comes back from a file, with the format of the files in front."""
    read: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **identity}))
    return read


def _encoded(figures: Figures) -> dict[str, Any]:
    heldout = None if figures.heldout is None else _values(figures.heldout._asdict())
    return {"ledger": _values(figures.ledger.as_dict()), "heldout": heldout}


def _decoded(figures: Mapping[str, Any]) -> Figures:
    heldout = figures["heldout"]
    return Figures(Ledger(**_numbers(figures["ledger"])), None if heldout is None else HeldOut(**_numbers(heldout)))


def _values(record: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: value.item() if hasattr(value, "item") else value for name, value in record.items()}
    return {n: str(v) if isinstance(v, float) and not math.isfinite(v) else v for n, v in own.items()}


def _numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: float(value) if value in NOT_FINITE else value for name, value in record.items()}
