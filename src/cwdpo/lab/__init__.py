"""The laboratory: recipes trained over seeds and settings in parallel processes, and what can be concluded from them.

One engine runs everything: a study file (``studies/*.yaml``, :mod:`cwdpo.lab.spec`) is planned into cells
(:mod:`~cwdpo.lab.plan`), each cell trains and is judged in a process of its own (:mod:`~cwdpo.lab.cell`,
:mod:`~cwdpo.lab.grid`), and the cells become one summary with paired, Holm-corrected differences
(:mod:`~cwdpo.lab.outcome`). The demo and the studies of diagnosis, stopping and curriculum are such files.

Only the command line imports this room. Nothing that a user trains with may depend on it: an experiment leaves the
laboratory when a recipe needs it (its code moves to the room that owns the subject, with tests of its own and a line
in docs/recipes.md), or when its question is answered (its file is deleted, the answer stays in docs/decisions.md).
"""
