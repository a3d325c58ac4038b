"""One row of any understood layout becomes one preference pair, or a fault that names what is wrong with it.

Layouts: chosen/rejected as message lists or strings, with or without `prompt`; prompt|instruction with completion_a,
completion_b and choice. A pair: {"prompt": [messages, the last from the user], "chosen": [one assistant message],
"rejected": [one assistant message], "row": int}.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

MAX_ROW_CHARACTERS = 1_000_000
ROLES = ("system", "user", "assistant")
TURN = re.compile(r"\n\n(Human|Assistant):")  # the markup of HH-RLHF
LETTERS = {"a": 0, "b": 1, "completion_a": 0, "completion_b": 1}
LAYOUTS = (
    "chosen and rejected (with or without prompt), or prompt|instruction with completion_a, completion_b and choice"
)


class BadRow(Exception):
    """What is wrong with one row: `kind` is the same for all rows with this fault, `detail` says what this row
    holds."""

    def __init__(self, kind: str, detail: str = ""):
        self.kind, self.detail = kind, detail
        super().__init__(f"{kind}: {detail}" if detail else kind)


def characters(value: Any) -> int:
    """Number of characters of text anywhere in a row."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(characters(item) for item in value.values())
    return sum(characters(item) for item in value) if isinstance(value, (list, tuple)) else 0


def shown(value: Any, limit: int = 60) -> str:
    """A value for an error message: its type and its beginning."""
    text = repr(value[: 2 * limit] if isinstance(value, (str, list)) else value)
    return f"{type(value).__name__} {text[:limit]}{'...' if len(text) > limit else ''}"


def text(value: Any, column: str) -> str:
    """A string that can be encoded, or a fault."""
    if not isinstance(value, str):
        raise BadRow(f"wrong type in {column} (expected text)", shown(value))
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"text in {column} that is not valid Unicode (a lone surrogate)", ascii(value[:40])) from None
    return value


def messages(value: list, column: str) -> list[dict]:
    """A checked message list: [{"role", "content"}, ...]; further keys of a message are left behind."""
    found = []
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise BadRow(f"wrong type in {column} (expected messages with role and content)", shown(message))
        if message["role"] not in ROLES:
            raise BadRow(f"unknown role in {column} (expected {', '.join(ROLES)})", shown(message["role"]))
        found.append({"role": message["role"], "content": text(message["content"], f"{column}.content")})
    return found


def parse_turns(transcript: str) -> list[dict]:
    """Messages of an HH-RLHF transcript ('\\n\\nHuman: ...\\n\\nAssistant: ...'); text before the first is the
    system's."""
    head, *rest = TURN.split(transcript)
    turns = [{"role": "system", "content": head.strip()}] if head.strip() else []
    for speaker, content in zip(rest[::2], rest[1::2], strict=True):
        turns.append({"role": "user" if speaker == "Human" else "assistant", "content": content.strip()})
    return turns


def prompt_messages(value: Any, column: str) -> list[dict]:
    """A prompt column as messages: a message list, an HH-RLHF transcript that ends with 'Assistant:', or one user
    turn."""
    if isinstance(value, (list, tuple)):
        return messages(list(value), column)
    value = text(value, column)
    if re.search(r"\n\nAssistant:\s*$", value):
        return parse_turns(value[: value.rindex("\n\nAssistant:")])
    return [{"role": "user", "content": value}]


def split_transcripts(chosen: str, rejected: str) -> tuple[list[dict], str, str]:
    """(prompt, chosen, rejected) of two strings without a prompt: what they share up to the last '\\n\\nAssistant:'."""
    shared = os.path.commonprefix([chosen, rejected])
    cut = shared.rfind("\n\nAssistant:")
    if cut < 0:
        raise BadRow(
            "chosen and rejected are strings that share no prompt (expected a prompt column, or a common beginning up to "
            "'\\n\\nAssistant:')",
            shown(chosen),
        )
    end = cut + len("\n\nAssistant:")
    answers = chosen[end:].strip(), rejected[end:].strip()
    if any(TURN.search("\n\n" + answer) for answer in answers):  # the conversations part before their last answers
        raise BadRow("chosen and rejected have different prompts", shown(chosen[end:]))
    return parse_turns(chosen[:cut]), *answers


