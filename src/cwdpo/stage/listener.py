"""Callbacks through which a run reports its progress to its caller."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cwdpo.records import Reading

_logger = logging.getLogger(__name__)


@dataclass
class Listener:
    """Progress callbacks; by default they do nothing, except that a note is logged as a warning.

    Attributes:
        phase: called with a text when a part of the run starts (``reference pass``, ``stage2``, ...).
        note: called with a text that the user should see once (columns that are not used, no held-out
            data, a stage that ends early, ...).
        step: called with (stage, step, steps) after every optimizer step.
        sampled: called with (round, completions done, completions) while a round's negatives are sampled.
        measured: called with (stage, step, policy) after every held-out measurement.
        readings: called with (stage, readings by name) after every held-out measurement.
    """

    phase: Callable[[str], None] = field(default=lambda text: None)
    note: Callable[[str], None] = field(default=lambda text: _logger.warning(text))
    step: Callable[[str, int, int], None] = field(default=lambda stage, step, steps: None)
    sampled: Callable[[int, int, int], None] = field(default=lambda round_, done, total: None)
    measured: Callable[[str, int, Any], None] = field(default=lambda stage, step, model: None)
    readings: Callable[[str, Mapping[str, Reading]], None] = field(default=lambda stage, readings: None)
