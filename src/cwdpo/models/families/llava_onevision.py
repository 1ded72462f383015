"""LLaVA-OneVision: tiled images, 1-D positions."""

from cwdpo.models.families.base import Family

FAMILY = Family()
