"""MT-Bench answers graded by a judge at any OpenAI-compatible endpoint. Every reply is kept: nothing is paid twice.

A member saves its answers when it is evaluated (mt_bench.py); `./run_all.sh judge` grades them later. For each member
`due` says why it is to be graded, `read` what is to be asked, `grade_requests` asks, and `finish` writes the grades
into its record: predictions.jsonl then holds a graded answer per question and turn and metrics.json the scores, as if
they had been measured when the member was trained; judged.json says by whom, and is written last.

The endpoint is OPENAI_BASE_URL (a local vLLM server will do) and its key OPENAI_API_KEY; the key is sent as a header
and written nowhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import filelock

from lib import record
from lib.errors import MissingError, StudyError
from lib.td_dpo import mt_bench

ANSWERS, JUDGED, REPLIES = "answers.jsonl", "judged.json", "judgements.jsonl"  # files of a member
# 13 of the 30 reference answers are wrong: a second score leaves their questions out.
WRONG_REFERENCES = frozenset({104, 105, 109, 111, 113, 114, 120, 122, 124, 125, 126, 128, 130})
RATINGS = (re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]"), re.compile(r"\[(\d+(?:\.\d+)?)\]"))
ASKED_AGAIN = 2  # further calls where a reply holds no grade
MAX_TOKENS = 2048  # of a reply
REPLY_TOKENS = 300  # expected of a reply, for the cost shown before anything is sent
RETRIES = 7  # of a request that failed in passing, by the client: 0.5 s, 1 s, 2 s, ... apart, or as Retry-After says
COUNTED = ("calls", "prompt_tokens", "completion_tokens")
INSTALL = ".venv/bin/pip install -c constraints.txt -e '.[judge]'"


# ---- prompts and ratings


def messages(bench: dict, question: dict, answers: Sequence[str], turn: int) -> list[dict]:
    """FastChat's single-answer grading request for `turn` (1 or 2); `answers` holds the model's answers up to it."""
    guided = question["category"] in mt_bench.WITH_REFERENCE
    name = f"single-{'math-' if guided else ''}v1{'-multi-turn' if turn == 2 else ''}"
    if name not in bench["prompts"]:
        raise StudyError("judge_prompts.jsonl", f"no prompt {name}", "FastChat's four single-answer prompts")
    if turn == 1:
        values = {"question": question["turns"][0], "answer": answers[0]}
    else:
        values = {f"question_{k}": text for k, text in enumerate(question["turns"], 1)}
        values |= {f"answer_{k}": text for k, text in enumerate(answers, 1)}
    if guided:
        values |= {f"ref_answer_{k}": text for k, text in enumerate(bench["references"][question["id"]][:2], 1)}
    prompt = bench["prompts"][name]
    return [
        {"role": "system", "content": prompt["system_prompt"]},
        {"role": "user", "content": prompt["prompt_template"].format(**values)},
    ]


def requests(bench: dict, answers: list[dict], model: str) -> list[dict]:
    """One grading request per answer (question, turn, text), with the key that its judgement is kept under. A second
    turn needs the answer to the first."""
    texts = {(row["question"], row["turn"]): row["text"] for row in answers}
    asked = []
    for number, turn in sorted(texts):
        question = bench["questions"].get(number)
        if question is None or turn not in (1, 2) or (number, 1) not in texts:
            found = f"question {number}, turn {turn}"
            raise StudyError("the answers", found, "questions of this MT-Bench, each with turn 1")
        body = messages(bench, question, [texts[number, t] for t in range(1, turn + 1)], turn)
        identity = {"question": number, "category": question["category"], "turn": turn}
        asked.append({**identity, "messages": body, "key": record.digest([model, body])})
    return asked


def rating(reply: str) -> float | None:
    """The one rating from 1 to 10 in `reply`: [[x]], else [x]. None where there is none, one outside the scale, or two
    that differ (FastChat would take the first of these; here such a reply is not a grade)."""
    for pattern in RATINGS:
        found = {float(number) for number in pattern.findall(reply)}
        if found:
            value = found.pop()
            return value if not found and 1 <= value <= 10 else None
    return None


def summary(graded: Sequence[dict]) -> dict:
    """Scores of graded answers (question, category, turn, score). A missing grade is counted and left out of the means,
    never read as 0. `corrected` leaves out the questions whose reference is known to be wrong."""

    def mean(rows: Iterable[dict]) -> float | None:
        present = [row["score"] for row in rows if row["score"] is not None]
        return sum(present) / len(present) if present else None

    categories = sorted({row["category"] for row in graded})
    return {
        "mt_bench_score": mean(graded),
        "mt_bench_score_corrected": mean(row for row in graded if row["question"] not in WRONG_REFERENCES),
        "unparsed": sum(row["score"] is None for row in graded),
        "graded": sum(row["score"] is not None for row in graded),
        "by_turn": {str(turn): mean(row for row in graded if row["turn"] == turn) for turn in (1, 2)},
        "by_category": {name: mean(row for row in graded if row["category"] == name) for name in categories},
    }


# ---- the endpoint


def endpoint(environ=os.environ) -> tuple[str, str]:
    """(address of the API, key; empty where there is none). MissingError where neither is set."""
    base, secret = environ.get("OPENAI_BASE_URL", "").strip(), environ.get("OPENAI_API_KEY", "").strip()
    if not base and not secret:
        found = "neither OPENAI_BASE_URL nor OPENAI_API_KEY is set"
        fix = "export OPENAI_BASE_URL=http://localhost:8000/v1, or OPENAI_API_KEY; the answers are kept"
        raise MissingError("the judge", found, "an OpenAI-compatible endpoint", fix)
    return (base or "https://api.openai.com/v1").rstrip("/"), secret


def host(base: str) -> str:
    """The endpoint as records name it: host and port, no user, no path."""
    parts = urlsplit(base if "//" in base else f"//{base}")
    try:
        return f"{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}"
    except ValueError:  # no port number
        return parts.hostname or ""


def connect(timeout: float):
    """OpenAI's client of the endpoint; a request is given up after `timeout` seconds without a byte, and retried."""
    base, secret = endpoint()
    try:
        import openai
    except ImportError:
        raise MissingError("the judge", "openai is not installed", "the extra `judge`", INSTALL) from None
    return openai.AsyncOpenAI(base_url=base, api_key=secret or "none", max_retries=RETRIES, timeout=timeout)


