"""MT-Bench: its questions, references and grading prompts read from a folder, and a member's answers to it, saved as
they are sampled. How the answers are graded is in judge.py.

The folder holds question.jsonl, judge_prompts.jsonl and reference_answer/gpt-4.jsonl (a copy of a FastChat checkout's
fastchat/llm_judge/data/mt_bench, beside which the prompts lie there). Nothing of it is part of this repository.
"""

from __future__ import annotations

from pathlib import Path

from lib import hub, record
from lib.errors import MissingError, StudyError

# FastChat's sampling temperature for each category, 0.7 where it names none.
TEMPERATURES = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}
WITH_REFERENCE = ("math", "reasoning", "coding")
FILES = ("question.jsonl", "judge_prompts.jsonl", "reference_answer/gpt-4.jsonl")
HOW_TO_GET = (
    "git clone --depth 1 https://github.com/lm-sys/FastChat && mkdir -p .cache && "
    "cp -r FastChat/fastchat/llm_judge/data/{mt_bench,judge_prompts.jsonl} .cache/"
)


def read(folder: str | Path) -> dict:
    """{"questions": {id: row}, "references": {id: two turns}, "prompts": {name: row}}; every fault names its file. A
    relative path is looked for in the working directory, then in the repository."""
    folder = hub.local_path(str(folder)) or Path(folder).expanduser()
    paths = [folder / name for name in FILES]
    if not paths[1].exists() and (folder.parent / FILES[1]).is_file():  # as in a FastChat checkout
        paths[1] = folder.parent / FILES[1]
    for path in paths:
        if not path.is_file():
            raise MissingError(str(path), "not there", "MT-Bench's files", f"{HOW_TO_GET}, or name another folder")
    questions, prompts, references = map(record.read_jsonl, paths)
    try:
        bench = {
            "questions": {
                row["question_id"]: {"id": row["question_id"], "category": row["category"], "turns": row["turns"]}
                for row in questions
            },
            "references": {row["question_id"]: row["choices"][0]["turns"] for row in references},
            "prompts": {row["name"]: row for row in prompts},
        }
    except (KeyError, IndexError, TypeError) as error:
        raise StudyError(str(folder), f"a row without {error}", "rows as in FastChat's files") from None
    guided = [number for number, row in bench["questions"].items() if row["category"] in WITH_REFERENCE]
    without = [number for number in guided if number not in bench["references"]]
    if without or not questions:
        found = f"no reference for questions {without}" if without else "no question"
        raise StudyError(str(folder), found, "questions, and a reference for each of math, reasoning and coding")
    return bench


def digest(question: dict) -> str:
    """Identifies what a question asks in its two turns."""
    return record.digest(question["turns"])


def batches(bench: dict, size: int, count: int | None = None) -> list[tuple[float, list[dict]]]:
    """(temperature, questions) in a fixed order: a resumed member samples the same batches as an undisturbed one.
    `count`: only the first so many questions."""
    by_temperature: dict[float, list[dict]] = {}
    for number in sorted(bench["questions"])[:count]:
        question = bench["questions"][number]
        by_temperature.setdefault(TEMPERATURES.get(question["category"], 0.7), []).append(question)
    return [
        (temperature, rows[start : start + size])
        for temperature, rows in sorted(by_temperature.items())
        for start in range(0, len(rows), size)
    ]


def answer(
    model,
    tokenizer,
    bench: dict,
    path: Path,
    *,
    seed: int,
    max_new_tokens: int,
    batch_size: int,
    count: int | None = None,
) -> list[dict]:
    """Both turns of every question in the model's chat template, the second after the model's own first answer;
    appended to `path` batch by batch. Questions with both answers there are not asked again: a kill costs one batch.

    Each row: question (id), category, turn, text, length (tokens, the end token included), finished, temperature, asked
    (digest of the question). The answers depend on `seed`, the batch size and the model, not on where a run was
    interrupted.
    """
    from lib.td_dpo import engine  # torch: a configuration is checked without it

    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {(row["question"], row["turn"]): row for row in record.read_jsonl(path)}
    if kept:  # cuts off a torn line, which the next row would continue
        record.write_jsonl(path, kept.values())
    for number, (temperature, questions) in enumerate(batches(bench, batch_size, count)):
        if all((question["id"], turn) in kept for question in questions for turn in (1, 2)):
            continue
        rows = engine.answer_questions(
            model,
            tokenizer,
            questions,
            seed=1000 * seed + number,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        for row in rows:
            saved = {name: row[name] for name in ("question", "category", "turn", "text", "length", "finished")}
            saved |= {"temperature": temperature, "asked": digest(bench["questions"][row["question"]])}
            if (row["question"], row["turn"]) not in kept:
                record.append_jsonl(path, saved)
                kept[row["question"], row["turn"]] = saved
    return [kept[key] for key in sorted(kept)]
