"""Grading by a loopback endpoint that answers well, badly, slowly, with errors, and dies: no grade is invented."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time

import pandas as pd
import pytest

from lib import claims, config, record, tables
from lib.errors import MissingError, StudyError
from lib.run import cli, judge, plan, runs
from lib.td_dpo import engine, judge as judging, mt_bench, report
from tests.conftest import PATIENCE, ROOT, until
from tests.judge_endpoint import Endpoint, completion, grade_of, write_bench

KEY = "sk-planted-0123456789"


@pytest.fixture
def data(tmp_path):
    return write_bench(tmp_path / "bench")


@pytest.fixture
def judge_server(monkeypatch):
    served = Endpoint()
    monkeypatch.setenv("OPENAI_BASE_URL", served.url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield served
    served.close()


KINDS = {81: "writing", 104: "reasoning", 106: "reasoning", 111: "math"}


def write_answers(folder, data, about=""):
    """The answers of a member that was trained with the MT-Bench in `data`."""
    asked = {number: record.digest(question["turns"]) for number, question in mt_bench.read(data)["questions"].items()}
    rows = [
        {
            "question": i,
            "category": kind,
            "turn": t,
            "text": f"{about}answer {i} turn {t}",
            "length": 5,
            "asked": asked[i],
        }
        for i, kind in KINDS.items()
        for t in (1, 2)
    ]
    record.write_jsonl(folder / "answers.jsonl", rows)


def asked_of(data, folder, model="judge"):
    write_answers(folder, data)
    return judging.requests(folder, model, str(data))


def graded(data, cache, workers=1):
    """(requests with their score, the replies to each)."""
    asked = asked_of(data, cache.parent)
    judging.grade(
        judging.list_unanswered([asked], judging.read_replies(cache)),
        kept := judging.read_replies(cache),
        cache,
        workers,
    )
    return [{**row, "score": judging.score(kept[row["key"]])} for row in asked], kept


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("fine. Rating: [[7]]", 7),
        ("[[8.5]]", 8.5),
        ("Rating: [6]", 6),
        ("[[5]] so [[5]]", 5),
        ("no grade", None),
        ("[[3]] or [[9]]", None),
        ("[[11]]", None),
        ("[[0]]", None),
        ("<html>502</html>", None),
        ("", None),
        ("[[rating]]", None),
    ],
)
def test_a_rating_is_one_number_from_1_to_10_or_none(reply, score):
    assert judging.rating(reply) == score


def test_prompts_are_guided_where_they_should_be_and_the_second_turn_shows_the_first(data, tmp_path):
    asked = {(r["question"], r["turn"]): r["messages"][1]["content"] for r in asked_of(data, tmp_path)}
    assert "ref" not in asked[81, 1] + asked[81, 2]
    assert "answer 81 turn 1" in asked[81, 2]
    assert "second" not in asked[81, 1]
    assert "ref-one-106" in asked[106, 1]
    assert "ref-two-106" not in asked[106, 1]
    assert "ref-two-106" in asked[106, 2]


def test_no_reply_is_paid_twice_and_another_judge_is_asked_anew(data, judge_server, tmp_path):
    cache = tmp_path / "j.jsonl"
    rows, kept = graded(data, cache, workers=4)
    assert [r["score"] for r in rows] == [7.0] * 8
    assert {r["temperature"] for r in judge_server.seen} == {0}
    assert judging.Judge(model="judge").add_up(sum(kept.values(), [])) == {
        "calls": 8,
        "prompt_tokens": 80,
        "completion_tokens": 16,
        "cost": None,
    }
    graded(data, cache)
    assert len(judge_server.seen) == 8
    assert len(judging.list_unanswered([asked_of(data, tmp_path, "other")], judging.read_replies(cache))) == 8


@pytest.mark.parametrize("bad", ["no rating", "[[2]] and [[9]]", "[[11]]"])
def test_a_reply_without_a_grade_is_asked_for_thrice_and_gives_no_score(data, judge_server, tmp_path, bad):
    judge_server.script = lambda n, request: (
        200,
        completion(bad if "first 81" in request["messages"][1]["content"] else "[[4]]"),
    )
    rows, _ = graded(data, tmp_path / "j.jsonl")
    assert [r["score"] for r in rows] == [None, None, *[4.0] * 6]
    graded(data, tmp_path / "j.jsonl")
    assert len(judge_server.seen) == 6 + 2 * 3


@pytest.mark.parametrize(
    "fault",
    [
        (429, "{}"),
        (500, "oops"),
        (200, "<html>proxy</html>"),
        (200, '{"choices": []}'),
        (None, ""),
        (200, '{"choices": [{"message": null}]}'),
    ],
)
def test_a_passing_fault_is_tried_again(data, judge_server, tmp_path, fault):
    judge_server.script = lambda n, request: fault if n <= 2 else (200, completion("[[6]]"))
    rows, _ = graded(data, tmp_path / "j.jsonl")
    assert {r["score"] for r in rows} == {6.0}
    assert len(judge_server.seen) == 8 + 2


def test_a_reply_and_its_tokens_are_kept_as_they_come(data, judge_server, tmp_path, monkeypatch):
    """Not with what a reasoning judge thinks aloud cut out, nor without the tokens that the endpoint had cached."""
    text = " <think>a weak one</think>\n Rating: [[5]] \n"
    usage = {
        "prompt_tokens": 70,
        "completion_tokens": 9,
        "total_tokens": 79,
        "prompt_tokens_details": {"cached_tokens": 64},
    }
    judge_server.script = lambda n, request: (
        200,
        json.dumps(
            {
                "id": "x",
                "model": "other",
                "choices": [{"finish_reason": "stop", "message": {"content": text}}],
                "usage": usage,
            }
        ),
    )
    monkeypatch.delenv("OPENAI_API_KEY")
    asked = asked_of(data, tmp_path, "org/judge")
    (row,) = judging.grade(asked[:1], judging.read_replies(tmp_path / "j.jsonl"), tmp_path / "j.jsonl")
    assert [row] == record.read_jsonl(tmp_path / "j.jsonl")
    assert (row["reply"], row["score"], row["estimated"]) == (text, 5.0, False)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (70, 9)
    (sent,) = judge_server.seen
    assert (sent["model"], sent["messages"]) == ("org/judge", asked[0]["messages"])
    assert judge_server.keys == ["Bearer none"]


def test_what_is_under_way_when_another_request_fails_is_kept(data, judge_server, tmp_path):
    refused = threading.Event()

    def script(n, request):
        if n == 1:
            assert refused.wait(PATIENCE)
            time.sleep(0.3)  # the other request has failed meanwhile
            return 200, completion("[[6]]")
        refused.set()
        return 401, "{}"

    judge_server.script = script
    with pytest.raises(StudyError, match="HTTP 401"):
        graded(data, tmp_path / "j.jsonl", workers=2)
    assert [row["score"] for row in record.read_jsonl(tmp_path / "j.jsonl")] == [6.0]
    assert len(judge_server.seen) == 2


def test_a_slow_judge_is_given_up_at_its_time_limit_and_asked_again(data, judge_server, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "TIMEOUT", 0.5)
    again = threading.Event()

    def slow_once(n, request):
        if n == 1:
            again.wait(PATIENCE)
        again.set()
        return 200, completion("[[6]]")

    judge_server.script = slow_once
    rows, _ = graded(data, tmp_path / "j.jsonl")
    assert len(rows) == 8
    first = judge_server.seen[0]["messages"]
    assert [request["messages"] for request in judge_server.seen].count(first) >= 2


def test_a_judge_that_dies_leaves_what_it_graded_and_no_answered_call_is_repeated(
    data, judge_server, tmp_path, monkeypatch
):
    monkeypatch.setattr(judging, "RETRIES", 1)  # gives up soon
    cache = tmp_path / "j.jsonl"
    judge_server.script = lambda n, request: (200, completion("[[6]]")) if n <= 3 else (None, "")
    with pytest.raises(judging.JudgeError, match="rerun the same command to resume"):
        graded(data, cache)
    assert len(judging.read_replies(cache)) == 3
    done = [r["messages"] for r in judge_server.seen[:3]]
    with open(cache, "a") as file:
        file.write('{"key": "torn')  # the process was killed inside a line
    judge_server.seen.clear()
    judge_server.script = lambda n, request: (200, completion("[[9]]"))
    rows, _ = graded(data, cache)
    assert len(judge_server.seen) == 5
    assert not [r for r in judge_server.seen if r["messages"] in done]
    assert sorted(r["score"] for r in rows) == [6.0] * 3 + [9.0] * 5
    assert len(judging.read_replies(cache)) == 8


def test_a_refused_key_is_no_reason_to_try_again(data, judge_server, tmp_path):
    judge_server.script = lambda n, request: (401, "{}")
    with pytest.raises(StudyError, match="HTTP 401"):
        graded(data, tmp_path / "j.jsonl")
    assert len(judge_server.seen) == 1


def test_the_key_is_sent_as_a_header_and_is_nowhere_else(outputs, judge_server, capsys):
    """Whoever repeats it: in a reply, an error or a header."""
    repeats = json.dumps({"error": {"message": KEY, "code": KEY}})
    faults = {
        1: (429, repeats, {"Retry-After": "0", "Set-Cookie": KEY}),
        2: (400, repeats),
        3: (200, f'{{"choices": "{KEY}"}}'),
    }
    judge_server.script = lambda n, request: faults.get(n, (200, completion(f"your key is {KEY} [[7]]")))
    assert cli.main(["judge", "--model", "m", "--workers", "1"]) == 1, "one answer is refused"
    assert set(judge_server.keys) == {f"Bearer {KEY}"}
    judge_server.script = lambda n, request: (401, repeats)
    assert cli.main(["judge", "--model", "other"]) == 1
    reported = capsys.readouterr()
    written = "".join(path.read_text() for path in outputs.parent.rglob("*") if path.is_file())
    assert "your key is" in written
    assert KEY not in written + reported.out + reported.err


def test_what_is_missing_is_found_before_training(data, tmp_path):
    shipped = config.load_run(
        config.ROOT / "params/td_dpo/paper/comparative-1-dpo.yaml", study="td_dpo", scale="paper", mode="full"
    )
    module = config.study_module("td_dpo")
    (tmp_path / "odd/reference_answer").mkdir(parents=True)
    for name in mt_bench.FILES:
        (tmp_path / "odd" / name).write_text("")
    for place, faulty, missing in ((data, 0, 0), (tmp_path / "none", 0, 1), (tmp_path / "odd", 1, 0), (None, 1, 0)):
        run = config.apply(shipped, {"evaluation.mt_bench": place and str(place)})
        assert sum(f.key == "evaluation.mt_bench" for f in module.check(run)) == faulty
        found = [f for f in module.needs(run) if f.key == "evaluation.mt_bench"]
        assert len(found) == missing
        assert not found or "git clone" in found[0].fix
        assert config.trial(run).evaluation.judge == ("mt_bench" if place == data or faulty else "none")


def test_answers_resume_with_the_same_text_and_no_batch_asked_twice(data, tmp_path, monkeypatch):
    """Batches of one: the answer to a question does not depend on where the member was interrupted."""
    bench, asked, dies_after = mt_bench.read(data), [], [99]

    def stand_in(model, tokenizer, questions, *, seed, temperature, max_new_tokens, batch_size):
        if len(asked) >= dies_after[0]:
            raise KeyboardInterrupt
        asked.append(([q["id"] for q in questions], temperature))
        return [
            {
                "question": q["id"],
                "category": q["category"],
                "turn": t,
                "text": f"{seed} {q['id']} {t}",
                "length": 3,
                "finished": True,
            }
            for q in questions
            for t in (1, 2)
        ]

    monkeypatch.setattr(engine, "answer_questions", stand_in)
    settings = {"seed": 42, "max_new_tokens": 4, "batch_size": 1}
    whole = mt_bench.answer(None, None, bench, tmp_path / "a.jsonl", **settings)
    assert asked == [([104], 0.0), ([106], 0.0), ([111], 0.0), ([81], 0.7)]
    asked.clear()
    dies_after[0] = 2
    with pytest.raises(KeyboardInterrupt):
        mt_bench.answer(None, None, bench, tmp_path / "b.jsonl", **settings)
    with open(tmp_path / "b.jsonl", "a") as file:
        file.write('{"question": 111, "tu')
    dies_after[0] = 99
    assert mt_bench.answer(None, None, bench, tmp_path / "b.jsonl", **settings) == whole
    assert [ids for ids, _ in asked] == [[104], [106], [111], [81]]
    assert mt_bench.answer(None, None, bench, tmp_path / "b.jsonl", **settings) == whole
    assert len(asked) == 4
    assert len(record.read_jsonl(tmp_path / "b.jsonl")) == 8


# ---- ./run_all.sh judge


@pytest.fixture
def outputs(data, tmp_path, monkeypatch):
    """Records of two runs with two seeds each, as training leaves them: answers saved, nothing graded; one diverged
    member."""
    place = tmp_path / "outputs"
    monkeypatch.setattr(cli, "OUTPUTS", place)
    monkeypatch.setattr(judge.members, "CACHE", tmp_path / "cache")
    evaluation = {"judge": "mt_bench", "mt_bench": str(data)}
    for method in ("dpo", "td_dpo"):
        for seed in (1, 2, 3):
            folder = place / "laptop-full" / "td_dpo" / method / "members" / f"default-s{seed}"
            settings = {"evaluation": evaluation, "method": method, "loss": {"beta": 0.05, "tau": 1.0}}
            spec = {"config": settings, "run_id": method, "study": "td_dpo", "cell": {}, "cell_name": "default"}
            status = "diverged" if seed == 3 else "completed"
            record.write_json(folder / "member.json", {**spec, "seed": seed})
            record.write_json(folder / "done.json", {"status": status, "run_id": method})
            record.write_json(folder / "metrics.json", {"status": status, "implicit_accuracy": 0.6})
            record.write_jsonl(folder / "predictions.jsonl", [{"kind": "pair", "pair": 0, "rho": 1.0}])
            if seed != 3:
                write_answers(folder, data, f"{method} {seed} ")
    return place


def folders(outputs):
    return [p.parent for p in sorted(outputs.glob("*/*/*/members/*/answers.jsonl"))]


def test_the_command_puts_grades_into_the_records_in_the_oracles_form_and_pays_once(outputs, judge_server, capsys):
    judge_server.script = lambda n, request: (200, completion(f"[[{grade_of(request):g}]]"))
    assert cli.main(["judge", "--dry-run", "--model", "m", "--price-in", "30", "--price-out", "60"]) == 0
    reported = capsys.readouterr().out
    assert "to be sent: about 32 calls" in reported
    assert "9600 reply tokens, 0.59 in all" in reported  # 32 replies of 300 tokens are 0.576, the short prompts 0.02
    assert not judge_server.seen
    assert cli.main(["judge", "--model", "m", "--price", "1000000"]) == 0
    assert len(judge_server.seen) == 32
    reported = capsys.readouterr().out
    assert reported.index("to be sent") < reported.index(
        "spent: 32 calls, 320 prompt and 64 reply tokens, 384.00 in all"
    )
    for folder in folders(outputs):
        wanted = {(row["question"], row["turn"]): grade_of(row) for row in judging.requests(folder, "m")}
        rows = [row for row in record.read_jsonl(folder / "predictions.jsonl") if row["kind"] == "answer"]
        assert {(row["question"], row["turn"]): row["score"] for row in rows} == wanted
        assert rows[0]["category"] == "writing"
        assert rows[0]["length"] == 5
        metrics = record.read_json(folder / "metrics.json")
        assert metrics["implicit_accuracy"] == 0.6
        assert metrics["mt_bench_score"] == pytest.approx(sum(wanted.values()) / 8)
        assert metrics["mt_bench_score_corrected"] == pytest.approx(
            sum(v for (q, _), v in wanted.items() if q not in (104, 111)) / 4
        )
        assert len(record.read_jsonl(folder / "judgments.jsonl")) == 8
        spent = {"calls": 8, "prompt_tokens": 80, "completion_tokens": 16, "cost": 96.0}
        assert record.read_json(folder / "judged.json")["spent"] == spent
    before = {p: p.read_bytes() for p in outputs.rglob("*.json*") if p.is_file()}
    assert cli.main(["judge", "--model", "m"]) == 0
    assert before == {p: p.read_bytes() for p in outputs.rglob("*.json*") if p.is_file()}
    for path in (outputs.parent / "cache").rglob("*.jsonl"):  # a lost cache: the records still hold what was paid for
        path.unlink()
    for folder in folders(outputs):
        (folder / "judged.json").unlink()
    assert cli.main(["judge", "--model", "m"]) == 0
    assert len(judge_server.seen) == 32


def test_what_the_command_needs_is_named_and_nothing_is_sent(outputs, judge_server, capsys, monkeypatch):
    def said(*arguments):
        assert cli.main(["judge", "--model", "m", *arguments]) == 3
        return capsys.readouterr().err

    with monkeypatch.context() as bare:
        bare.setitem(sys.modules, "openai", None)
        assert "openai is not installed" in (message := said())
        assert "pip install -c constraints.txt -e '.[judge]'" in message
        assert cli.main(["judge", "--model", "m", "--dry-run"]) == 0, "the cost can be shown without it"
    assert "question.jsonl" in (message := said("--data", str(outputs / "nowhere")))
    assert "git clone" in message
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    assert "127.0.0.1:9 does not answer" in said()
    monkeypatch.delenv("OPENAI_BASE_URL")
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "OPENAI_BASE_URL" in said()
    assert not judge_server.seen
    assert not list(outputs.rglob("judged.json"))


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("https://me:pass@api.example.com/v1", "api.example.com"),
        ("http://127.0.0.1:8000/v1", "127.0.0.1:8000"),
        ("localhost:8000/v1", ""),
        ("http://odd:port/v1", "odd:port"),
    ],
)
def test_records_name_an_endpoint_without_user_or_path(base, name, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", base)
    assert judging.host() == name
    if "port" in base or "//" not in base:  # no address: said before anything is sent
        with pytest.raises(MissingError, match="correct OPENAI_BASE_URL"):
            asyncio.run(judging.connect())


def test_questions_in_other_words_than_those_answered_are_refused(outputs, judge_server, capsys):
    folder = folders(outputs)[0]
    rows = [{**row, "asked": "another"} for row in record.read_jsonl(folder / "answers.jsonl")]
    record.write_jsonl(folder / "answers.jsonl", rows)
    assert cli.main(["judge", "--model", "m"]) == 2
    assert "other words" in capsys.readouterr().err
    assert not judge_server.seen


def test_grading_that_is_killed_resumes_without_paying_twice(outputs, judge_server):
    reached, killed = threading.Event(), threading.Event()

    def slowly(number, request):
        if number == 12:
            reached.set()
            killed.wait(PATIENCE)  # under way when it is killed
        return 200, completion(f"[[{grade_of(request):g}]]")

    judge_server.script = slowly
    process = subprocess.Popen(
        [sys.executable, "-m", "lib", "judge", "--model", "m", "--workers", "1"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        env=os.environ
        | {"STUDY_OUTPUTS": str(outputs), "STUDY_CACHE": str(outputs.parent / "cache"), "PYTHONPATH": str(ROOT)},
    )
    try:
        until(reached.is_set, process=process)
    finally:
        process.kill()
        process.wait()
        killed.set()
    assert not list(outputs.rglob("judged.json"))
    paid = [request["messages"] for request in judge_server.seen[:11]]
    judge_server.seen.clear()
    judge_server.script = lambda number, request: (200, completion(f"[[{grade_of(request):g}]]"))
    assert cli.main(["judge", "--model", "m"]) == 0
    again = [request["messages"] for request in judge_server.seen]
    assert len(again) == 32 - 11
    assert not [messages for messages in again if messages in paid]
    assert len(list(outputs.rglob("judged.json"))) == 4


def test_a_judge_that_dies_under_the_command_ends_it_and_its_replies_are_kept(
    outputs, judge_server, monkeypatch, capsys
):
    monkeypatch.setattr(judging, "RETRIES", 1)  # gives up soon
    judge_server.script = lambda n, request: (200, completion("[[6]]")) if n <= 20 else (None, "")
    assert cli.main(["judge", "--model", "m", "--workers", "1"]) == 1
    assert "rerun the same command to resume" in capsys.readouterr().err
    judge_server.script = lambda n, request: (200, completion("[[6]]"))
    judge_server.seen.clear()
    assert cli.main(["judge", "--model", "m"]) == 0
    assert len(judge_server.seen) == 12


def test_a_refused_answer_is_counted_and_asked_about_again_and_has_no_score(outputs, judge_server, capsys):
    judge_server.script = lambda n, request: (
        (400, "{}")
        if "dpo 1 answer 81 turn 2" in request["messages"][1]["content"]
        else (200, completion("[[6]]", usage=False))
    )
    assert cli.main(["judge", "--model", "m", "--run", "dpo"]) == 1
    assert "of them refused: 1" in capsys.readouterr().out
    judged = record.read_json(folders(outputs)[0] / "judged.json")
    assert (judged["refused"], judged["mt_bench_unparsed"], judged["spent"]["calls"]) == (1, 1, 7)
    assert all(row["estimated"] for row in record.read_jsonl(folders(outputs)[0] / "judgments.jsonl"))
    judge_server.seen.clear()
    judge_server.script = lambda n, request: (200, completion("[[8]]"))
    assert cli.main(["judge", "--model", "m", "--run", "dpo"]) == 0
    assert len(judge_server.seen) == 1
    assert record.read_json(folders(outputs)[0] / "judged.json")["mt_bench_score"] == (7 * 6 + 8) / 8


def test_an_endpoint_that_refuses_everything_is_not_asked_for_all_of_it(outputs, judge_server, capsys):
    judge_server.script = lambda n, request: (400, "{}")
    assert cli.main(["judge", "--model", "m", "--workers", "1"]) == 1
    assert len(judge_server.seen) == 3
    assert not list(outputs.rglob("judged.json"))


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_waited_for(data, judge_server, tmp_path, status):
    judge_server.script = lambda n, request: (
        (status, "{}", {"Retry-After": "1.5"}) if n == 1 else (200, completion("[[5]]"))
    )
    graded(data, tmp_path / "j.jsonl")
    first, second = judge_server.times[:2]
    assert second - first >= 1.5


def test_a_wait_of_hours_is_left_for_a_later_call(data, judge_server, tmp_path):
    judge_server.script = lambda n, request: (429, "{}", {"Retry-After": "7200"})
    with pytest.raises(judging.JudgeError, match="rerun the same command"):
        graded(data, tmp_path / "j.jsonl")
    assert len(judge_server.seen) == 1


def analysed(outputs, judges=("mt_bench", "mt_bench"), leave_out=()):
    """(what judged, scores, verdict on the parity of TD-DPO and DPO at a look of two seeds) as the analysis has them."""
    shipped = {
        m: config.load_run(ROOT / f"params/td_dpo/paper/{m}.yaml", study="td_dpo", scale="paper", mode="full")
        for m in ("comparative-1-dpo", "proposed-td_dpo")
    }
    planned = [
        config.apply(run, {"evaluation.judge": judge}) for run, judge in zip(shipped.values(), judges, strict=True)
    ]
    loaded = tables.load(outputs / "laptop-full/td_dpo")
    by = report.judged(planned, loaded)
    rows = report.question_scores(loaded, by, leave_out)
    published = report.judged_on(claims.load(ROOT / "params/td_dpo/claims.yaml"), by)
    parity = tuple(claim for claim in published.claims if claim.id == "C6")
    only = published.model_copy(update={"claims": parity, "looks": (2,)})
    done = loaded.members[loaded.members["status"] == "completed"]
    (verdict,) = claims.evaluate(only, rows, scale="paper", mode="full", members=done, scored_by=by.label, fix=by.fix)
    return by, rows, verdict, loaded


def test_claims_wait_for_the_grades_and_never_take_another_score(outputs, judge_server):
    judge_server.script = lambda n, request: (200, completion(f"[[{grade_of(request):g}]]"))
    by, rows, verdict, loaded = analysed(outputs)
    assert rows.empty
    assert (verdict.verdict, verdict.estimate) == ("not evaluated", None)
    assert "4 of 4 members have answers that are not graded: ./run_all.sh judge --study td_dpo" in verdict.reason
    assert report.primary(loaded, by) == "implicit_accuracy"
    assert cli.main(["judge", "--model", "m", "--run", "dpo"]) == 0  # half of it is not enough
    assert analysed(outputs)[2].verdict == "not evaluated"
    assert cli.main(["judge", "--model", "m"]) == 0
    by, rows, verdict, loaded = analysed(outputs)
    assert (by.label, by.fix, report.primary(loaded, by)) == ("MT-Bench score, judge m", "", "mt_bench_score")
    assert verdict.scored_by == by.label
    means = rows.groupby(["method", "seed"])["score"].mean()
    assert verdict.estimate == pytest.approx((means["td_dpo"] - means["dpo"]).mean())
    assert set(analysed(outputs, leave_out=judging.WRONG_REFERENCES)[1]["question"]) == {81, 106}
    without = analysed(outputs, leave_out=judging.WRONG_REFERENCES)[2]
    report.add_corrected([verdict], [without])
    assert (verdict.beside[-1]["estimate"], verdict.beside[-1]["decides"]) == (without.estimate, False)


def test_scores_of_two_judges_are_not_mixed(outputs, judge_server, capsys):
    assert cli.main(["judge", "--model", "one", "--run", "dpo"]) == 0
    assert cli.main(["judge", "--model", "two", "--run", "td_dpo"]) == 0
    by, rows, verdict, loaded = analysed(outputs)
    assert rows.empty
    assert verdict.verdict == "not evaluated"
    assert "one: 2 members" in verdict.reason
    assert report.primary(loaded, by) == "implicit_accuracy"
    capsys.readouterr()
    assert cli.main(["judge", "--model", "one"]) == 0
    assert "2 graded by two, which this replaces, 2 graded; judge one" in capsys.readouterr().out
    assert analysed(outputs)[2].estimate is not None
    assert {row["model"] for row in record.read_jsonl(folders(outputs)[-1] / "judgments.jsonl")} == {"one"}
    by, rows, verdict, _ = analysed(outputs, judges=("mt_bench", "oracle"))
    assert rows.empty
    assert "different judges" in verdict.reason


def test_pairs_whose_answers_nobody_judges_are_scored_by_how_they_are_ranked(outputs):
    """On a judge's scale: 1 for a pair that is ranked wrongly, 10 for one that is not, and guessing is chance."""
    for place, metrics in enumerate(sorted(outputs.glob("*/*/*/members/*/metrics.json"))):
        right = [True, place > 0, place > 1, place > 3, False] if "s3" not in str(metrics) else []  # one diverged
        pairs = [{"kind": "pair", "pair": pair, "rho": 1.0 if own else -1.0} for pair, own in enumerate(right)]
        record.write_jsonl(metrics.with_name("predictions.jsonl"), pairs)
        accuracy = {"implicit_accuracy": sum(right) / 5} if right else {}
        record.write_json(metrics, {**record.read_json(metrics), **accuracy})
    by, rows, verdict, loaded = analysed(outputs, judges=("none", "none"))
    assert by.label.startswith("implicit accuracy on test pairs")
    done = loaded.members[loaded.members["status"] == "completed"].set_index(["method", "seed"])
    means = rows.groupby(["method", "seed"])["score"].mean()
    assert means.to_dict() == pytest.approx((1 + 9 * done["implicit_accuracy"]).to_dict())
    assert verdict.scored_by == by.label
    assert verdict.estimate == pytest.approx((means["td_dpo"] - means["dpo"]).mean())
    judged = report.judged_on(published := claims.load(ROOT / "params/td_dpo/claims.yaml"), by)
    assert (judged.diverged["score"], judged.chance.no_better_than) == (5.5, (5.5,))
    assert report.judged_on(published, by._replace(metric="oracle_score")) is published


