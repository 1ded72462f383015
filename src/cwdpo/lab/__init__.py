"""The laboratory: trains recipes over seeds and settings in parallel processes, and compares the results.

All experiments use the same engine. A study file (``studies/*.yaml``, :mod:`cwdpo.lab.spec`) is turned into cells
(:mod:`~cwdpo.lab.plan`). Each cell trains and is evaluated in its own process (:mod:`~cwdpo.lab.cell`,
:mod:`~cwdpo.lab.grid`). A summary of all cells gives paired, Holm-corrected differences (:mod:`~cwdpo.lab.outcome`).
The demo and the studies of diagnosis, stopping and curriculum are study files, too.

Only the command line imports this room; code that users train with must not depend on it. An experiment leaves the
laboratory when a recipe needs it (its code moves to the room of its subject, with tests and a line in
docs/recipes.md), or when its question is answered (its file is deleted, the answer stays in docs/decisions.md).
"""
