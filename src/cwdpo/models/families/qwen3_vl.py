"""Qwen3-VL: positions on three axes."""

from cwdpo.models.families.mrope import MRope

FAMILY = MRope()