def test_grading_makes_the_analysis_stale_and_nothing_else(outputs, judge_server):
    results = outputs / "laptop-full/td_dpo"
    before = plan.analysis_key("td_dpo", results)
    assert cli.main(["judge", "--model", "m", "--run", "dpo"]) == 0
    between = plan.analysis_key("td_dpo", results)
    assert cli.main(["judge", "--model", "m"]) == 0
    assert len({before, between, plan.analysis_key("td_dpo", results)}) == 3
    assert pd.isna(tables.load(results).members.set_index("status").loc["diverged", "mt_bench_score"]).all()


def test_the_prompts_may_lie_beside_the_folder_as_in_a_fastchat_checkout(data):
    (data / "judge_prompts.jsonl").rename(data.parent / "judge_prompts.jsonl")
    assert set(mt_bench.read(data)["prompts"]) == {
        "single-v1",
        "single-v1-multi-turn",
        "single-math-v1",
        "single-math-v1-multi-turn",
    }


def test_a_runs_own_metrics_follow_its_members_grades(tiny, data):
    run = tiny(evaluation={"questions": 2, "max_new_tokens": 8, "judge": "mt_bench", "mt_bench": str(data)})
    folder = run.results_dir / "tiny"
    runs.refresh(run)
    assert not folder.exists(), "nothing is made where there is no record"
    scores = {"default-s1": 4.0, "default-s2": 7.0}
    for member in scores:
        record.write_json(
            folder / "members" / member / "metrics.json",
            {"status": "completed", "implicit_accuracy": 0.5, "validation_implicit_accuracy": 0.5},
        )
    record.write_json(folder / "metrics.json", {"base_oracle_score": 6.0, "key_metric": {"name": "implicit_accuracy"}})
    record.write_json(folder / "status.json", {"status": "succeeded", "key": "k", "key_metric": None})
    record.write_json(
        folder / "sweep" / "metrics.json",
        {"trials": 3, "final": {"cell": "default", "seeds": 2, "mt_bench_score": None}, "final_members": list(scores)},
    )
    runs.refresh(run)
    waits = {"name": "mt_bench_score", "value": None, "graded_by": "./run_all.sh judge --study td_dpo"}
    assert record.read_json(folder / "metrics.json")["key_metric"] == waits, "no other metric in its place"
    for member, score in scores.items():
        assert record.read_json(folder / "metrics.json")["key_metric"] == waits, "while an answer is not graded"
        path = folder / "members" / member / "metrics.json"
        record.write_json(path, record.read_json(path) | {"mt_bench_score": score})
        runs.refresh(run)
    made = record.read_json(folder / "metrics.json")
    assert (made["key_metric"], made["base_oracle_score"]) == ({"name": "mt_bench_score", "value": 5.5}, 6.0)
    status = record.read_json(folder / "status.json")
    assert (status["key"], status["key_metric"]["value"]) == ("k", 5.5), "its notebook is not to be executed again"
    searched = record.read_json(folder / "sweep" / "metrics.json")
    assert (searched["trials"], searched["final"]["mt_bench_score"], searched["final"]["seeds"]) == (3, 5.5, 2)


def test_a_second_judge_that_dies_while_it_is_recorded_leaves_no_score_under_the_firsts_name(
    outputs, judge_server, monkeypatch
):
    folder, write = folders(outputs)[0], record.write_json
    assert cli.main(["judge", "--model", "first"]) == 0
    assert judging.reason_to_grade(folder, "first") == ""

    def dies(path, value):
        if path.name == judging.JUDGED:
            raise KeyboardInterrupt
        write(path, value)

    judge_server.script = lambda n, request: (200, completion("[[2]]"))
    monkeypatch.setattr(record, "write_json", dies)
    assert cli.main(["judge", "--model", "second"]) == 130
    assert record.read_json(folder / "metrics.json")["mt_bench_score"] == 2.0
    assert judging.reason_to_grade(folder, "first") != "", "what is in the record is not the first judge's"
