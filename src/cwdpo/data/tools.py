"""Tools in a row, as TRL and OpenAI write them: column ``tools``, ``tool_calls``, turns of the role ``tool``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cwdpo.data.columns import present
from cwdpo.data.problems import RowError, shown
from cwdpo.data.rowparts import Row
from cwdpo.data.texts import plain_text, wrong_type
from cwdpo.records import TOOLS, Message

_TOOL = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}'
_CALL = '{"type": "function", "function": {"name": ..., "arguments": {...}}}'

_CALLING = frozenset(("tool_calls", "function_call", "tool_call_id"))


def tools_of(row: Row) -> tuple[Message, ...]:
    """The row's tools as the first message of its prompt (role :data:`cwdpo.records.TOOLS`); nothing without tools.

    The column is a list, or a list in JSON, as tables hold it.

    Raises:
        RowError: it is neither, or a tool has no name.
    """
    row.used.add("tools")
    value = row.values.get("tools")
    if not present(value):
        return ()
    if isinstance(value, str):
        value = _parsed(value, "tools", "a list of tools in JSON")
    if not isinstance(value, list):
        raise wrong_type("tools", value, f"a list of {_TOOL}")
    tools = []
    for i, tool in enumerate(_without_nulls(value)):
        where = f"tools[{i}]"
        if not isinstance(tool, dict):
            raise wrong_type(where, tool, _TOOL)
        function = tool.get("function") if "function" in tool else tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("no-tool-name", where, f"{shown(tool, 60)}; allowed: {_TOOL}", "give it a name")
        tools.append({"type": "function", "function": function})
    plain_text(text := json.dumps(tools, ensure_ascii=False), "tools")
    return (Message(TOOLS, (text,)),)


def more_of(message: Mapping[str, Any], role: str, where: str) -> str:
    """What a turn has beside its content, in JSON: ``tool_calls`` of an assistant, ``name`` and id of a tool's turn.

    Raises:
        RowError: such a key in another turn, or a call without name or with arguments that are no object.
    """
    if role != "tool" and _CALLING.isdisjoint(message):  # most turns
        return ""
    keys = [k for k in ("tool_calls", "function_call", "tool_call_id") if present(message.get(k))]
    allowed = {"assistant": "tool_calls", "tool": "tool_call_id"}.get(role)
    if wrong := [key for key in keys if key != allowed]:
        remedy = (
            "write it as 'tool_calls': [{'function': {...}}]"
            if wrong[0] == "function_call"
            else "calls are in assistant turns, their ids in turns of the role 'tool'"
        )
        raise RowError(
            "turn-not-read",
            f"{where}.{wrong[0]}",
            f"{shown(message[wrong[0]], 60)} in a turn of {role}",
            remedy,
        )
    more: dict[str, Any] = {}
    if role == "tool":
        more = {key: str(message[key]) for key in ("name", "tool_call_id") if present(message.get(key))}
    elif keys:
        calls = message["tool_calls"]
        if not isinstance(calls, list):
            raise wrong_type(f"{where}.tool_calls", calls, f"a list of {_CALL}")
        more = {"tool_calls": [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]}
    return plain_text(json.dumps(more, ensure_ascii=False), where) if more else ""


def _call(call: Any, where: str) -> dict[str, Any]:
    call = _without_nulls(call)
    function = call.get("function") if isinstance(call, dict) and "function" in call else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("no-tool-name", where, f"{shown(call, 60)}; allowed: {_CALL}", "name the function")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI's API writes them as JSON in a string; templates want the object
        arguments = _parsed(arguments, f"{where}.function.arguments", "an object in JSON")
    if not isinstance(arguments, dict):
        raise wrong_type(f"{where}.function.arguments", arguments, "an object, or one in JSON")
    id_ = {"id": str(call["id"])} if present(call.get("id")) else {}
    return {"type": "function", **id_, "function": {"name": function["name"], "arguments": arguments}}


def _parsed(text: str, where: str, allowed: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowError(
            "wrong-type", where, f"{shown(text, 60)} is no JSON; allowed: {allowed}", f"make it {allowed}"
        ) from None


def _without_nulls(value: Any) -> Any:
    """Tables give every row the keys of all others: those of other tools are null."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value
