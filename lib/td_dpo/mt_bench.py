"""MT-Bench: its questions, references and grading prompts read from a folder, and its ratings read from a judge's
reply.

The folder holds question.jsonl, judge_prompts.jsonl and reference_answer/gpt-4.jsonl (a copy of a FastChat checkout's
fastchat/llm_judge/data/mt_bench, beside which the prompts lie there). Nothing of it is part of this repository.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lib import hub, record
from lib.errors import MissingError, StudyError
from lib.run import keys

# FastChat's per-category sampling temperatures; what it does not name it samples at 0.7.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
WITH_REFERENCE = ("math", "reasoning", "coding")
WRONG_REFERENCES = frozenset({104, 105, 109, 111, 113, 114, 120, 122, 124, 125, 126, 128, 130})
_RATINGS = (re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]"), re.compile(r"\[(\d+(?:\.\d+)?)\]"))
_FILES = ("question.jsonl", "judge_prompts.jsonl", "reference_answer/gpt-4.jsonl")


HOW_TO_GET = (
    "git clone --depth 1 https://github.com/lm-sys/FastChat && mkdir -p .cache && "
    "cp -r FastChat/fastchat/llm_judge/data/{mt_bench,judge_prompts.jsonl} .cache/"
)


def _place(folder: Path, name: str) -> Path:
    """A file of MT-Bench's; the prompts may lie beside the folder, as in a FastChat checkout."""
    beside = folder.parent / name
    return (
        beside if name == "judge_prompts.jsonl" and not (folder / name).exists() and beside.is_file() else folder / name
    )


def read(folder: str | Path) -> dict:
    """{"questions": {id: row}, "references": {id: two turns}, "prompts": {name: row}}; every fault names its file. A
    relative path is looked for in the working directory, then in the repository."""
    folder = hub.local_path(str(folder)) or Path(folder).expanduser()
    for name in _FILES:
        if not _place(folder, name).is_file():
            raise MissingError(
                str(folder / name), "not there", "MT-Bench's files", f"{HOW_TO_GET}, or name another folder"
            )
    questions, prompts, references = (record.read_jsonl(_place(folder, name)) for name in _FILES)
    try:
        made = {
            "questions": {
                q["question_id"]: {"id": q["question_id"], "category": q["category"], "turns": q["turns"]}
                for q in questions
            },
            "references": {r["question_id"]: r["choices"][0]["turns"] for r in references},
            "prompts": {p["name"]: p for p in prompts},
        }
    except (KeyError, IndexError, TypeError) as error:
        raise StudyError(str(folder), f"a row without {error}", "rows as in FastChat's files") from None
    without = [
        i for i, q in made["questions"].items() if q["category"] in WITH_REFERENCE and i not in made["references"]
    ]
    if without or not made["questions"]:
        raise StudyError(
            str(folder),
            f"no reference for questions {without}" if without else "no question",
            "questions, and a reference for each of math, reasoning and coding",
        )
    return made


def digest(question: dict) -> str:
    """Of what a question asks in its two turns: whether it is the one that was answered."""
    return keys.digest(question["turns"])


def messages(bench: dict, question: dict, answers: Sequence[str], turn: int) -> list[dict]:
    """FastChat's single-answer grading request for `turn` (1 or 2); `answers` holds the model's answers up to it."""
    guided = question["category"] in WITH_REFERENCE
    name = f"single-{'math-' if guided else ''}v1{'-multi-turn' if turn == 2 else ''}"
    if name not in bench["prompts"]:
        raise StudyError("judge_prompts.jsonl", f"no prompt {name}", "FastChat's four single-answer prompts")
    values = (
        {"question": question["turns"][0], "answer": answers[0]}
        if turn == 1
        else {
            "question_1": question["turns"][0],
            "question_2": question["turns"][1],
            "answer_1": answers[0],
            "answer_2": answers[1],
        }
    )
    if guided:
        values |= {f"ref_answer_{k}": text for k, text in enumerate(bench["references"][question["id"]][:2], 1)}
    prompt = bench["prompts"][name]
    return [
        {"role": "system", "content": prompt["system_prompt"]},
        {"role": "user", "content": prompt["prompt_template"].format(**values)},
    ]


def rating(reply: str) -> float | None:
    """The one rating from 1 to 10 in `reply`: [[x]], else [x]. None where there is none, one outside the scale, or two
    that differ (FastChat would take the first of these; here such a reply is not a grade)."""
    for pattern in _RATINGS:
        found = {float(number) for number in pattern.findall(reply)}
        if found:
            value = found.pop()
            return value if not found and 1 <= value <= 10 else None
    return None


def summary(graded: Sequence[dict]) -> dict:
    """Scores of graded answers (question, category, turn, score). A missing grade is counted and left out of the means,
    never read as 0. `corrected` leaves out the questions whose reference is known to be wrong."""

    def mean(rows):
        present = [row["score"] for row in rows if row["score"] is not None]
        return sum(present) / len(present) if present else None

    return {
        "mt_bench_score": mean(graded),
        "mt_bench_score_corrected": mean([row for row in graded if row["question"] not in WRONG_REFERENCES]),
        "unparsed": sum(row["score"] is None for row in graded),
        "graded": sum(row["score"] is not None for row in graded),
        "by_turn": {str(turn): mean([r for r in graded if r["turn"] == turn]) for turn in (1, 2)},
        "by_category": {
            c: mean([r for r in graded if r["category"] == c]) for c in sorted({r["category"] for r in graded})
        },
    }
