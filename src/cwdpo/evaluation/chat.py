"""``cwdpo chat``: a local page that asks the policies of a run about a picture, side by side; made with gradio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cwdpo.errors import CwdpoError, optional_package
from cwdpo.evaluation.ask import Scored, answers, asked, policies
from cwdpo.models.load import Policy, load_policy
from cwdpo.models.sample import Decoding

INSTALL = "pip install 'cwdpo[chat]'"
_KEPT = 3600
"""Seconds after which gradio removes an uploaded picture."""
_HOW = (
    "The numbers are log-probabilities at temperature 1, in nats per token: 0 is certain, -0.7 is one half. "
    "Under each response its tokens, shaded by their own."
)


class Answering:
    """The policies of a run, ready to answer.

    Args:
        source: a run folder, or one model (:func:`cwdpo.evaluation.ask.policies`).
        max_new_tokens: longest answer, tokens.
        reload: load each policy for each question, so that only one is in memory.
        seed: of the samples.
        code: code of the model that may run, see :func:`cwdpo.evaluation.run.model_settings`.

    Raises:
        CwdpoError: a model cannot be loaded.
    """

    def __init__(
        self,
        source: str,
        *,
        max_new_tokens: int,
        reload: bool = False,
        seed: int = 0,
        code: Sequence[str] = (),
    ) -> None:
        self._settings = policies(source, code)
        self._length, self._seed = max_new_tokens, seed
        self._loaded = {} if reload else {name: load_policy(own) for name, own in self._settings.items()}

    @property
    def names(self) -> list[str]:
        """The policies, in order."""
        return list(self._settings)

    def __call__(self, question: str, images: Sequence[Path], samples: int = 0) -> dict[str, list[Scored]]:
        """Each policy's greedy answer and ``samples`` samples at temperature 1.

        Raises:
            CwdpoError: the question is empty, or an image or a policy cannot be used.
        """
        example = asked(question, images)
        greedy, sampled = (Decoding(t, max_new_tokens=self._length) for t in (0.0, 1.0))
        how = [greedy, *[sampled] * samples]
        return {name: answers(self._policy(name), example, how, seed=self._seed) for name in self._settings}

    def _policy(self, name: str) -> Policy:
        return self._loaded.get(name) or load_policy(self._settings[name])


def gradio() -> Any:
    """The package.

    Raises:
        MissingPackageError: it is not installed.
    """
    return optional_package("gradio", "cwdpo chat", INSTALL)


def page(title: str, answering: Answering) -> Any:
    """The page as a gradio ``Blocks``; its endpoint ``/ask`` takes picture, question and number of samples."""
    gr = gradio()
    shown: list[Any] = []
    with gr.Blocks(title=f"cwdpo: {title}", analytics_enabled=False, delete_cache=(_KEPT, _KEPT)) as blocks:
        gr.Markdown(f"# {title}\n{_HOW}")
        with gr.Row():
            picture = gr.Image(type="filepath", label="image", height=320)
            with gr.Column():
                question = gr.Textbox(label="prompt", lines=2, placeholder="What is on the table?")
                samples = gr.Slider(0, 4, value=0, step=1, label="samples at temperature 1")
                ask = gr.Button("Ask", variant="primary")
        with gr.Row():
            for name in answering.names:
                with gr.Column():
                    gr.Markdown(f"## {name}")
                    text = gr.Textbox(label="responses", lines=6)
                    shown += [
                        text,
                        gr.HighlightedText(label="tokens of the first response", show_legend=False),
                    ]
        triggers = [ask.click, question.submit]
        gr.on(triggers, _responder(gr, answering), [picture, question, samples], shown, api_name="ask")
    return blocks


def _responder(gr: Any, answering: Answering) -> Callable[..., list[Any]]:
    """What the button calls: text and shaded tokens of each policy, in turn; an error is shown on the page."""

    def respond(picture: str | None, question: str, samples: float) -> list[Any]:
        try:
            said = answering(question, [Path(picture)] if picture else [], int(samples))
        except CwdpoError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return [part for found in said.values() for part in (_text(found), _tokens(found[0]))]

    return respond


def _text(found: Sequence[Scored]) -> str:
    """The answers, a line each, with their mean log-probability."""
    return "\n".join(
        f"{one.how}  {one.mean_logp:.3f}  {one.text}{'' if one.ended else ' [cut]'}" for one in found
    )


def _tokens(scored: Scored) -> list[tuple[str, float]]:
    """The tokens with their log-probability as gradio shades them: -1 and less is the strongest shade."""
    # + 0.0: else certain tokens are shown as -0.00
    return [(f"{text} {round(value, 2) + 0.0:.2f} ", max(value, -1.0)) for text, value in scored.tokens]
