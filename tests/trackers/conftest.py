"""Tests of experiment trackers; they run in the environment of ``make test-trackers`` only."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = (
    [] if all(map(importlib.util.find_spec, ("mlflow", "trackio", "wandb"))) else ["test_*.py"]
)
