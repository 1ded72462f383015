"""Idefics3: images in rows of their own axis, padded with empty ones; 1-D positions."""

from cwdpo.models.families.base import Family

FAMILY = Family()
