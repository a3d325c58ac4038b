"""Grading saved MT-Bench answers by an OpenAI-compatible endpoint. Every judgement is kept for ever, so nothing is asked twice.

    python -m lib.td_dpo.judging ANSWERS.jsonl --data DIR --model NAME [--dry] [--price-in X --price-out Y]

ANSWERS.jsonl has one row per question and turn: question (id), turn (1 or 2), text. The endpoint is OPENAI_BASE_URL
(a local vLLM server will do), its key OPENAI_API_KEY; the key is sent as a header and written nowhere.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import httpx
import tenacity
from filelock import FileLock

from lib import keys, record
from lib.errors import MissingError, StudyError
from lib.td_dpo import mt_bench

ASKED_AGAIN = 2  # further calls where a reply holds no grade
REPLY_TOKENS = 300  # what one judgement is taken to be long, for the cost told before
MAX_TOKENS = 2048
_TRANSIENT = {408, 409, 429, 500, 502, 503, 504}


class _Transient(Exception):
    """An answer that another attempt may better."""


def endpoint(environ=os.environ) -> tuple[str, dict]:
    """(address of the chat completions, headers). MissingError where neither address nor key is set."""
    base, secret = environ.get("OPENAI_BASE_URL", "").strip(), environ.get("OPENAI_API_KEY", "").strip()
    if not base and not secret:
        raise MissingError("the judge", "neither OPENAI_BASE_URL nor OPENAI_API_KEY is set", "an OpenAI-compatible endpoint",
                           "export OPENAI_BASE_URL=http://localhost:8000/v1, or OPENAI_API_KEY; the answers are kept")
    address = (base or "https://api.openai.com/v1").rstrip("/") + "/chat/completions"
    return address, {"Authorization": f"Bearer {secret}"} if secret else {}


def requests(bench: dict, answers: list[dict], model: str) -> list[dict]:
    """One grading request per answer, with the key that it is kept under. A second turn needs its first one's answer."""
    texts = {(row["question"], row["turn"]): row["text"] for row in answers}
    made = []
    for (number, turn), _ in sorted(texts.items()):
        question = bench["questions"].get(number)
        if question is None or turn not in (1, 2) or (number, 1) not in texts:
            raise StudyError("the answers", f"question {number}, turn {turn}", "questions of this MT-Bench, each with turn 1")
        body = mt_bench.messages(bench, question, [texts[number, t] for t in range(1, turn + 1)], turn)
        made.append({"question": number, "category": question["category"], "turn": turn, "messages": body,
                     "key": keys.digest([model, body])})
    return made


def load_cache(path: Path) -> dict[str, dict]:
    """{key: judgement}. A torn last line is cut off, so that the next one does not continue it."""
    rows = record.read_jsonl(path)
    if rows and not path.read_bytes().endswith(b"\n"):
        record.write_jsonl(path, rows)
    return {row["key"]: row for row in rows}


def cost(asked: list[dict], cache: dict, price_in: float | None, price_out: float | None) -> dict:
    """What grading would take: calls and tokens (estimated, four characters each); price in the unit of the prices per
    million tokens, None where these are not given."""
    open_ = {row["key"]: row for row in asked if row["key"] not in cache}
    prompt = sum(len(m["content"]) for row in open_.values() for m in row["messages"]) // 4
    reply = REPLY_TOKENS * len(open_)
    price = None if None in (price_in, price_out) else (prompt * price_in + reply * price_out) / 1e6
    return {"calls": len(open_), "cached": len(asked) - len(open_), "prompt_tokens": prompt, "reply_tokens": reply,
            "price": price}


def ask(client: httpx.Client, address: str, model: str, body: list[dict], attempts: int, wait: float) -> dict:
    """One reply of the judge at temperature 0, retried with exponential backoff where the endpoint may recover."""
    def once() -> dict:
        try:
            answer = client.post(address, json={"model": model, "messages": body, "temperature": 0,
                                                "max_tokens": MAX_TOKENS})
        except httpx.TransportError as error:
            raise _Transient(type(error).__name__) from None
        if answer.status_code in _TRANSIENT:
            raise _Transient(f"HTTP {answer.status_code}")
        if answer.status_code != 200:
            raise StudyError("the judge", f"HTTP {answer.status_code}", "an answer", "check the model's name and the key")
        try:
            made = answer.json()
            return {"text": made["choices"][0]["message"]["content"] or "", "usage": made.get("usage") or {}}
        except (ValueError, KeyError, IndexError, TypeError):
            raise _Transient("a reply that is not a chat completion") from None

    retry = tenacity.Retrying(stop=tenacity.stop_after_attempt(attempts), retry=tenacity.retry_if_exception_type(_Transient),
                              wait=tenacity.wait_exponential_jitter(initial=wait, max=60 * wait), reraise=True)
    try:
        return retry(once)
    except _Transient as error:
        raise MissingError("the judge", f"{error}, {attempts} times", "an endpoint that answers",
                           "the same command again: what is graded is kept and not asked again") from None