def probe(seconds: float = 10.0) -> None:
    """Raises MissingError where nothing answers at the endpoint, or it refuses the key, before anything is paid for."""

    async def list_models() -> None:
        async with connect(seconds) as client:
            await client.with_options(max_retries=0).models.list()

    try:
        asyncio.run(list_models())
    except StudyError:
        raise
    except Exception as error:
        status = getattr(error, "status_code", None)
        if status in (401, 403):
            found, fix = f"refuses the key (HTTP {status})", "correct OPENAI_API_KEY"
        elif status is None:  # no connection, or no address at all
            found, fix = f"does not answer ({type(error).__name__})", "start it, or correct OPENAI_BASE_URL"
        else:  # a server without a list of models
            return
        raise MissingError("the judge", f"{host(endpoint()[0])} {found}", "an endpoint that answers", fix) from None


class Refused(Exception):
    """The endpoint will not grade this one answer (a filter, a prompt that is too long)."""


async def ask(client, model: str, body: list[dict]) -> tuple[str, dict]:
    """(text, usage) of the judge's reply at temperature 0, as they came."""
    import openai

    again = "the same command again: what is graded is kept and not asked again"
    for attempt in range(RETRIES + 1):
        try:
            response = await client.chat.completions.with_raw_response.create(
                model=model, messages=body, temperature=0, max_tokens=MAX_TOKENS
            )
        except openai.APIError as error:
            status = getattr(error, "status_code", None)
            found = f"HTTP {status}" if status else type(error).__name__
            if status in (400, 413, 422):
                raise Refused(found) from None
            if status is None or status in (408, 409, 429) or status >= 500:
                raise MissingError("the judge", found, "an endpoint that answers", again) from None
            raise StudyError("the judge", found, "an answer", "check the model's name and the key") from None
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            reply = json.loads(response.content)
            text, usage = reply["choices"][0]["message"]["content"] or "", reply.get("usage")
            if isinstance(text, str):
                return text, usage if isinstance(usage, dict) else {}
        await asyncio.sleep(min(0.5 * 2**attempt, 8.0))  # a proxy's page, say: as the client does after a failure
    raise MissingError("the judge", "replies that are no chat completions", "an endpoint that answers", again)


# ---- judgements, kept for ever in a file of replies


def replies(path: Path) -> list[dict]:
    """The rows of a file of replies. A torn last line is cut off, so that the next one does not continue it."""
    rows = record.read_jsonl(path)
    if rows and not path.read_bytes().endswith(b"\n"):
        record.write_jsonl(path, rows)
    return rows


