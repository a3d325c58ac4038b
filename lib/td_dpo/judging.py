"""Asking an OpenAI-compatible endpoint for grades, through inspect-ai. Every reply is kept as it comes: nothing is paid
twice.

`./run_all.sh judge` grades the members of a study with it (lib/td_dpo/grading.py). Answers from elsewhere:

    python -m lib.td_dpo.judging ANSWERS.jsonl --data DIR --model NAME [--dry-run] [--price-in X --price-out Y]

ANSWERS.jsonl has one row per question and turn: question (id), turn (1 or 2), text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import filelock

from lib import record
from lib.errors import StudyError
from lib.run import keys
from lib.td_dpo import mt_bench
from lib.td_dpo.judge_client import endpoint, host, probe

ASKED_AGAIN = 2  # further calls where a reply holds no grade
REPLY_TOKENS = 300  # what one judgement is taken to be long, for the cost told before
ATTEMPTS, WAIT = 6, 1.0  # of a request whose failure may pass; seconds before the second one, growing from there
COUNTED = ("calls", "prompt_tokens", "completion_tokens")


def requests(bench: dict, answers: list[dict], model: str) -> list[dict]:
    """One grading request per answer, with the key that it is kept under. A second turn needs its first one's
    answer."""
    texts = {(row["question"], row["turn"]): row["text"] for row in answers}
    made = []
    for (number, turn), _ in sorted(texts.items()):
        question = bench["questions"].get(number)
        if question is None or turn not in (1, 2) or (number, 1) not in texts:
            raise StudyError(
                "the answers", f"question {number}, turn {turn}", "questions of this MT-Bench, each with turn 1"
            )
        body = mt_bench.messages(bench, question, [texts[number, t] for t in range(1, turn + 1)], turn)
        made.append(
            {
                "question": number,
                "category": question["category"],
                "turn": turn,
                "messages": body,
                "key": keys.digest([model, body]),
            }
        )
    return made


def replies(path: Path) -> list[dict]:
    """The rows of a file of judgements. A torn last line is cut off, so that the next one does not continue it."""
    rows = record.read_jsonl(path)
    if rows and not path.read_bytes().endswith(b"\n"):
        record.write_jsonl(path, rows)
    return rows


def folded(rows: Iterable[dict]) -> dict[str, dict]:
    """{key: judgement} of replies: the grade of the last that holds one, and what all of them took."""
    made: dict[str, dict] = {}
    for row in rows:
        before = made.get(row["key"])
        made[row["key"]] = {**row, **{name: row[name] + (before[name] if before else 0) for name in COUNTED}}
        if before and row["score"] is None:
            made[row["key"]]["score"] = before["score"]
    return made


def load_cache(path: Path) -> dict[str, dict]:
    """{key: judgement} of a file of replies."""
    return folded(replies(path))


def settled(kept: dict[str, dict], key: str) -> bool:
    """Whether this answer is not to be asked about any more: it has a grade, or every reply allowed was without."""
    return key in kept and (kept[key]["score"] is not None or kept[key]["calls"] > ASKED_AGAIN)


def cost(asked: list[dict], kept: dict, price_in: float | None, price_out: float | None) -> dict:
    """What grading would take: calls and tokens (estimated, four characters each); price in the unit of the prices per
    million tokens, None where these are not given."""
    open_ = {row["key"]: row for row in asked if not settled(kept, row["key"])}
    prompt = sum(_tokens("".join(m["content"] for m in row["messages"])) for row in open_.values())
    reply = REPLY_TOKENS * len(open_)
    return {
        "calls": len(open_),
        "cached": len(asked) - sum(row["key"] in open_ for row in asked),
        "prompt_tokens": prompt,
        "reply_tokens": reply,
        "price": price(prompt, reply, price_in, price_out),
    }


def price(prompt: int, reply: int, price_in: float | None, price_out: float | None) -> float | None:
    """Of so many tokens, at prices per million; None where a price is not known."""
    return None if None in (price_in, price_out) else (prompt * price_in + reply * price_out) / 1e6


def _tokens(text: str) -> int:
    return len(text) // 4


def reply_row(row: dict, model: str, base: str, reply: dict) -> dict:
    """A reply as it is kept; its score is None where it holds no grade. Tokens are estimated where they are not
    reported."""
    usage = reply["usage"]
    counted = {"prompt_tokens": usage.get("prompt_tokens"), "completion_tokens": usage.get("completion_tokens")}
    known = all(isinstance(n, int) for n in counted.values())
    if not known:
        counted = {
            "prompt_tokens": _tokens("".join(m["content"] for m in row["messages"])),
            "completion_tokens": _tokens(reply["text"]),
        }
    return {
        "key": row["key"],
        "model": model,
        "endpoint": host(base),
        "question": row["question"],
        "turn": row["turn"],
        "score": mt_bench.rating(reply["text"]),
        "calls": 1,
        **counted,
        "estimated": not known,
        "reply": record.redact(reply["text"]),
    }


def grade_requests(
    asked: list[dict],
    model: str,
    cache_path: Path,
    *,
    workers: int = 8,
    attempts: int | None = None,
    wait: float | None = None,
    timeout: float = 120.0,
    on_graded: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[dict, dict]:
    """({key: judgement} of the cache, what this call took). A refused answer has no judgement there.

    Raises MissingError when the judge stays away, StudyError when it refuses everything; every reply until then is
    kept.
    """
    base, secret = endpoint()
    spent, refused = dict.fromkeys(COUNTED, 0), {}
    cache_path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(cache_path):
        kept = load_cache(cache_path)
        todo = {row["key"]: row for row in asked if not settled(kept, row["key"])}
        if not todo:
            return kept, {**spent, "refused": 0}
        from lib.td_dpo import judge_model  # inspect-ai, which is slow to import

        judge, done = (
            judge_model.connected(
                base,
                secret,
                model,
                workers=workers,
                attempts=attempts or ATTEMPTS,
                wait=WAIT if wait is None else wait,
                timeout=timeout,
            ),
            [],
        )

        async def one(row: dict) -> None:
            try:
                while not settled(kept, row["key"]):
                    made = reply_row(row, model, base, await judge_model.ask(judge, row["messages"]))
                    record.append_jsonl(
                        cache_path, made
                    )  # at once: a kill costs no more than the calls that are under way
                    kept.update(folded([*([kept[row["key"]]] if row["key"] in kept else []), made]))
                    spent.update({name: spent[name] + made[name] for name in COUNTED})
            except judge_model.Refused as error:
                refused[row["key"]] = str(error)
                if len(refused) > ASKED_AGAIN and not spent["calls"]:
                    raise StudyError(
                        "the judge",
                        f"{error} for every request",
                        "an answer",
                        "check the model's name and what the endpoint's log says",
                    ) from None
            done.append(row["key"])
            on_graded(len(done), len(todo))

        judge_model.ask_each(judge, todo.values(), one, workers, timeout)
    return kept, {**spent, "refused": len(refused)}


def _alone(cache_path: Path):
    """A file of replies, locked until the end of the `with`. Raises StudyError where another process is grading into
    it."""
    try:
        return filelock.FileLock(f"{cache_path}.lock").acquire(timeout=2)
    except filelock.Timeout:
        raise StudyError(
            str(cache_path), "another process is grading into it", "one at a time", "wait for it"
        ) from None


def grade(bench: dict, answers: list[dict], model: str, cache_path: Path, **settings) -> tuple[list[dict], dict]:
    """(answers with category and score, what it took); `settings` as in `grade_requests`."""
    asked = requests(bench, answers, model)
    kept, spent = grade_requests(asked, model, cache_path, **settings)
    return [scored(row, kept) for row in asked], spent


def scored(row: dict, kept: dict[str, dict]) -> dict:
    """A request as a graded answer: question, category, turn, score (None where no reply held a grade)."""
    return {name: row[name] for name in ("question", "category", "turn")} | {
        "score": kept.get(row["key"], {}).get("score")
    }


def told(before: dict) -> str:
    """What `cost` found, in one line."""
    about = (
        "cost unknown (--price-in, --price-out per million tokens)"
        if before["price"] is None
        else f"about {before['price']:.2f} in all"
    )
    return (
        f"{before['calls']} judge calls, {before['cached']} cached; about {before['prompt_tokens']} prompt and "
        f"{before['reply_tokens']} reply tokens; {about}"
    )


def main(argv: list[str] | None = None) -> int:
    top = argparse.ArgumentParser(prog="python -m lib.td_dpo.judging", description=__doc__.splitlines()[0])
    top.add_argument("answers", type=Path)
    top.add_argument("--data", required=True, help="folder with MT-Bench's questions, prompts and references")
    top.add_argument("--model", required=True, help="the judge")
    top.add_argument("--cache", type=Path, default=None, help="default: judgements.jsonl beside the answers")
    top.add_argument("--workers", type=int, default=8, help="calls at a time")
    top.add_argument("--price-in", type=float, help="price of a million prompt tokens")
    top.add_argument("--price-out", type=float, help="price of a million reply tokens")
    top.add_argument("--dry-run", action="store_true", help="show the cost and ask nothing")
    given = top.parse_args(argv)
    try:
        bench, answers = mt_bench.read(given.data), record.read_jsonl(given.answers)
        if not answers:
            raise StudyError(str(given.answers), "no answers", "a row per question and turn: question, turn, text")
        cache = given.cache or given.answers.with_name("judgements.jsonl")
        asked = requests(bench, answers, given.model)
        before = cost(asked, load_cache(cache), given.price_in, given.price_out)
        print(told(before))
        if given.dry_run:
            return 0
        if before["calls"]:
            probe()
        graded, spent = grade(bench, answers, given.model, cache, workers=given.workers)
    except StudyError as error:
        print(record.redact(str(error)), file=sys.stderr)
        return error.exit_code
    kept, of_these = (
        load_cache(cache),
        {row["key"] for row in asked},
    )  # all they ever took, in this call or an earlier one
    total = {name: sum(kept[key][name] for key in of_these if key in kept) for name in COUNTED}
    made = {"judge": given.model, **mt_bench.summary(graded), "spent": total, "answers": graded}
    record.write_json(given.answers.with_name("mt_bench.json"), made)
    print(
        f"score {made['mt_bench_score']}, without wrong references {made['mt_bench_score_corrected']}; "
        f"{made['unparsed']} of {len(graded)} unparsed; {spent['calls']} calls"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
