"""A checkpoint's chat template: how it takes contents, what ends a turn, which turns it refuses.

This is found by rendering test conversations, not by the name of the model family. Each role is tried once with a test
text with quotes and a line break. Contents are passed as blocks or as text, whichever makes the template print this
text unchanged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from cwdpo.data.encode.ends import TurnEnd, without_ends
from cwdpo.data.encode.probe_turns import ANSWERS, CALLS, PROBE, TOOL
from cwdpo.data.encode.render import Asked, Order, Renderer
from cwdpo.errors import DataError, ModelError
from cwdpo.records import VIDEO, Example, Message, Place, without_tools

Style = Literal["blocks", "text"]


class RefusedRowError(DataError):
    """A row that this checkpoint's chat template, tokenizer or processor cannot encode.

    Attributes:
        kind: short name by which problems are counted.
        key: which text of the row; empty for the whole row.
        reason: what is wrong, without file and row.
        remedy: what to do.
    """

    def __init__(self, where: str, kind: str, key: str, reason: str, remedy: str) -> None:
        super().__init__(f"{where}{f' [{key}]' if key else ''}: {reason}: {remedy}")
        self.kind, self.key, self.reason, self.remedy = kind, key, reason, remedy


@dataclass(frozen=True)
class CheckpointTokens:
    """Token ids from a checkpoint's other files.

    ``stops``: ``eos_token_id`` of generation_config.json. ``embedded``: rows of the embedding; ``None`` if not known.
    ``placeholders``: ids of image placeholders, which are never embedded. ``positions``: most tokens of a sequence.
    """

    stops: tuple[int, ...] = ()
    embedded: int | None = None
    placeholders: frozenset[int] = frozenset()
    positions: int | None = None


class ChatTemplate:
    """Renders prompts and responses with the processor's chat template.

    Args:
        processor: the result of ``AutoProcessor.from_pretrained``.
        checkpoint: token ids from generation_config and weights.
    """

    def __init__(self, processor: Any, checkpoint: CheckpointTokens | None = None) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.checkpoint = checkpoint or CheckpointTokens()
        self._renderer = Renderer(processor)
        self._foreseen: dict[tuple[int, str | None], str] = {}
        self._numbers: Mapping[tuple[Message, ...], int] = {}
        self._styles: dict[str, Style | str] = {}

    @property
    def is_there(self) -> bool:
        """Whether the checkpoint has a chat template."""
        return any(getattr(one, "chat_template", None) for one in (self.processor, self.tokenizer))

    def prompt(self, example: Example) -> str:
        """The prompt up to the start of the response, with images as placeholders.

        Raises:
            RefusedRowError: the template refuses it, or there is no template and the prompt is not one user turn.
        """
        return self._render_row(example, None)

    def continuation(self, example: Example, prompt: str, response: str) -> str:
        """The text after the prompt: the response up to its end token; see :class:`TurnEnd`.

        End tokens in the response's own text are removed, so that the end token is written once.

        Args:
            example: the row.
            prompt: the result of :meth:`prompt`, which is the same for all responses of a row.
            response: its text.

        Raises:
            RefusedRowError: see :meth:`prompt`.
        """
        end = self.end
        whole = self._render_row(example, response)
        body = response
        # Some templates render a conversation with a response so that it does not start with the rendered prompt.
        # For these, the response's own text is used.
        if (
            whole.startswith(prompt)
            and whole.endswith(end.tail)
            and len(whole) >= len(prompt) + len(end.tail)
        ):
            body = whole[len(prompt) : len(whole) - len(end.tail)]
        body = without_ends(body, self._end_texts)
        # If the template writes no end token, white space after the response comes from the template.
        return body + end.closing if end.closing else body.rstrip()

    @cached_property
    def end(self) -> TurnEnd:
        """How a turn ends: from generation_config, else from the template, else from the tokenizer's eos.

        Raises:
            ModelError: none of them names a token.
        """
        tail, following = self._behind_a_response()
        eos, known = self.tokenizer.eos_token_id, set(self.checkpoint.stops)
        written, next_ = self._ids(tail), self._ids(following)
        candidates = [
            *(i for i in written if i in known),
            *(i for i in written if i in self._special_ids),
            *(i for i in next_ if i in known),
            *((eos,) if eos in known else ()),
            *self.checkpoint.stops,
            *(() if eos is None else (int(eos),)),
        ]
        if not candidates:
            raise ModelError(
                "no token ends a response: the tokenizer has no eos_token, generation_config.json has no "
                "eos_token_id, and the chat template writes no special token after a response; set eos_token in "
                "tokenizer_config.json"
            )
        token = int(candidates[0])
        text = self._text(token)
        closing = tail[: tail.index(text) + len(text)] if token in written and text in tail else ""
        return TurnEnd(token, tail, closing)

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """Ids at which sampling stops: those of generation_config, the end token of training, and eos.

        Raises:
            ModelError: see :attr:`end`.
        """
        eos = self.tokenizer.eos_token_id
        found = [*self.checkpoint.stops, self.end.token, *(() if eos is None else (int(eos),))]
        return tuple(dict.fromkeys(found))

    @cached_property
    def _end_texts(self) -> tuple[str, ...]:
        """The texts of :attr:`stops`."""
        return tuple(text for text in map(self._text, self.stops) if text)

    @cached_property
    def structural(self) -> dict[str, int]:
        """Special tokens that no text of the data may contain: they would end or start turns or images. Text to id.

        These are the tokens that the template prints, those that end a turn, bos, eos, pad and unk, and those that the
        processor names. Other special tokens (Qwen's ``<|box_start|>``) are allowed in texts.
        """
        names = [n for n in vars(self.processor) if n.endswith("_token")]
        named = [getattr(self.processor, name) for name in names]
        tokens = [
            *named,
            *(getattr(self.tokenizer, f"{n}_token", None) for n in ("bos", "eos", "pad", "unk")),
        ]
        ids = {self.tokenizer.convert_tokens_to_ids(token) for token in tokens if isinstance(token, str)}
        try:
            printed = (
                self._chat(_turns("user", "assistant", "user"), generation=True) if self.is_there else ""
            )
        except DataError:  # rows that the template refuses are reported row by row
            printed = ""
        ids |= set(self._ids(printed)) | set(self.stops)
        return {self._text(i): i for i in ids if i in self._special_ids and self._text(i)}

    def check_texts(self, example: Example, texts: Iterable[tuple[str, str]]) -> None:
        """Refuse a row whose texts contain a special token of the checkpoint.

        Args:
            example: its prompt is checked.
            texts: (key, text) of responses; an end token at the end is allowed.

        Raises:
            RefusedRowError: with the token and the key.
        """
        prompt = [
            (f"prompt[{i}]", part)
            for i, turn in enumerate(example.prompt)
            for part in (*turn.texts, turn.more)
            if part
        ]
        bare = ((key, without_ends(text, self._end_texts)) for key, text in texts)
        for key, text in (*prompt, *bare):
            for token in self.structural:
                if token in text:
                    raise RefusedRowError(
                        example.where or example.id,
                        "special-token",
                        key,
                        f"the text contains {token!r}, a special token of this checkpoint, which the model would not "
                        "see as text",
                        "write it differently, or leave the row out",
                    )

    # --- rendering -------------------------------------------------------------------------------------

    def _turns_of(self, example: Example, response: str | None) -> tuple[list[Message], list[Any]]:
        where = example.where or example.id
        prompt, tools = without_tools(example.prompt)
        turns = [*prompt, *([] if response is None else [Message("assistant", (response,))])]
        self._check_tools(where, prompt, tools)
        return [self._checked(where, turn) for turn in turns], tools

    def _checked(self, where: str, turn: Message) -> Message:
        """The turn; an error if the template does not take its role."""
        style = self._style(turn.role)
        if style not in ("blocks", "text"):
            raise RefusedRowError(
                where, "template-refuses", "", f"the chat template takes no {turn.role} turn ({style})",
                "leave such turns out, or set another chat template",
            )  # fmt: skip
        return turn

    def asked(self, texts: Iterable[tuple[Example, Iterable[str]]]) -> Asked:
        """What to render of rows and responses, for :meth:`foresee`."""
        orders: dict[tuple[int, str | None], Order] = {}
        numbers: dict[tuple[Message, ...], int] = {}
        for example, said in texts if self.is_there else ():
            with contextlib.suppress(DataError):  # rendering it alone reports the error
                number = numbers.setdefault(example.prompt, len(numbers))
                turns, tools = self._turns_of(example, None)
                chat = [*map(self._as_chat, turns)]
                orders[number, None] = chat, True, tools
                for response in said:
                    answer = self._checked(example.where or example.id, Message("assistant", (response,)))
                    orders[number, response] = [*chat, self._as_chat(answer)], False, tools
        return Asked(numbers, orders)

    def rendered(self, asked: Asked) -> list[str | None]:
        """The texts of all orders, from one message to the renderer. May be called in another thread."""
        return self._renderer.many(list(asked.orders.values()))

    def foresee(self, asked: Asked, texts: Sequence[str | None]) -> None:
        """Take these results in later calls, until others are named."""
        found = zip(asked.orders, texts, strict=True)
        self._numbers = asked.numbers
        self._foreseen = {key: text for key, text in found if text is not None}

    def _render_row(self, example: Example, response: str | None) -> str:
        number = self._numbers.get(example.prompt, -1)
        if (known := self._foreseen.get((number, response))) is not None:
            return known
        if not self.is_there:
            return self._bare(example, response)
        turns, tools = self._turns_of(example, response)
        where = example.where or example.id
        try:
            return self._chat(turns, generation=response is None, tools=tools)
        except DataError as error:
            raise RefusedRowError(
                where, "template-refuses", "", f"the chat template refuses the row ({error})",
                "change the row, or leave it out",
            ) from error  # fmt: skip

    def _bare(self, example: Example, response: str | None) -> str:
        """Without a template a prompt is the text of one user turn, then a line break."""
        if [turn.role for turn in example.prompt] != ["user"]:
            raise RefusedRowError(
                example.where or example.id, "template-refuses", "",
                "the checkpoint has no chat template, so a prompt is one user turn",
                "leave the row out, or give the checkpoint a chat template",
            )  # fmt: skip
        return f"{self._joined(example.prompt[0])}\n{response or ''}"

    def _check_tools(self, where: str, prompt: Sequence[Message], tools: Sequence[Any]) -> None:
        """Refuse a row of which the template would drop tools or calls without a word."""
        calls = any("tool_calls" in turn.further for turn in prompt)
        for there, key, printed in (
            (tools, "tools", self._prints_tools),
            (calls, "tool_calls", self._prints_calls),
        ):
            if there and not printed:
                raise RefusedRowError(
                    where, "template-refuses", key, f"the chat template does not print {key}",
                    "leave such rows out, or set another chat template",
                )  # fmt: skip

    @cached_property
    def _prints_tools(self) -> bool:
        """Whether names, descriptions and parameters of tools reach the prompt."""
        return self._prints(_turns("user"), [TOOL], ("zq_tool", "zq description", "zq_key", "zq meaning"))

    @cached_property
    def _prints_calls(self) -> bool:
        """Whether an assistant turn's calls reach the prompt: name, argument and value."""
        turns = [*_turns("user"), CALLS, Message("tool", ("a",), ANSWERS), *_turns("assistant", "user")]
        return self._prints(turns, [TOOL], ("zq_tool", "zq_key", "zq value")) and self._prints(
            turns, [], ("zq_tool", "zq_key", "zq value")
        )

    def _prints(self, turns: Sequence[Message], tools: Sequence[Any], words: Iterable[str]) -> bool:
        for turn in turns:
            self._style(turn.role)
        try:
            text = self._chat(turns, generation=True, tools=tools)
        except DataError:
            return False
        return all(word in text for word in words)

    def _chat(self, turns: Sequence[Message], *, generation: bool, tools: Sequence[Any] = ()) -> str:
        return self._renderer([self._as_chat(turn) for turn in turns], generation=generation, tools=tools)

    def _as_chat(self, turn: Message) -> dict[str, Any]:
        if self._styles.get(turn.role, "blocks") == "text":
            return {"role": turn.role, "content": self._joined(turn), **turn.further}
        return turn.as_chat()

    def _joined(self, turn: Message) -> str:
        marks: dict[Place | None, str] = {None: "image", VIDEO: "video"}
        tokens = {p: getattr(self.processor, f"{name}_token", f"<{name}>") for p, name in marks.items()}
        return "".join(part if isinstance(part, str) else tokens[part] for part in turn.parts)

    def _style(self, role: str) -> Style | str:
        """How the contents of a role are passed to the template, or why it does not take this role."""
        if role not in self._styles:
            before = {"user": [], "system": [], "assistant": ["user"]}.get(role, ["user", "assistant"])
            for other in before:
                self._style(other)
            if role == "system":
                self._style("user")
            after = ["user"] if role == "system" else []
            reasons: list[str] = []
            for style in ("blocks", "text"):
                self._styles[role] = style
                turn = Message(role, (PROBE,))
                opening = _turns(*before)
                if role == "tool":  # what it gave to a call
                    opening, turn = [*_turns("user"), CALLS], Message(role, (PROBE,), ANSWERS)
                try:
                    text = self._chat([*opening, turn, *_turns(*after)], generation=False)
                except DataError as error:
                    reasons.append(str(error))
                    continue
                if PROBE in text:
                    return style
                reasons.append("it does not print their text")
            self._styles[role] = reasons[-1]
        return self._styles[role]

    def _behind_a_response(self) -> tuple[str, str]:
        """Text that the template writes after the last response, and after a response before a user turn."""
        if not self.is_there:
            return "", ""
        probe, found = Message("assistant", (PROBE,)), []
        for role in ("user", "assistant"):
            self._style(role)
        for after in ([], _turns("user")):
            try:
                text = self._chat([*_turns("user"), probe, *after], generation=False)
            except DataError:  # rows that the template refuses are reported row by row
                text = ""
            found.append(text.rpartition(PROBE)[2] if PROBE in text else "")
        return found[0], found[1]

    # --- tokens ----------------------------------------------------------------------------------------

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return frozenset(self.tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text(self, token: int) -> str:
        found = self.tokenizer.convert_ids_to_tokens(token)
        return found if isinstance(found, str) else ""


def _turns(*roles: str) -> list[Message]:
    return [Message(role, ("a",)) for role in roles]