def add(kept: dict[str, dict], row: dict) -> None:
    """Count a reply to its judgement in `kept`: the grade of the last reply that holds one, and what all took."""
    before = kept.get(row["key"], {"score": None, **dict.fromkeys(COUNTED, 0)})
    score = before["score"] if row["score"] is None else row["score"]
    kept[row["key"]] = {**row, "score": score, **{name: before[name] + row[name] for name in COUNTED}}


def load_cache(path: Path) -> dict[str, dict]:
    """{key: judgement} of a file of replies."""
    kept: dict[str, dict] = {}
    for row in replies(path):
        add(kept, row)
    return kept


def settled(kept: dict[str, dict], key: str) -> bool:
    """Whether this answer needs no further call: it has a grade, or every reply allowed came without one."""
    return key in kept and (kept[key]["score"] is not None or kept[key]["calls"] > ASKED_AGAIN)


def price(prompt: int, reply: int, prices: Sequence[float | None]) -> float | None:
    """Of so many tokens, at (prompt, reply) prices per million; None where a price is not known."""
    of_prompt, of_reply = prices
    return None if of_prompt is None or of_reply is None else (prompt * of_prompt + reply * of_reply) / 1e6


def cost(asked: list[dict], kept: dict, prices: Sequence[float | None]) -> dict:
    """What grading would take: calls, tokens (estimated, four characters each) and price."""
    waiting = {row["key"]: row for row in asked if not settled(kept, row["key"])}
    prompt, reply = sum(map(_prompt_tokens, waiting.values())), REPLY_TOKENS * len(waiting)
    return {
        "calls": len(waiting),
        "cached": sum(row["key"] not in waiting for row in asked),
        "prompt_tokens": prompt,
        "reply_tokens": reply,
        "price": price(prompt, reply, prices),
    }


def describe(before: dict) -> str:
    """What `cost` found, in one line."""
    price = "cost unknown (--price-in, --price-out per million)"
    if before["price"] is not None:
        price = f"about {before['price']:.2f} in all"
    tokens = f"about {before['prompt_tokens']} prompt and {before['reply_tokens']} reply tokens"
    return f"{before['calls']} judge calls, {before['cached']} cached; {tokens}; {price}"


def _prompt_tokens(row: dict) -> int:
    return sum(len(message["content"]) for message in row["messages"]) // 4


