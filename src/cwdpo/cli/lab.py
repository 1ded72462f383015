"""The commands of the laboratory: the demo, studies and sweeps, their data, and benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cwdpo.cli import bench
from cwdpo.cli.common import DATA, EVIDENCE
from cwdpo.cli.progress import grid_bar

Recipe = Annotated[
    Path | None,
    typer.Argument(help="a recipe (YAML); default: the embedded world and model, with the size of the demo"),
]
Study = Annotated[str, typer.Option(help="a study file, or the name of a shipped study")]
Jobs = Annotated[
    int, typer.Option("--jobs", "--workers", min=1, help="number of parallel processes, one core each")
]
Only = Annotated[
    list[str] | None,
    typer.Option(help="run only this variant (repeatable) and those that it needs; default: all"),
]
Test = Annotated[Path | None, typer.Option(help="test set, for data that is not from the embedded world")]


def mount(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (demo, ablate, sweep, publish, tables):
        app.command(rich_help_panel=EVIDENCE)(command)
    app.add_typer(bench.app, name="bench", rich_help_panel=EVIDENCE)
    app.command("best-of", rich_help_panel=DATA)(best_of)
    app.command(rich_help_panel=DATA)(margins)
    app.command(rich_help_panel=DATA)(edits)


def demo(
    out: Annotated[Path, typer.Option(help="folder for summary.json and report.html")] = Path("runs/demo"),
    jobs: Jobs = 2,
    open_: Annotated[bool, typer.Option("--open", help="open the page in a browser while it fills")] = False,
) -> None:
    """Compare continued SFT, DPO, DPO + SFT and CW-DPO on the embedded world (minutes on 2 cores).

    This is the study `demo` with three seeds.
    """
    _ablate("demo", None, None, out, seeds=3, jobs=jobs, opens=open_)


def ablate(
    study: Study,
    recipe: Recipe = None,
    seeds: Annotated[
        int,
        typer.Option(
            min=1,
            help="number of seeds, the same seeds for all variants (starting at the study's first seed)",
        ),
    ] = 5,
    jobs: Jobs = 2,
    out: Annotated[Path | None, typer.Option(help="folder; default runs/<study>")] = None,
    tuned: Annotated[
        Path | None, typer.Option(help="the chosen.yaml of a sweep; default: set by the study")
    ] = None,
    only: Only = None,
    test: Test = None,
) -> None:
    """Run a study: all variants with all seeds, and a table with intervals and corrected p-values.

    Finished cells in the folder are reused, so the same command continues an interrupted study.
    """
    _ablate(study, recipe, tuned, out, seeds=seeds, jobs=jobs, only=only, test=test)


def _ablate(
    study: str,
    recipe: Path | None,
    tuned: Path | None,
    out: Path | None,
    *,
    seeds: int,
    jobs: int,
    only: list[str] | None = None,
    test: Path | None = None,
    opens: bool = False,
) -> None:
    from cwdpo.lab import server
    from cwdpo.lab.spec import RECIPE, load_study, settings_for

    spec = load_study(study)
    folder, chosen = out or Path("runs") / spec.name, settings_for(spec, tuned)
    spec = spec.only(only) if only else spec
    server.start()  # it imports torch for the workers while this process does so for itself
    from cwdpo.lab.ablate import ablate as run
    from cwdpo.lab.tables import show

    def announce(page: Path) -> None:
        typer.echo(f"page     {page.resolve().as_uri()} (there from now on; it fills while the study runs)")
        if opens:
            import webbrowser

            webbrowser.open(page.resolve().as_uri())

    summary = run(
        recipe or RECIPE, spec, folder, seeds=seeds, jobs=jobs, chosen=chosen, test=test, bar=grid_bar,
        on_page=announce,
    )  # fmt: skip
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
        int, typer.Option(min=1, help="number of points per variant that also run with the second seed")
    ] = 3,
    jobs: Jobs = 2,
    out: Annotated[Path | None, typer.Option(help="folder; default runs/<study>-sweep")] = None,
    only: Only = None,
    test: Test = None,
) -> None:
    """Find the best settings of each variant with the same budget, on validation images and separate seeds."""
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


def publish(
    study: Annotated[Path, typer.Argument(help="the folder of a finished study")],
    to: Annotated[Path, typer.Option(help="where results are kept")] = Path("docs/data"),
) -> None:
    """Keep what a study found: figures per seed and settings, small enough for a repository."""
    from cwdpo.lab.published import publish as run

    for path in run(study, to):
        typer.echo(path)


def tables(
    pages: Annotated[
        list[Path], typer.Argument(help="markdown pages with <!-- table STUDY KIND FIGURES -->")
    ],
    data: Annotated[Path, typer.Option(help="where results are kept")] = Path("docs/data"),
    check: Annotated[
        bool, typer.Option(help="change nothing; exit with 1 if a table is out of date")
    ] = False,
) -> None:
    """Write the tables of pages anew from published results."""
    from cwdpo.lab.published import fill, stale

    if check:
        found = stale(pages, data)
        for page in found:
            typer.echo(f"{page}: a table is not that of {data}: run `cwdpo tables {page}`", err=True)
        raise typer.Exit(1 if found else 0)
    for page in pages:
        typer.echo(f"{page}: {'written' if fill(page, data) else 'unchanged'}")


def edits(
    data: Annotated[Path, typer.Argument(help="any data set, or a .txt file with one caption per line")],
    captions: Annotated[int, typer.Option(min=1, help="largest number of captions, chosen at random")] = 500,
    examples: Annotated[int, typer.Option("--show", min=0, help="number of edited captions to print")] = 50,
    kinds: Annotated[
        str | None, typer.Option(help="kinds of edits, separated by commas; default: those of perturb")
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Show how `perturb` edits captions: how many, which kinds, and examples, as markdown."""
    from cwdpo.lab.edits import describe

    typer.echo(describe(data, captions, kinds.split(",") if kinds else None, examples, seed))


