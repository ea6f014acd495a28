"""Variational programs q(z given x): a family of distributions, fed by a source of its parameters."""

if __name__ != "elbozoo.guides":
    raise ImportError("this folder is elbozoo.guides: write 'from elbozoo.guides import ...', never 'import guides'")

from elbozoo.guides.base import Guide, GuideOptions
from elbozoo.guides.registry import build_guide, guide_names, list_guides, resolve_guide

__all__ = ["Guide", "GuideOptions", "build_guide", "guide_names", "list_guides", "resolve_guide"]
