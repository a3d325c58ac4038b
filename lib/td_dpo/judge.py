"""MT-Bench answers graded by a judge at any OpenAI-compatible endpoint. Every reply is kept: nothing is paid twice.

A member saves its answers when it is evaluated (mt_bench.py); `./run_all.sh judge` (lib/run/judge.py) grades them later.
For each member `reason_to_grade` says whether there is anything to do, `requests` what to ask, `grade` asks, and
`finish` writes the grades into its record: predictions.jsonl then holds a graded answer per question and turn and
metrics.json the scores, as if they had been measured when the member was trained; judged.json names the judge.

The endpoint is OPENAI_BASE_URL (a local vLLM server will do) and its key OPENAI_API_KEY; the key is sent as a header
and written nowhere.
"""

import asyncio
import os
import re
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from lib import record
from lib.config import NonNegative, Section
from lib.errors import MissingError, StudyError
from lib.td_dpo import mt_bench

ANSWERS, JUDGED, REPLIES = "answers.jsonl", "judged.json", "judgments.jsonl"  # files of a member
# 13 of the 30 reference answers are wrong: a second score leaves their questions out.
WRONG_REFERENCES = frozenset({104, 105, 109, 111, 113, 114, 120, 122, 124, 125, 126, 128, 130})
RATINGS = (re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]"), re.compile(r"\[(\d+(?:\.\d+)?)\]"))
ASKED_AGAIN = 2  # further calls where a reply holds no grade
MAX_TOKENS = 2048  # of a reply
REPLY_TOKENS = 300  # expected of a reply, for the cost shown before anything is sent
TIMEOUT = 120.0  # seconds without a byte, after which a request is given up and retried
RETRIES = 7  # of a request that failed in passing, by the client: 0.5 s, 1 s, 2 s, ... apart, or as Retry-After says
INSTALL = ".venv/bin/pip install -c constraints.txt -e '.[judge]'"

Replies = dict[str, list[dict]]  # of the judge, by the key of the request


# ---- what is asked, and what a reply says


def messages(bench: dict, question: dict, answers: Sequence[str]) -> list[dict]:
    """FastChat's single-answer grading request for the last of the model's `answers`: one for turn 1, two for turn 2."""
    guided = question["category"] in mt_bench.WITH_REFERENCE
    references = bench["references"][question["id"]] if guided else ()
    values = {"question": question["turns"][0], "answer": answers[0]}
    for name, texts in (("question", question["turns"]), ("answer", answers), ("ref_answer", references)):
        values |= {f"{name}_{number}": text for number, text in enumerate(texts, 1)}
    prompt = bench["prompts"][f"single-{'math-' * guided}v1{'-multi-turn' * (len(answers) == 2)}"]
    return [
        {"role": "system", "content": prompt["system_prompt"]},
        {"role": "user", "content": prompt["prompt_template"].format(**values)},
    ]


def requests(folder: Path, model: str, data: str | None = None) -> list[dict]:
    """The answers of the member in `folder`, each with the `messages` that have it graded and the `key` that replies to
    them are kept under. `data`: MT-Bench's folder, where not the one that the member was trained with; its questions
    must be those that were answered."""
    place = data or record.read_json(folder / "member.json")["config"]["evaluation"]["mt_bench"]
    bench, answers = mt_bench.read(place), record.read_jsonl(folder / ANSWERS)
    asked, texts = [], {}
    for row in sorted(answers, key=lambda row: (row["question"], row["turn"])):
        question = bench["questions"].get(row["question"])
        if question is None or row["asked"] != record.digest(question["turns"]):
            found = f"question {row['question']} was answered in other words than {place} has"
            raise StudyError(str(folder), found, "the MT-Bench that was answered", "--data DIR with that one")
        texts.setdefault(row["question"], []).append(row["text"])
        body = messages(bench, question, texts[row["question"]])
        asked.append({**row, "model": model, "messages": body, "key": record.digest([model, body])})
    return asked


def rating(reply: str) -> float | None:
    """The one rating from 1 to 10 in `reply`: [[x]], else [x]. None where there is none, one outside the scale, or two
    that differ (FastChat would take the first of these; here such a reply is not a grade)."""
    for pattern in RATINGS:
        if found := {float(number) for number in pattern.findall(reply)}:
            return found.pop() if len(found) == 1 and 1 <= min(found) <= 10 else None
    return None


# ---- replies, kept whatever becomes of the runs


