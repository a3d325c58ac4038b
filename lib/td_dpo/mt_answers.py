"""A member's answers to MT-Bench, saved as they are made: two turns, FastChat's temperature for each category."""

from __future__ import annotations

from pathlib import Path

from lib import record
from lib.td_dpo import mt_bench, sampling


def batches(bench: dict, size: int, count: int | None = None) -> list[tuple[float, list[dict]]]:
    """(temperature, questions) in a fixed order: a resumed member makes the very batches that an undisturbed one does.
    `count`: only the first so many questions."""
    by_temperature: dict[float, list[dict]] = {}
    for number in sorted(bench["questions"])[:count]:
        question = bench["questions"][number]
        by_temperature.setdefault(mt_bench.TEMPERATURES.get(question["category"], 0.7), []).append(question)
    return [
        (heat, rows[k : k + size]) for heat, rows in sorted(by_temperature.items()) for k in range(0, len(rows), size)
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
    """Both turns of every question in the model's chat template, the second after its own first answer; appended to
    `path` batch by batch. Questions with both answers there are not asked again: a kill costs at most one batch.

    Each row: question (id), category, turn, text, length (tokens, the end token included), finished, temperature, asked
    (digest of the question). The answers depend on `seed`, the batch size and the model; not on where a run was
    interrupted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {(row["question"], row["turn"]): row for row in record.read_jsonl(path)}
    if kept:  # cuts off a torn line, which the next row would continue
        record.write_jsonl(path, kept.values())
    for number, (heat, questions) in enumerate(batches(bench, batch_size, count)):
        if all((q["id"], turn) in kept for q in questions for turn in (1, 2)):
            continue
        made = sampling.answer_questions(
            model,
            tokenizer,
            questions,
            seed=1000 * seed + number,
            temperature=heat,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        for row in made:
            saved = {k: row[k] for k in ("question", "category", "turn", "text", "length", "finished")} | {
                "temperature": heat,
                "asked": mt_bench.digest(bench["questions"][row["question"]]),
            }
            if (row["question"], row["turn"]) not in kept:
                record.append_jsonl(path, saved)
                kept[row["question"], row["turn"]] = saved
    return [kept[key] for key in sorted(kept)]