def judge(client: httpx.Client, address: str, model: str, row: dict, attempts: int, wait: float) -> dict:
    """The judgement of one request; its score is None where no reply held a grade."""
    used = {"prompt_tokens": 0, "completion_tokens": 0}
    calls, score = 0, None
    while score is None and calls <= ASKED_AGAIN:
        calls += 1
        reply = ask(client, address, model, row["messages"], attempts, wait)
        used = {name: n + int(reply["usage"].get(name) or 0) for name, n in used.items()}
        score = mt_bench.rating(reply["text"])
    return {"key": row["key"], "model": model, "question": row["question"], "turn": row["turn"], "score": score,
            "calls": calls, **used, "reply": record.redact(reply["text"])}


def grade(bench: dict, answers: list[dict], model: str, cache_path: Path, *, workers: int = 8, attempts: int = 6,
          wait: float = 1.0, timeout: float = 120.0) -> tuple[list[dict], dict]:
    """(answers with category and score, what it took). Raises MissingError when the judge stays away; every judgement
    made until then is kept."""
    address, headers = endpoint()
    asked, spent = requests(bench, answers, model), {"calls": 0, "prompt_tokens": 0, "completion_tokens": 0}
    cache_path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cache_path}.lock"):
        cache = load_cache(cache_path)
        todo = {row["key"]: row for row in asked if row["key"] not in cache}
        with httpx.Client(headers=headers, timeout=timeout) as client, ThreadPoolExecutor(workers) as pool:
            stopped, failed = threading.Event(), None

            def one(row: dict) -> dict | None:
                if stopped.is_set():  # a worker takes its next task before anyone could cancel it
                    return None
                try:
                    return judge(client, address, model, row, attempts, wait)
                except BaseException:
                    stopped.set()
                    raise

            waiting = [pool.submit(one, row) for row in todo.values()]
            for future in as_completed(waiting):
                if future.exception() is not None:  # asks no more, but keeps what is under way
                    failed = failed or future.exception()
                    continue
                made = future.result()
                if made is None:
                    continue
                record.append_jsonl(cache_path, made)
                cache[made["key"]] = made
                spent = {name: n + made[name] for name, n in spent.items()}
        if failed is not None:
            raise failed
    graded = [{name: row[name] for name in ("question", "category", "turn")} | {"score": cache[row["key"]]["score"]}
              for row in asked]
    return graded, spent


def main(argv: list[str] | None = None) -> int:
    top = argparse.ArgumentParser(prog="python -m lib.td_dpo.judging", description=__doc__.splitlines()[0])
    top.add_argument("answers", type=Path)
    top.add_argument("--data", required=True, help="folder with MT-Bench's questions, prompts and references")
    top.add_argument("--model", required=True, help="the judge")
    top.add_argument("--cache", type=Path, default=None, help="default: judgements.jsonl beside the answers")
    top.add_argument("--workers", type=int, default=8, help="calls at a time")
    top.add_argument("--price-in", type=float, help="price of a million prompt tokens")
    top.add_argument("--price-out", type=float, help="price of a million reply tokens")
    top.add_argument("--dry", action="store_true", help="show the cost and ask nothing")
    given = top.parse_args(argv)
    try:
        bench, answers = mt_bench.read(given.data), record.read_jsonl(given.answers)
        if not answers:
            raise StudyError(str(given.answers), "no answers", "a row per question and turn: question, turn, text")
        cache = given.cache or given.answers.with_name("judgements.jsonl")
        asked = requests(bench, answers, given.model)
        told = cost(asked, load_cache(cache), given.price_in, given.price_out)
        price = "price unknown (--price-in, --price-out)" if told["price"] is None else f"about {told['price']:.2f}"
        print(f"{told['calls']} judge calls, {told['cached']} cached; about {told['prompt_tokens']} prompt and "
              f"{told['reply_tokens']} reply tokens; {price}")
        if given.dry:
            return 0
        graded, spent = grade(bench, answers, given.model, cache, workers=given.workers)
    except StudyError as error:
        print(record.redact(str(error)), file=sys.stderr)
        return error.exit_code
    kept, of_these = load_cache(cache), {row["key"] for row in asked}  # all they ever took, in this call or an earlier one
    total = {name: sum(kept[key][name] for key in of_these) for name in spent}
    made = {"judge": given.model, **mt_bench.summary(graded), "spent": total, "answers": graded}
    record.write_json(given.answers.with_name("mt_bench.json"), made)
    print(f"score {made['mt_bench_score']}, without wrong references {made['mt_bench_score_corrected']}; "
          f"{made['unparsed']} of {len(graded)} unparsed; {spent['calls']} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main())