def split_conversations(
    chosen: list[dict], rejected: list[dict], prompt: list[dict] | None
) -> tuple[list[dict], str, str]:
    """(prompt, chosen, rejected) of two message lists; `prompt` from its own column, or None: then all but the last
    message."""
    for name, conversation in (("chosen", chosen), ("rejected", rejected)):
        if not conversation:
            raise BadRow(f"empty {name}", "no messages")
        if conversation[-1]["role"] != "assistant":
            raise BadRow(f"{name} does not end with an assistant turn", f"ends with {conversation[-1]['role']}")
    lead, other = chosen[:-1], rejected[:-1]
    if lead != other:
        raise BadRow("chosen and rejected have different prompts", shown((lead or other)[-1]["content"]))
    if prompt is None and not lead:
        raise BadRow(
            "no prompt (expected a prompt column, or the prompt's messages at the head of chosen and rejected)"
        )
    if prompt is not None and lead:
        # Many sets give the full conversations and repeat the user's request, as a string, in `prompt`.
        contents = [message["content"].strip() for message in lead]
        if lead != prompt and not all(message["content"].strip() in contents for message in prompt):
            raise BadRow(
                "the prompt column disagrees with the conversation in chosen",
                shown(prompt[-1]["content"] if prompt else ""),
            )
    return lead or prompt, chosen[-1]["content"], rejected[-1]["content"]


def choose(row: dict, base: int) -> tuple[Any, Any]:
    """(chosen, rejected) of completion_a, completion_b and choice; `base` is the number that means completion_a."""
    key = str(row["choice"]).strip().lower()
    first = LETTERS.get(key)
    if first is None and choice_number(row["choice"]) is not None:
        first = choice_number(row["choice"]) - base
    if first not in (0, 1):
        raise BadRow(
            "choice that names neither completion (expected a or b, completion_a or completion_b, 0/1, or 1/2)",
            shown(row["choice"]),
        )
    answers = row["completion_a"], row["completion_b"]
    return answers[first], answers[1 - first]


def choice_number(value: Any) -> int | None:
    """0, 1 or 2 where a choice is that number (also '1' and 1.0); None for everything else, booleans included."""
    if isinstance(value, bool):
        return None
    try:
        return int(float(value)) if float(value) in (0.0, 1.0, 2.0) else None
    except (TypeError, ValueError):
        return None


def unpack(value: Any) -> Any:
    """A CSV cell that holds a message list as JSON becomes that list; everything else is left as it is."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def to_pair(row: Any, number: int, layout: str, base: int = 0) -> dict:
    """A checked pair of source row `number` (0-based); raises BadRow. `layout` is 'pair' or 'choice'."""
    if not isinstance(row, dict):
        raise BadRow("a row that is not an object with named columns", shown(row))
    size = characters(row)
    if size > MAX_ROW_CHARACTERS:
        raise BadRow(f"a row of more than {MAX_ROW_CHARACTERS:,} characters", f"{size:,} characters")
    asked = next((name for name in ("prompt", "instruction") if row.get(name) is not None), None)
    needed = ["chosen", "rejected"] if layout == "pair" else ["completion_a", "completion_b", "choice"]
    for name in needed + (["prompt"] if layout == "choice" and asked is None else []):
        if row.get(name) is None:
            raise BadRow(f"missing {name}", "the column is absent or null")
    chosen, rejected = (row["chosen"], row["rejected"]) if layout == "pair" else choose(row, base)
    prompt = prompt_messages(row[asked], asked) if asked else None
    if (
        asked == "instruction" and isinstance(row.get("input"), str) and row["input"].strip()
    ):  # Alpaca's second half of a request
        prompt[-1]["content"] += "\n\n" + text(row["input"], "input")
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = split_conversations(
            messages(chosen, "chosen"), messages(rejected, "rejected"), prompt
        )
    elif isinstance(chosen, str) and isinstance(rejected, str):
        chosen, rejected = text(chosen, "chosen"), text(rejected, "rejected")
        if prompt is None and chosen.strip() and rejected.strip():
            prompt, chosen, rejected = split_transcripts(chosen, rejected)
    else:
        raise BadRow(
            "wrong type in chosen or rejected (expected both text, or both message lists)",
            f"{shown(chosen)}; {shown(rejected)}",
        )
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise BadRow(f"empty {name}")
    if chosen.strip() == rejected.strip():
        raise BadRow("identical chosen and rejected", shown(chosen))
    if not prompt or prompt[-1]["role"] != "user":
        raise BadRow(
            "prompt that does not end with a user turn", f"ends with {prompt[-1]['role']}" if prompt else "no turns"
        )
    if not prompt[-1]["content"].strip():
        raise BadRow("empty prompt")
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "row": number,
    }
