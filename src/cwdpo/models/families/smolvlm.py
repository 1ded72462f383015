"""SmolVLM: as Idefics3."""

from cwdpo.models.families.base import Family

FAMILY = Family()
