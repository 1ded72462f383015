"""LLaVA 1.5 and its kin: one image tower, 1-D positions."""

from cwdpo.models.families.base import Family

FAMILY = Family()
