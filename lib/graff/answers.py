"""GSM8K's texts and what counts as an answer: extraction by the two filters of lm-evaluation-harness's gsm8k task."""

from __future__ import annotations

import re

from lib.errors import StudyError

STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
ANNOTATION = re.compile(r"<<[^<>]*>>")


def clean(text: str) -> str:
    """Without `,` and `$` and a trailing dot, as the harness's exact match ignores them."""
    return re.sub(r"\.$", "", re.sub(r"[,$]", "", text.strip()))


def strict(text: str) -> str | None:
    """The first `#### number`."""
    found = STRICT.search(text)
    return clean(found.group(1)) if found else None


def flexible(text: str) -> str | None:
    """The last thing that looks like a number."""
    found = FLEXIBLE.findall(text)
    return clean(next(filter(None, found[-1]))) if found else None


def reference(answer: str, where: str = "answer") -> str:
    """The number after `####`. Raises StudyError where there is none."""
    found = strict(answer)
    if found is None:
        raise StudyError(where, f"no '#### number' in {answer[:60]!r}", "GSM8K's form: rationale, then '#### number'")
    return found


def target(answer: str) -> str:
    """What the model learns to write: the rationale without calculator annotations, then '#### N'."""
    return ANNOTATION.sub("", answer).strip()
