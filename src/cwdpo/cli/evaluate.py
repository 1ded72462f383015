"""``cwdpo evaluate``, ``ask``, ``chat``, ``compare`` and ``export``: measure a model, ask it, compare, export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cwdpo.cli.common import EVALUATE, AsJson, Code
from cwdpo.cli.progress import bars
from cwdpo.data.problems import printable


def mount(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (evaluate, ask, chat, compare, export):
        app.command(rich_help_panel=EVALUATE)(command)


def evaluate(
    model: Annotated[str, typer.Argument(help="a run folder, a model folder, 'embedded', or a hub id")],
    data: Annotated[str, typer.Option(help="a file, a folder, or a hub id")],
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            help="names separated by commas, or {name: ..., setting: ...}; default: those that fit the data"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder; default RUN/evaluation, else runs/evaluation")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy")] = 0.0,
    samples: Annotated[int, typer.Option(min=1, help="responses per prompt")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="read only this many examples")] = None,
    data_format: Annotated[
        str, typer.Option("--format", help="auto, the name of a format, or file.py:ClassName")
    ] = "auto",
    seed: Annotated[int, typer.Option()] = 0,
    code: Code = None,
    lmms_eval: Annotated[
        str | None, typer.Option("--lmms-eval", help="tasks for lmms-eval, separated by commas")
    ] = None,
    lmms_model: Annotated[str, typer.Option(help="lmms-eval's name of the model family")] = "llava_hf",
) -> None:
    """Generate responses to a data set and measure them; numbers have n and a 95% interval over prompts."""
    from cwdpo.evaluation import run

    folder = out or _evaluation_folder(model)
    with bars() as shown:
        measured = run.evaluate(
            model, data, folder, metrics=run.parse_specs(metrics or ()), temperature=temperature, samples=samples,
            max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed, code=code or (),
            data_options={"limit": limit, "format": data_format}, progress=shown.show,
        )  # fmt: skip
    for name, one in measured["numbers"].items():
        typer.echo(f"{name:22} {_number(one)}")
    typer.echo(f"\nresponses  {folder / 'responses.jsonl'}\nfigures    {folder / 'evaluation.json'}")
    if lmms_eval:
        run.lmms_eval(run.loadable(model), lmms_eval, folder, model=lmms_model, batch_size=batch_size)


def ask(
    model: Annotated[str, typer.Argument(help="a run folder, a model folder, 'embedded', or a hub id")],
    question: Annotated[str, typer.Argument(help="the text of the prompt")],
    image: Annotated[list[Path] | None, typer.Option(help="an image; several times for several")] = None,
    response: Annotated[
        list[str] | None, typer.Option(help="a response to score too; several times for several")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, help="samples at temperature 1, after the greedy response")
    ] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="show the log-probability of each token, in nats")
    ] = False,
    seed: Annotated[int, typer.Option()] = 0,
    code: Code = None,
    as_json: AsJson = False,
) -> None:
    """Ask the policies of a run side by side: the base, after stage 1, and the final one."""
    from cwdpo.evaluation import ask as asking
    from cwdpo.models.sample import Decoding

    decodings = [
        Decoding(0.0, max_new_tokens=max_new_tokens),
        *[Decoding(1.0, max_new_tokens=max_new_tokens)] * samples,
    ]
    said = asking.ask(
        model, question, image or (), decodings=decodings, given=response or (), seed=seed, code=code or ()
    )
    if as_json:
        typer.echo(json.dumps(said, indent=1, ensure_ascii=False))
        return
    for name, found in said.items():
        typer.echo(printable(name))
        for one in found:
            cut = "" if one["ended"] else " [cut]"
            typer.echo(f"  {one['how']:14} {one['mean_logp']:8.3f}  {printable(one['text'])}{cut}")
            if logprobs:
                parts = (f"{printable(repr(text))[1:-1]} {logp:.2f}" for text, logp in one["tokens"])
                typer.echo(f"{'':26}{' | '.join(parts)}")
    typer.echo("The numbers are mean log-likelihoods at temperature 1, in nats per token.")


def chat(
    model: Annotated[str, typer.Argument(help="a run folder, a model folder, 'embedded', or a hub id")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="port; 0: any free port from 7860 on")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    reload: Annotated[
        bool, typer.Option("--reload", help="load each policy for each question: only one is in memory")
    ] = False,
    open_page: Annotated[bool, typer.Option("--open", help="open the page in a browser")] = False,
    seed: Annotated[int, typer.Option(help="of the samples")] = 0,
    code: Code = None,
) -> None:
    """Ask the policies of a run about images of your own, on a local page; needs gradio (the extra `chat`).

    Other machines have no access, and nothing is sent anywhere.
    """
    from cwdpo.evaluation import chat as chatting

    chatting.gradio()
    answering = chatting.Answering(
        model, max_new_tokens=max_new_tokens, reload=reload, seed=seed, code=code or ()
    )
    page = chatting.page(Path(model).name, answering)
    page.launch(server_name="127.0.0.1", server_port=port or None, inbrowser=open_page, share=False)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="folders that cwdpo evaluate measured on the same data")],
    out: Annotated[Path, typer.Option(help="folder for summary.json and report.html")] = Path(
        "runs/comparison"
    ),
    metrics: Annotated[list[str] | None, typer.Option(help="default: those of the first run")] = None,
    judge: Annotated[
        str,
        typer.Option(
            help="world, references, metric, reward_model, vlm, file.py:Class, or {name: ..., setting: ...}; none: no "
            "win rates; auto: world if the data is from the embedded world, else none"
        ),
    ] = "auto",
) -> None:
    """Compare runs on the same prompts: paired differences, win rates with intervals, and a page."""
    from cwdpo.evaluation import run
    from cwdpo.report.render import write_report

    summary = run.compare(
        runs, out, metrics=run.parse_specs(metrics or ()), judge=run.parse_spec(judge), tell=typer.echo
    )
    for row in summary["differences"]:
        typer.echo(f"{row['ours']} minus {row['theirs']}:")
        for name, one in row["figures"].items():
            p = "" if one["p_corrected"] is None else f"  p={one['p_corrected']:.3f}  {one['word']}"
            typer.echo(f"  {name:22} {_number(one)}{p}")
    for row in summary["wins"]:
        typer.echo(
            f"{row['ours']} against {row['theirs']} ({row['kind']}, by {row['judge']}): {row['rate']:.3f} "
            f"[{row['low']:.3f}, {row['high']:.3f}]  win {row['win']:.3f} tie {row['tie']:.3f} loss {row['loss']:.3f}"
        )
    for row in summary["strength"]:
        typer.echo(
            f"Bradley-Terry {row['name']}: {row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        )
    typer.echo(f"\nreport   {write_report(out)}")


def export(
    run: Annotated[Path, typer.Argument(help="a finished run, or a checkpoint: RUN/stage2/checkpoint-40")],
    out: Annotated[Path, typer.Option(help="folder to write; must be empty or not exist")],
    merge: Annotated[bool, typer.Option("--merge", help="merge a LoRA adapter into the base model")] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="dtype of the weights; default: as trained, float32 for a merged adapter"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="rows for the comparison; default: the run's, held-out ones if there are any"),
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="upload the folder to this repository of the hub")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="with --push: a new repository is private")
    ] = False,
    with_report: Annotated[
        bool,
        typer.Option(
            "--with-report", help="with --push: upload report.html too; it shows images of the data"
        ),
    ] = False,
    average: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="the mean of the run's last N checkpoints, not the final model"
        ),
    ] = None,
    code: Code = None,
) -> None:
    """Write the final model, or a checkpoint, as a folder for AutoModelForImageTextToText, lmms-eval and vLLM.

    The folder is loaded again and compared with the trained policy first; the difference is printed.
    """
    if push is None and (private or with_report):
        raise typer.BadParameter("it needs --push", param_hint="--private" if private else "--with-report")
    from cwdpo.pipeline.export import export as write
    from cwdpo.pipeline.export_source import run_of
    from cwdpo.pipeline.hub import make_repository, push_folder

    repository = None if push is None else make_repository(push, private=private)
    done = write(run, out, merge=merge, dtype=dtype, data=data, code=code or (), average=average)
    typer.echo("\n".join((str(done.path), *done.lines())))
    if repository is not None:
        typer.echo(
            f"pushed to {push_folder(done.path, repository, run_of(run)[0] / 'report.html' if with_report else None)}"
        )


def _evaluation_folder(model: str) -> Path:
    return Path(model) / "evaluation" if (Path(model) / "recipe.yaml").is_file() else Path("runs/evaluation")


def _number(one: Mapping[str, Any]) -> str:
    if one["value"] is None:
        return "no value"
    bounds = "" if one["low"] is None else f" [{one['low']:.4f}, {one['high']:.4f}]"
    n = f"  n={one['n']}" if "n" in one else ""
    return f"{one['value']:.4f}{bounds}{n}"
