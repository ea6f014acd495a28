"""Generative programs p(x, z), one file per entry; the folder is the registry."""

if __name__ != "elbozoo.models":
    raise ImportError("this folder is elbozoo.models: write 'from elbozoo.models import ...', never 'import models'")

from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.entry import Entry, capabilities
from elbozoo.models.contract.registry import entry_names, get_entry, list_models

__all__ = ["Batch", "Entry", "capabilities", "entry_names", "get_entry", "list_models"]