def best_of(
    data: Annotated[Path, typer.Argument(help="a .jsonl file of the embedded world")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    model: Annotated[
        str, typer.Option(help="the model to sample: 'embedded', a folder, or a hub id")
    ] = "embedded",
    n: Annotated[int, typer.Option(min=2, help="samples per prompt")] = 8,
    noise: Annotated[float, typer.Option(min=0, max=1, help="share of samples with a random score")] = 0.3,
    worse: Annotated[
        Literal["truth", "judge"],
        typer.Option(help="rejected must be worse according to the 'truth', or to the noisy 'judge'"),
    ] = "truth",
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write a preference set in which chosen is the best of n samples according to a noisy judge."""
    from cwdpo.lab.best_of import write_best_of
    from cwdpo.lab.spec import BestOf
    from cwdpo.models.load import load_policy
    from cwdpo.models.settings import ModelSettings

    settings = BestOf(n=n, noise=noise, worse=worse)
    policy = load_policy(ModelSettings(path=model))
    made = write_best_of(policy, policy.encoder(), data, out, settings, seed=seed)
    typer.echo(
        f"{made['rows']} rows ({made['left_out']} left out); share of chosen that is right in every fact "
        f"{made['chosen_right']:.3f}, mean score {made['chosen_score']:.3f}; share of wrong labels "
        f"{made['wrong_labels']:.3f}\n{out / 'train.jsonl'}"
    )


def margins(
    run: Annotated[Path, typer.Argument(help="a finished run with dpo in stage 2")],
    data: Annotated[Path, typer.Option(help="the .jsonl file that the run was trained on")],
    out: Annotated[Path, typer.Option(help="folder to write; its train.jsonl contains the rows")],
) -> None:
    """Add the reward margin of each pair, from a DPO run, to the data, for the objective madpo."""
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