def reply_row(row: dict, model: str, base: str, text: str, usage: dict) -> dict:
    """A reply as it is kept; its score is None where it holds no grade. Tokens are estimated where none are counted."""
    tokens = {name: usage.get(name) for name in COUNTED[1:]}
    estimated = not all(isinstance(count, int) for count in tokens.values())
    if estimated:
        tokens = {"prompt_tokens": _prompt_tokens(row), "completion_tokens": len(text) // 4}
    return {
        "key": row["key"],
        "model": model,
        "endpoint": host(base),
        "question": row["question"],
        "turn": row["turn"],
        "score": rating(text),
        "calls": 1,
        **tokens,
        "estimated": estimated,
        "reply": record.redact(text),
    }


def grade_requests(
    asked: list[dict],
    model: str,
    cache: Path,
    *,
    workers: int = 8,
    timeout: float = 120.0,
    on_graded: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Ask until each request has its judgement in the cache; a refused one has none there.

    Raises MissingError when the judge stays away, StudyError when it refuses everything or another process is grading
    into this cache; every reply until then is kept. At the first failure nothing more is asked, and what is under way
    has `timeout` seconds to come back.
    """
    base, refused, answered, graded = endpoint()[0], set(), 0, 0
    cache.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(f"{cache}.lock").acquire(timeout=2)
    except filelock.Timeout:
        raise StudyError(str(cache), "another process is grading into it", "one at a time", "wait for it") from None
    with lock:
        kept = load_cache(cache)
        waiting = deque({row["key"]: row for row in asked if not settled(kept, row["key"])}.values())
        count = len(waiting)

        async def grade_one(client, row: dict) -> None:
            nonlocal answered
            try:
                while not settled(kept, row["key"]):
                    reply = reply_row(row, model, base, *await ask(client, model, row["messages"]))
                    record.append_jsonl(cache, reply)  # at once: a kill costs only the calls that are under way
                    add(kept, reply)
                    answered += 1
            except Refused as error:
                refused.add(row["key"])
                if len(refused) > ASKED_AGAIN and not answered:
                    fix = "check the model's name and what the endpoint's log says"
                    raise StudyError("the judge", f"{error} for every request", "an answer", fix) from None

        async def work(client) -> None:
            nonlocal graded
            while waiting:
                await grade_one(client, waiting.popleft())
                graded += 1
                on_graded(graded, count)

        async def grade_all() -> None:
            async with connect(timeout) as client:
                tasks = [asyncio.create_task(work(client)) for _ in range(min(workers, count))]
                ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
                waiting.clear()
                _, late = await asyncio.wait(tasks, timeout=timeout)
                for task in late:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                for task in ended:
                    task.result()  # raises what failed first

        if count:
            asyncio.run(grade_all())


# ---- grades in the members' records


def expects(spec: dict) -> bool:
    """Whether a member (its member.json) is one whose answers a judge grades."""
    return spec["config"].get("evaluation", {}).get("judge") == "mt_bench"


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / ANSWERS).read_bytes()).hexdigest()


def due(folder: Path, model: str) -> str:
    """Why the member in `folder` is to be graded by `model`; the empty string where its grades are up to date."""
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
    asked = {}
    for folder in folders:
        place = data or record.read_json(folder / "member.json")["config"]["evaluation"]["mt_bench"]
        if place not in benches:
            benches[place] = mt_bench.read(place)
        answers = record.read_jsonl(folder / ANSWERS)
        for row in answers:
            question = benches[place]["questions"].get(row["question"])
            if question and row.get("asked") not in (None, mt_bench.digest(question)):
                found = f"question {row['question']} was answered in other words than {place} has"
                raise StudyError(str(folder), found, "the MT-Bench that was answered", "--data DIR with that one")
        asked[folder] = requests(benches[place], answers, model)
    return asked


def gather(folders: Iterable[Path], cache: Path) -> None:
    """Replies that records hold, earlier attempts' too, into the cache where it lacks them: a lost cache costs
    nothing."""
    cached = {row["key"] for row in replies(cache)}
    for folder in folders:
        earlier = (folder.parent.parent / "attempts").glob(f"{folder.name}.*/{REPLIES}")
        for path in (folder / REPLIES, *earlier):
            rows = [row for row in record.read_jsonl(path) if row["key"] not in cached]
            for row in rows:
                record.append_jsonl(cache, row)
            cached |= {row["key"] for row in rows}


def finish(folder: Path, asked: list[dict], kept: dict[str, dict], cache: Path, model: str, prices: tuple) -> dict:
    """Write a member's grades into its record; returns judged.json. An answer that was refused, or whose every reply
    was without a grade, has none and is counted; no score stands in for it."""
    texts = {(row["question"], row["turn"]): row for row in record.read_jsonl(folder / ANSWERS)}
    wanted = {row["key"] for row in asked}
    own = [row for row in replies(cache) if row["key"] in wanted]
    others = [row for row in record.read_jsonl(folder / REPLIES) if row["key"] not in wanted]
    # From here to its end the record is neither the old judge's nor the new one's.
    (folder / JUDGED).unlink(missing_ok=True)
    record.write_jsonl(folder / REPLIES, [*others, *own])
    predictions = [row for row in record.read_jsonl(folder / "predictions.jsonl") if row["kind"] != "answer"]
    graded = []
    for row in asked:
        answer, score = texts[row["question"], row["turn"]], kept.get(row["key"], {}).get("score")
        identity = {name: row[name] for name in ("question", "category", "turn")}
        shown = {name: answer.get(name) for name in ("length", "text")}
        graded.append({"kind": "answer", "judge": "mt_bench", **identity, "score": score, **shown})
    record.write_jsonl(folder / "predictions.jsonl", [*predictions, *graded])
    counts = summary(graded)
    scores = {name: counts.pop(name) for name in ("mt_bench_score", "mt_bench_score_corrected")}
    metrics = record.read_json(folder / "metrics.json", {})
    record.write_json(folder / "metrics.json", {**metrics, **scores, "mt_bench_unparsed": counts["unparsed"]})
    spent = {name: sum(kept[key][name] for key in wanted if key in kept) for name in COUNTED}
    judged = {
        "judge": "mt_bench",
        "model": model,
        "endpoints": sorted({row["endpoint"] for row in own}),
        "answers": _digest(folder),
        "refused": len(wanted - set(kept)),
        **scores,
        **counts,
        "spent": {
            **spent,
            "price": price(spent["prompt_tokens"], spent["completion_tokens"], prices),
            "estimated": any(row["estimated"] for row in own),
        },
    }
    record.write_json(folder / JUDGED, judged)
    return judged
