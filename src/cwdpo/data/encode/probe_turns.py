"""Turns with which a chat template is tried: their words stand in no template."""

from __future__ import annotations

import json

from cwdpo.records import Message

PROBE = 'it\'s "so"\nand so'
"""If a template prints it as part of a list or as JSON, its quotes or its line break are escaped."""
TOOL = {
    "type": "function",
    "function": {
        "name": "zq_tool",
        "description": "zq description",
        "parameters": {
            "type": "object",
            "properties": {"zq_key": {"type": "string", "description": "zq meaning"}},
            "required": ["zq_key"],
        },
    },
}
"""A tool whose words no template holds."""
_CALL = {
    "type": "function", "id": "zqzqzqzq0", "function": {"name": "zq_tool", "arguments": {"zq_key": "zq value"}},
}  # fmt: skip
CALLS = Message("assistant", (), json.dumps({"tool_calls": [_CALL]}))
ANSWERS = json.dumps({"name": "zq_tool", "tool_call_id": "zqzqzqzq0"})