def read_replies(cache: Path, folders: Iterable[Path] = ()) -> Replies:
    """Those in a cache file, and those in members' records that it lacks: a lost cache costs nothing."""
    kept: Replies = defaultdict(list)
    for path in (cache, *(folder / REPLIES for folder in folders)):
        known = set(kept)
        for row in record.read_jsonl(path):
            if row["key"] not in known:
                kept[row["key"]].append(row)
    return kept


def score(replies: Sequence[dict]) -> float | None:
    """The grade among the replies to one request."""
    return next((row["score"] for row in replies if row["score"] is not None), None)


def is_final(replies: Sequence[dict]) -> bool:
    """Whether a request needs no further call: it has a grade, or every reply allowed came without one."""
    return score(replies) is not None or len(replies) > ASKED_AGAIN


def list_unanswered(asked: Iterable[list[dict]], kept: Replies) -> list[dict]:
    """The requests of these members that are still to be sent, each once."""
    return list({row["key"]: row for rows in asked for row in rows if not is_final(kept[row["key"]])}.values())


def expected_reply(request: dict) -> dict:
    """The tokens that a request will take, at four characters each."""
    characters = sum(len(message["content"]) for message in request["messages"])
    return {"prompt_tokens": characters // 4, "completion_tokens": REPLY_TOKENS}


class Judge(Section):
    """Which judge (params/judge.yaml), and what a million tokens cost there."""

    model: str
    price_in: NonNegative | None = None
    price_out: NonNegative | None = None

    def add_up(self, replies: Iterable[dict]) -> dict:
        """Calls, tokens and cost of replies; the cost is None where a price is not known."""
        rows = [(row["prompt_tokens"], row["completion_tokens"]) for row in replies]
        prompt, reply = sum(row[0] for row in rows), sum(row[1] for row in rows)
        known = self.price_in is not None and self.price_out is not None
        cost = (prompt * self.price_in + reply * self.price_out) / 1e6 if known else None
        return {"calls": len(rows), "prompt_tokens": prompt, "completion_tokens": reply, "cost": cost}


def describe(sums: dict) -> str:
    """What `add_up` returns, in words."""
    known = sums["cost"] is not None
    cost = f"{sums['cost']:.2f} in all" if known else "cost unknown (--price-in, --price-out per million)"
    return f"{sums['calls']} calls, {sums['prompt_tokens']} prompt and {sums['completion_tokens']} reply tokens, {cost}"


# ---- the endpoint


def host() -> str:
    """The endpoint as records name it: host and port, no user, no path."""
    return urlsplit(os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com").netloc.rpartition("@")[2]


async def connect():
    """OpenAI's client of an endpoint that answers and takes the key; MissingError otherwise, before anything is paid
    for."""
    base, secret = (os.environ.get(name, "").strip() for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"))
    if not base and not secret:
        found = "neither OPENAI_BASE_URL nor OPENAI_API_KEY is set"
        fix = "export OPENAI_BASE_URL=http://localhost:8000/v1, or OPENAI_API_KEY; the answers are kept"
        raise MissingError("the judge", found, "an OpenAI-compatible endpoint", fix)
    try:
        import openai
    except ImportError:
        raise MissingError("the judge", "openai is not installed", "the extra `judge`", INSTALL) from None
    key = secret or "none"
    try:
        client = openai.AsyncOpenAI(base_url=base or None, api_key=key, max_retries=RETRIES, timeout=TIMEOUT)
        await client.with_options(max_retries=0, timeout=10.0).get("/models", cast_to=object)
    except Exception as error:  # openai's own, and httpx's where the address is none
        status = getattr(error, "status_code", None)
        if status in (None, 401, 403):
            found = f"{host()} " + (f"answers HTTP {status}" if status else f"does not answer ({type(error).__name__})")
            fix = "start it, or correct OPENAI_BASE_URL and OPENAI_API_KEY"
            raise MissingError("the judge", found, "an endpoint that takes the key", fix) from None
    return client


class JudgeError(StudyError):
    """The judge fails while it grades; what it has graded is kept."""

    exit_code = 1

    def __init__(self, found: str, fix: str = "rerun the same command to resume: no answered call is paid again"):
        super().__init__("the judge", found, "an endpoint that grades", fix)


async def ask(client, request: dict) -> dict | None:
    """The judge's reply at temperature 0, as it is kept: its score is None where it holds no grade, and its tokens are
    estimated where they are not counted. None where this one answer is refused (a filter, too long a prompt)."""
    import openai

    sent = {name: request[name] for name in ("model", "messages")} | {"temperature": 0, "max_tokens": MAX_TOKENS}
    for attempt in range(RETRIES + 1):
        try:
            response = await client.chat.completions.create(**sent)
            text, usage = response.choices[0].message.content or "", response.usage
            counts = {name: getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")}
            estimated = None in counts.values()
            if estimated:
                counts = expected_reply(request) | {"completion_tokens": len(text) // 4}
            about = {name: request[name] for name in ("key", "model", "question", "turn")} | {"endpoint": host()}
            return {**about, "score": rating(text), **counts, "estimated": estimated, "reply": record.redact(text)}
        except openai.APIError as error:
            status = getattr(error, "status_code", None)
            if status in (400, 413, 422):
                return None
            found = f"HTTP {status}" if status else type(error).__name__
            if status and status < 500 and status not in (408, 409, 429):
                raise JudgeError(found, "check the model's name and the key") from None
            raise JudgeError(found) from None
        except (ValueError, LookupError, TypeError, AttributeError):  # no chat completion: a proxy's page, say
            await asyncio.sleep(min(0.5 * 2**attempt, 8.0))  # as the client does after a failure
    raise JudgeError("replies that are no chat completions")


def grade(waiting: list[dict], kept: Replies, cache: Path, workers: int = 8) -> list[dict]:
    """Ask until each request is final in `kept`, or refused; returns the replies, each appended to `cache` as soon as it
    is there. JudgeError when the judge stays away or refuses everything: then nothing more is asked, and what is under
    way is waited for."""
    record.write_jsonl(cache, record.read_jsonl(cache))  # cuts off a torn line, which the next row would continue
    queue, replies, done, refused = deque(waiting), [], 0, 0

    async def work(client) -> None:
        nonlocal done, refused
        try:
            while queue:
                request = queue.popleft()
                own = kept[request["key"]]
                while not is_final(own) and (reply := await ask(client, request)):
                    record.append_jsonl(cache, reply)
                    own.append(reply)
                    replies.append(reply)
                done, refused = done + 1, refused + (not is_final(own))
                if done == refused > ASKED_AGAIN:
                    raise JudgeError("every request is refused", "check the model's name and the endpoint's log")
                if done % 50 == 0 or done == len(waiting):
                    print(f"  {done} of {len(waiting)} answers graded", flush=True)
        finally:  # after a failure the other workers end with what they are at
            queue.clear()

    async def work_all() -> None:
        async with await connect() as client:
            works = [work(client) for _ in range(min(workers, len(waiting)))]
            for failure in filter(None, await asyncio.gather(*works, return_exceptions=True)):
                raise failure

    if waiting:
        asyncio.run(work_all())
    return replies


# ---- grades in the members' records


def reason_to_grade(folder: Path, model: str) -> str:
    """Why the member in `folder` is to be graded by `model`; the empty string where its grades are up to date."""
    judged = record.read_json(folder / JUDGED)
    if not judged:
        return "not graded"
    if judged["model"] != model:
        return f"graded by {judged['model']}, which this replaces"
    if judged["answers"] != record.sha256(folder / ANSWERS):
        return "with answers that changed since"
    return "with answers that were refused" if judged["refused"] else ""


def finish(folder: Path, asked: list[dict], kept: Replies, judge: Judge) -> dict:
    """Write a member's grades into its record; returns judged.json, which is written last. An answer that was refused,
    or whose every reply was without a grade, has none and is counted; no score stands in for it."""
    own, graded = [reply for request in asked for reply in kept[request["key"]]], []
    for request in asked:
        row = {**request, "score": score(kept[request["key"]])}
        names = ("question", "category", "turn", "score", "length", "text")
        graded.append({"kind": "answer", "judge": "mt_bench", **{name: row[name] for name in names}})
    scores = {
        "mt_bench_score": record.mean(row["score"] for row in graded),
        "mt_bench_score_corrected": record.mean(r["score"] for r in graded if r["question"] not in WRONG_REFERENCES),
        "mt_bench_unparsed": sum(row["score"] is None for row in graded),
    }
    (folder / JUDGED).unlink(missing_ok=True)  # until the new one is there the record is neither judge's
    record.write_jsonl(folder / REPLIES, own)
    predictions = [row for row in record.read_jsonl(folder / "predictions.jsonl") if row["kind"] != "answer"]
    record.write_jsonl(folder / "predictions.jsonl", [*predictions, *graded])
    record.write_json(folder / "metrics.json", {**record.read_json(folder / "metrics.json", {}), **scores})
    judged = {"model": judge.model, "endpoints": sorted({row["endpoint"] for row in own})}
    judged |= {"answers": record.sha256(folder / ANSWERS)}
    judged |= {"refused": sum(not is_final(kept[request["key"]]) for request in asked), **scores}
    record.write_json(folder / JUDGED, judged := {**judged, "spent": judge.add_up(own)})
    return judged
