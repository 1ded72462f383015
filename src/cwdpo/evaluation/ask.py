"""``cwdpo ask``: one question to the policies of a run, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cwdpo.config import stored_model
from cwdpo.data.encode.collate import collate
from cwdpo.data.validate.show import token_texts
from cwdpo.errors import DataError
from cwdpo.evaluation.run import model_settings
from cwdpo.models.load import Policy, load_policy
from cwdpo.models.sample import Decoding, sample_batch
from cwdpo.models.settings import LoraSettings, ModelSettings
from cwdpo.records import Completion, Example, ImageRef, Message
from cwdpo.scoring.score import score

GIVEN = "given"
"""How a response that was not sampled is named."""


@dataclass(frozen=True)
class Scored:
    """One response and its likelihood under one policy.

    Attributes:
        how: ``greedy``, ``temperature 1`` (the number as given), or ``given``.
        text: the response, without its end token.
        ended: whether it ended before the limit of new tokens.
        sum_logp, mean_logp: log-likelihood at temperature 1, summed and per token, in nats; the end token counts.
        tokens: text and log-likelihood (nats) of each token.
    """

    how: str
    text: str
    ended: bool
    sum_logp: float
    mean_logp: float
    tokens: tuple[tuple[str, float], ...]


def policies(source: str, code: Sequence[str] = ()) -> dict[str, ModelSettings]:
    """How to load the policies of a run folder by name (``base``, ``stage 1``, ``final``); of a model: itself only.

    Args:
        source, code: see :func:`cwdpo.evaluation.run.model_settings`.
    """
    folder = Path(source)
    final = model_settings(source, code)
    if final.path == source:
        return {source: final}
    plain = {"freeze": (), "lora": LoraSettings()}
    base = stored_model(folder / "recipe.yaml", code).model_copy(update={**plain, "tune": "full"})
    found = {"base": base}
    if (folder / "stage1" / "model").is_dir():
        found["stage 1"] = final.model_copy(update={"path": str(folder / "stage1" / "model")})
    return {**found, "final": final}


def asked(question: str, images: Sequence[Path]) -> Example:
    """The question as a prompt, with the images in front of the text.

    Raises:
        DataError: an image cannot be read, or the question is empty.
    """
    if not question.strip():
        raise DataError("the question is empty")
    for path in images:
        try:
            ImageRef(path=path).open()
        except Exception as error:  # Pillow's plugins raise many types of error on broken files
            raise DataError(
                f"{path}: not an image that can be read ({type(error).__name__}: {error})"
            ) from None
    prompt = (Message("user", (*[None] * len(images), question)),)
    return Example(
        "question", tuple(ImageRef(path=p) for p in images), prompt, Completion(""), where="the question"
    )


def answers(
    policy: Policy, example: Example, decodings: Sequence[Decoding], given: Sequence[str] = (), seed: int = 0
) -> list[Scored]:
    """A policy's response for each decoding, and the given responses, with their likelihood under the policy.

    Args:
        policy: the policy; its model is set to evaluation.
        example: the prompt.
        decodings: how to sample; one response each.
        given: further responses to score.
        seed: of the samples.

    Raises:
        DataError: the policy's template or processor refuses the question.
    """
    policy.model.eval()
    encoder = policy.encoder()
    found: list[tuple[str, str, bool]] = []
    for number, decoding in enumerate(decodings):
        ((sample,),) = sample_batch(
            policy.model, encoder, [encoder.prompt(example)], 1, decoding, seed, [str(number)]
        )
        how = f"temperature {decoding.temperature:g}" if decoding.temperature else "greedy"
        found.append((how, sample.text, sample.ended))
    found += [(GIVEN, text, True) for text in given]
    return [_scored(policy, encoder, example, *one) for one in found]


@torch.no_grad()
def _scored(policy: Policy, encoder: Any, example: Example, how: str, text: str, ended: bool) -> Scored:
    if not text.strip():
        return Scored(how, text, ended, 0.0, 0.0, ())
    said = Example(**{**vars(example), "chosen": Completion(text)})
    encoded = encoder.encode(said, "none")
    logp = score(policy.model, collate([encoded])).logp[0].float().tolist()
    texts = token_texts(encoder.tokenizer, encoded.chosen.ids)
    n = len(texts)
    return Scored(
        how, text, ended, sum(logp[:n]), sum(logp[:n]) / n, tuple(zip(texts, logp[:n], strict=True))
    )


def ask(
    source: str,
    question: str,
    images: Sequence[Path],
    *,
    decodings: Sequence[Decoding],
    given: Sequence[str] = (),
    seed: int = 0,
    code: Sequence[str] = (),
) -> dict[str, list[dict[str, Any]]]:
    """Ask all policies of a run folder, or one model; the answers (:class:`Scored` as mappings) by policy.

    Only one policy is in memory at a time.

    Raises:
        CwdpoError: a model or an image cannot be used.
    """
    example = asked(question, images)
    return {
        name: [asdict(one) for one in answers(load_policy(settings), example, decodings, given, seed)]
        for name, settings in policies(source, code).items()
    }
