"""The laboratory's commands: the demo, studies and their sweeps, the data made for them, benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cwdpo.cli import bench
from cwdpo.cli.progress import grid_bar

Recipe = Annotated[
    Path | None,
    typer.Argument(help="a recipe (YAML); default: the embedded world and model, at the demo's size"),
]
Study = Annotated[str, typer.Option(help="a study file, or the name of a shipped study")]
Jobs = Annotated[int, typer.Option("--jobs", "--workers", min=1, help="parallel processes, one core each")]
Only = Annotated[
    list[str] | None, typer.Option(help="a variant to take (repeatable), with what it needs; default: all")
]
Test = Annotated[Path | None, typer.Option(help="test set, for data that is not the embedded world's")]


def mount(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (demo, ablate, sweep, margins, edits):
        app.command()(command)
    app.command("best-of")(best_of)
    app.add_typer(bench.app, name="bench")


def demo(
    out: Annotated[Path, typer.Option(help="folder for summary.json and report.html")] = Path("runs/demo"),
    jobs: Jobs = 2,
) -> None:
    """Compare continued SFT, DPO, DPO + SFT and CW-DPO on the embedded world (minutes on 2 cores).

    It is the study `demo` at three seeds.
    """
    ablate("demo", seeds=3, jobs=jobs, out=out)


def ablate(
    study: Study,
    recipe: Recipe = None,
    seeds: Annotated[
        int,
        typer.Option(
            min=1, help="how many seeds, the same for every variant (from 0 on, or from the study's first)"
        ),
    ] = 5,
    jobs: Jobs = 2,
    out: Annotated[Path | None, typer.Option(help="folder; default runs/<study>")] = None,
    tuned: Annotated[
        Path | None, typer.Option(help="the chosen.yaml of a sweep; default: what the study says")
    ] = None,
    only: Only = None,
    test: Test = None,
) -> None:
    """Run a study: every variant at every seed, to a table with intervals and corrected p-values.

    Finished cells in the folder are used again, so a study that was cut off is continued by the same command.
    """
    from cwdpo.lab.ablate import ablate as run
    from cwdpo.lab.spec import RECIPE, load_study, settings_for
    from cwdpo.lab.tables import show

    spec = load_study(study)
    folder, chosen = out or Path("runs") / spec.name, settings_for(spec, tuned)
    spec = spec.only(only) if only else spec
    summary = run(
        recipe or RECIPE, spec, folder, seeds=seeds, jobs=jobs, chosen=chosen, test=test, bar=grid_bar
    )
    show(summary)
    typer.echo(f"Settings {summary.provenance['settings']}.\n")
    if spec.analysis:
        typer.echo((folder / f"{spec.analysis}.md").read_text(encoding="utf-8"))
    typer.echo(
        f"table    {folder / 'table.md'}\nfigures  {folder / 'table.csv'}\nreport   {folder / 'report.html'}"
    )


def sweep(
    study: Study,
    recipe: Recipe = None,
    finalists: Annotated[
        int, typer.Option(min=1, help="points per variant that run on the second seed too")
    ] = 3,
    jobs: Jobs = 2,
    out: Annotated[Path | None, typer.Option(help="folder; default runs/<study>-sweep")] = None,
    only: Only = None,
    test: Test = None,
) -> None:
    """Find every variant's best settings by the same budget, on validation pictures and seeds of its own."""
    from cwdpo.lab.ablate import sweep as run
    from cwdpo.lab.spec import RECIPE, load_study

    spec = load_study(study)
    spec = spec.only(only) if only else spec
    folder = out or Path("runs") / f"{spec.name}-sweep"
    chosen = run(recipe or RECIPE, spec, folder, finalists=finalists, jobs=jobs, test=test, bar=grid_bar)
    for name, settings in chosen["chosen"].items():
        typer.echo(f"{name}: {' '.join(settings)}")
    for name, edges in chosen["edges"].items():
        typer.echo(f"{name}: {'; '.join(edges)}: widen its grid", err=True)
    typer.echo(f"\ntable    {folder / 'sweep.md'}\nchosen   {folder / 'chosen.yaml'}")


def edits(
    data: Annotated[Path, typer.Argument(help="any data set, or a .txt file with a caption a line")],
    captions: Annotated[int, typer.Option(min=1, help="drawn, where there are more")] = 500,
    examples: Annotated[int, typer.Option("--show", min=0, help="edited captions to print")] = 50,
    kinds: Annotated[
        str | None, typer.Option(help="of edits, with commas; default: the source's own")
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Show what the `perturb` negatives make of captions: coverage, kinds, and drawn examples, in markdown."""
    from cwdpo.lab.edits import describe

    typer.echo(describe(data, captions, kinds.split(",") if kinds else None, examples, seed))


def best_of(
    data: Annotated[Path, typer.Argument(help="a .jsonl file of the embedded world")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    model: Annotated[
        str, typer.Option(help="what is sampled: 'embedded', a folder, or a hub id")
    ] = "embedded",
    n: Annotated[int, typer.Option(min=2, help="samples per prompt")] = 8,
    noise: Annotated[float, typer.Option(min=0, max=1, help="share of samples whose score is random")] = 0.3,
    worse: Annotated[
        Literal["truth", "judge"],
        typer.Option(help="who finds that rejected is worse: 'truth', or the noisy 'judge'"),
    ] = "truth",
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write a preference set whose chosen responses are only better: the best of n samples by a noisy judge."""
    from cwdpo.data.encode.encoder import Encoder
    from cwdpo.lab.best_of import write_best_of
    from cwdpo.lab.spec import BestOf
    from cwdpo.models.load import load_policy
    from cwdpo.models.settings import ModelSettings

    settings = BestOf(n=n, noise=noise, worse=worse)
    policy = load_policy(ModelSettings(path=model))
    made = write_best_of(policy, Encoder(policy.processor), data, out, settings, seed=seed)
    typer.echo(
        f"{made['rows']} rows ({made['left_out']} left out); chosen is right in every fact in "
        f"{made['chosen_right']:.3f}, mean score {made['chosen_score']:.3f}; wrong labels "
        f"{made['wrong_labels']:.3f}\n{out / 'train.jsonl'}"
    )


def margins(
    run: Annotated[Path, typer.Argument(help="a finished run whose stage 2 was dpo")],
    data: Annotated[Path, typer.Option(help="the .jsonl file that it was trained on")],
    out: Annotated[Path, typer.Option(help="folder to write; its train.jsonl holds the rows")],
) -> None:
    """Write every pair's reward margin by a DPO run into the data, for the madpo objective."""
    from cwdpo.config import load_recipe
    from cwdpo.lab.margins import write_margins
    from cwdpo.rundir import RunDir

    folder = RunDir.open(run).path
    recipe = load_recipe(folder / "recipe.yaml")
    first = folder / "stage1" / "model"
    reference = str(first) if first.is_dir() else recipe.model.path
    beta = float(recipe.stage2.objective.get("beta", 0.1))
    made = write_margins(
        folder / "model", reference, str(data), out, beta=beta, image_root=recipe.data.image_root
    )
    mean = "none" if made["mean"] is None else f"{made['mean']:.3f}, above 0 in {made['right']:.3f} of"
    typer.echo(
        f"{out}: mean margin {mean} {made['pairs']} pairs; a recipe needs data.image_root={data.parent}"
    )
