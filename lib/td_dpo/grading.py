"""Members' saved MT-Bench answers graded, and the grades put into their records in the form of the oracle's scores.

What `./run_all.sh judge` calls (lib/run/judge.py): `due` says why a member is to be graded, `read` what is to be
asked,
`finish` writes what came back. After it, a member's predictions.jsonl holds a graded answer per question and turn and
its metrics.json the scores, as if they had been measured when it was trained; judged.json says by whom, and is written
last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from lib import record
from lib.errors import StudyError
from lib.td_dpo import judging, mt_bench

ANSWERS, JUDGED, REPLIES = "answers.jsonl", "judged.json", "judgements.jsonl"


def expects(spec: dict) -> bool:
    """Whether a member (its member.json) is one whose answers a judge grades."""
    return spec["config"].get("evaluation", {}).get("judge") == "mt_bench"


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / ANSWERS).read_bytes()).hexdigest()


def due(folder: Path, model: str) -> str:
    """Why the member in `folder` is to be graded by `model`; the empty string where its grades stand."""
    judged = record.read_json(folder / JUDGED)
    if not judged:
        return "not graded"
    if judged["model"] != model:
        return f"graded by {judged['model']}"
    if judged["answers"] != _digest(folder):
        return "its answers changed"
    return f"{judged['refused']} answers were refused" if judged["refused"] else ""


def read(folders: Iterable[Path], model: str, data: str | None) -> dict[Path, list[dict]]:
    """{member's folder: its grading requests}. `data`: MT-Bench's folder, where not the one that the member was trained
    with. MissingError where that is not there, StudyError where its questions are not those that were answered."""
    benches: dict[str, dict] = {}
    made = {}
    for folder in folders:
        spec = record.read_json(folder / "member.json")
        place = data or spec["config"]["evaluation"]["mt_bench"]
        if place not in benches:
            benches[place] = mt_bench.read(place)
        answers = record.read_jsonl(folder / ANSWERS)
        for row in answers:
            question = benches[place]["questions"].get(row["question"])
            if question and row.get("asked", mt_bench.digest(question)) != mt_bench.digest(question):
                raise StudyError(
                    str(folder),
                    f"question {row['question']} was answered in other words than {place} has",
                    "the MT-Bench that was answered",
                    "--data DIR with that one",
                )
        made[folder] = judging.requests(benches[place], answers, model)
    return made


def gather(folders: Iterable[Path], cache: Path) -> None:
    """Replies that records hold, earlier attempts' too, into the cache where it lacks them: a lost cache costs
    nothing."""
    there = {row["key"] for row in judging.replies(cache)}
    for folder in folders:
        old = (folder.parent.parent / "attempts").glob(f"{folder.name}.*/{REPLIES}")
        for path in (folder / REPLIES, *old):
            rows = [row for row in record.read_jsonl(path) if row["key"] not in there]
            for row in rows:
                record.append_jsonl(cache, row)
            there |= {row["key"] for row in rows}


def finish(folder: Path, asked: list[dict], kept: dict[str, dict], cache: Path, model: str, prices: tuple) -> dict:
    """Write a member's grades into its record; returns judged.json. An answer that was refused, or whose every reply
    was without a grade, has none and is counted; no score stands in for it."""
    texts = {(row["question"], row["turn"]): row for row in record.read_jsonl(folder / ANSWERS)}
    graded = [judging.scored(row, kept) for row in asked]
    mine = {row["key"] for row in asked}
    own = [row for row in judging.replies(cache) if row["key"] in mine]
    others = [row for row in record.read_jsonl(folder / REPLIES) if row["key"] not in mine]
    (folder / JUDGED).unlink(
        missing_ok=True
    )  # from here to its end the record is neither the old judge's nor the new one's
    record.write_jsonl(folder / REPLIES, [*others, *own])
    kind = {"kind": "answer", "judge": "mt_bench"}
    before = [row for row in record.read_jsonl(folder / "predictions.jsonl") if row["kind"] != "answer"]
    record.write_jsonl(
        folder / "predictions.jsonl",
        [
            *before,
            *(
                {**kind, **row, **{k: texts[row["question"], row["turn"]].get(k) for k in ("length", "text")}}
                for row in graded
            ),
        ],
    )
    found = mt_bench.summary(graded)
    metrics = {name: found.pop(name) for name in ("mt_bench_score", "mt_bench_score_corrected")}
    record.write_json(
        folder / "metrics.json",
        {**record.read_json(folder / "metrics.json", {}), **metrics, "mt_bench_unparsed": found["unparsed"]},
    )
    spent = {name: sum(kept[key][name] for key in mine if key in kept) for name in judging.COUNTED}
    made = {
        "judge": "mt_bench",
        "model": model,
        "endpoints": sorted({row["endpoint"] for row in own}),
        "answers": _digest(folder),
        "refused": len(mine - set(kept)),
        **metrics,
        **found,
        "spent": {
            **spent,
            "price": judging.price(spent["prompt_tokens"], spent["completion_tokens"], *prices),
            "estimated": any(row["estimated"] for row in own),
        },
    }
    record.write_json(folder / JUDGED, made)
    return made
