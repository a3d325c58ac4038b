"""MT-Bench: its questions, references and grading prompts read from a folder, and a member's answers to it, saved as
they are sampled. How the answers are graded is in judge.py.

The folder holds question.jsonl, judge_prompts.jsonl and reference_answer/gpt-4.jsonl: a copy of a FastChat checkout's
fastchat/llm_judge/data/mt_bench, where the prompts lie in the folder above. None of it is part of this repository.
"""

import itertools
from pathlib import Path

from lib import hub, record
from lib.errors import MissingError, StudyError

# FastChat's sampling temperature for each category, 0.7 where it names none.
TEMPERATURES = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}
WITH_REFERENCE = ("math", "reasoning", "coding")
PROMPTS = ("single-v1", "single-v1-multi-turn", "single-math-v1", "single-math-v1-multi-turn")
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
    if not paths[1].exists():  # as in a FastChat checkout
        paths[1] = folder.parent / FILES[1]
    for path in paths:
        if not path.is_file():
            raise MissingError(str(path), "not there", "MT-Bench's files", f"{HOW_TO_GET}, or name another folder")
    questions, prompts, references = map(record.read_jsonl, paths)
    try:
        rows = [{"id": row["question_id"], "category": row["category"], "turns": row["turns"]} for row in questions]
        asked = {row["id"]: row for row in rows}
        guides = {row["question_id"]: row["choices"][0]["turns"][:2] for row in references}
        prompts = {row["name"]: row for row in prompts}
    except (KeyError, IndexError, TypeError) as error:
        raise StudyError(str(folder), f"a row without {error}", "rows as in FastChat's files") from None
    without = [i for i, row in asked.items() if row["category"] in WITH_REFERENCE and i not in guides]
    lacking = [f"reference for question {i}" for i in without] + [f"prompt {n}" for n in PROMPTS if n not in prompts]
    if lacking or not asked:
        found = f"no {', '.join(lacking) or 'question'}"
        raise StudyError(str(folder), found, "questions, FastChat's prompts, references for math, reasoning and coding")
    return {"questions": asked, "references": guides, "prompts": prompts}


def temperature_of(question: dict) -> float:
    return TEMPERATURES.get(question["category"], 0.7)


def batches(bench: dict, size: int, count: int | None = None) -> list[tuple[float, list[dict]]]:
    """(temperature, questions) in a fixed order: a resumed member samples the same batches as an undisturbed one.
    `count`: only the first so many questions."""
    rows = sorted((bench["questions"][number] for number in sorted(bench["questions"])[:count]), key=temperature_of)
    alike = [(t, list(mine)) for t, mine in itertools.groupby(rows, temperature_of)]
    return [(t, mine[start : start + size]) for t, mine in alike for start in range(0, len(mine), size)]


def answer(
    model, tokenizer, bench: dict, path: Path, *, seed: int, batch_size: int, count: int | None = None, **options
) -> list[dict]:
    """Both turns of every question in the model's chat template, the second after the model's own first answer; written
    to `path` batch by batch. A batch with its answers there is not asked again: a kill costs one batch.

    Each row: question (id), category, turn, text, length (tokens, the end token included), finished, temperature, asked
    (digest of the question). The answers depend on `seed`, the batch size and the model, not on where a run was
    interrupted. `options` go to the sampling.
    """
    from lib.td_dpo import engine  # torch: a configuration is checked without it

    rows = record.read_jsonl(path)
    for number, (temperature, questions) in enumerate(batches(bench, batch_size, count)):
        asked = {question["id"]: record.digest(question["turns"]) for question in questions}
        if asked.keys() <= {row["question"] for row in rows}:
            continue
        settings = {"seed": 1000 * seed + number, "temperature": temperature, "batch_size": batch_size, **options}
        for row in engine.answer_questions(model, tokenizer, questions, **settings):
            saved = {name: row[name] for name in ("question", "category", "turn", "text", "length", "finished")}
            rows.append({**saved, "temperature": temperature, "asked": asked[row["question"]]})
        record.write_jsonl(path, rows)
    return sorted(rows, key=lambda row: (row["question"], row["turn"]))
