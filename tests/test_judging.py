"""Grading by a loopback endpoint that answers well, badly, slowly, with errors, and dies: no grade is invented."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lib import config, record
from lib.errors import MissingError, StudyError
from lib.td_dpo import judging, mt_answers, mt_bench, sampling

KEY = "sk-planted-0123456789"
SINGLE = {"system_prompt": "Be fair.", "prompt_template": "Q {question} A {answer}"}
TURNS = {"system_prompt": "Be fair.", "prompt_template": "{question_1} {answer_1} {question_2} {answer_2}"}


@pytest.fixture
def data(tmp_path):
    """Four questions in FastChat's layout: 81 writing, 104 reasoning (its reference is known to be wrong), 106, 111."""
    folder = tmp_path / "bench"
    kinds = {81: "writing", 104: "reasoning", 106: "reasoning", 111: "math"}
    record.write_jsonl(folder / "question.jsonl", [
        {"question_id": i, "category": c, "turns": [f"first {i}?", f"second {i}?"]} for i, c in kinds.items()])
    record.write_jsonl(folder / "reference_answer/gpt-4.jsonl", [
        {"question_id": i, "choices": [{"turns": [f"ref-one-{i}", f"ref-two-{i}"]}]} for i in kinds if i != 81])
    guided = [{**p, "prompt_template": p["prompt_template"] + refs} for p, refs in
              ((SINGLE, " R {ref_answer_1}"), (TURNS, " R {ref_answer_1} {ref_answer_2}"))]
    names = ("single-v1", "single-v1-multi-turn", "single-math-v1", "single-math-v1-multi-turn")
    record.write_jsonl(folder / "judge_prompts.jsonl",
                       [{"name": n, **p} for n, p in zip(names, (SINGLE, TURNS, *guided), strict=True)])
    return folder


@pytest.fixture
def judge_server(monkeypatch):
    """`served.script`: (number of the call, request) -> (status, body); `served.seen`: the requests."""
    class Served:
        seen, headers, lock = [], [], threading.Lock()

        def script(self, number, request):
            return 200, completion("[[7]]")

    served = Served()
    served.seen, served.headers = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with served.lock:
                served.seen.append(request)
                served.headers.append(self.headers.get("Authorization"))
                number = len(served.seen)
            status, body = served.script(number, request)
            if status is None:  # dies: the connection is closed without a word
                return
            self.send_response(status)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # a client that has given up
                self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield served
    server.shutdown()
    server.server_close()


def completion(text):
    return json.dumps({"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 10, "completion_tokens": 2}})


def answers(ids=(81, 104, 106, 111)):
    return [{"question": i, "turn": t, "text": f"answer {i} turn {t}"} for i in ids for t in (1, 2)]


def graded(data, cache, **more):
    settings = {"workers": 1, "attempts": 4, "wait": 0.001, **more}
    return judging.grade(mt_bench.read(data), answers(), "judge", cache, **settings)


@pytest.mark.parametrize(("reply", "score"), [
    ("fine. Rating: [[7]]", 7), ("[[8.5]]", 8.5), ("Rating: [6]", 6), ("[[5]] so [[5]]", 5), ("no grade", None),
    ("[[3]] or [[9]]", None), ("[[11]]", None), ("[[0]]", None), ("<html>502</html>", None), ("", None), ("[[rating]]", None),
])
def test_a_rating_is_one_number_from_1_to_10_or_none(reply, score):
    assert mt_bench.rating(reply) == score


def test_prompts_are_guided_where_they_should_be_and_the_second_turn_shows_the_first(data):
    asked = {(r["question"], r["turn"]): r["messages"][1]["content"] for r in
             judging.requests(mt_bench.read(data), answers(), "judge")}
    assert "ref" not in asked[81, 1] + asked[81, 2]
    assert "answer 81 turn 1" in asked[81, 2]
    assert "second" not in asked[81, 1]
    assert "ref-one-106" in asked[106, 1]
    assert "ref-two-106" not in asked[106, 1]
    assert "ref-two-106" in asked[106, 2]


def test_grades_are_kept_for_ever_and_the_cost_is_told_before_and_counted_after(data, judge_server, tmp_path):
    bench, cache = mt_bench.read(data), tmp_path / "j.jsonl"
    before = judging.cost(judging.requests(bench, answers(), "judge"), {}, 1.0, 2.0)
    assert (before["calls"], before["cached"]) == (8, 0)
    assert before["price"] == pytest.approx((before["prompt_tokens"] + 2 * 8 * judging.REPLY_TOKENS) / 1e6)
    rows, spent = graded(data, cache, workers=4)
    assert [r["score"] for r in rows] == [7.0] * 8
    assert spent == {"calls": 8, "prompt_tokens": 80, "completion_tokens": 16, "refused": 0}
    assert {r["temperature"] for r in judge_server.seen} == {0}
    assert graded(data, cache)[1]["calls"] == 0
    assert len(judge_server.seen) == 8
    assert judging.cost(judging.requests(bench, answers(), "other"), judging.load_cache(cache), None, None)["calls"] == 8


@pytest.mark.parametrize("bad", ["no rating", "[[2]] and [[9]]", "[[11]]"])
def test_an_unparsed_grade_is_asked_thrice_then_null_and_counted(data, judge_server, tmp_path, bad):
    judge_server.script = lambda n, request: (
        200, completion(bad if "first 81" in request["messages"][1]["content"] else "[[4]]"))
    rows, spent = graded(data, tmp_path / "j.jsonl")
    told = mt_bench.summary(rows)
    assert [r["score"] for r in rows if r["question"] == 81] == [None, None]
    assert (told["unparsed"], told["graded"], told["mt_bench_score"]) == (2, 6, 4.0)
    assert spent["calls"] == 6 + 2 * 3
    assert graded(data, tmp_path / "j.jsonl")[1]["calls"] == 0


@pytest.mark.parametrize("fault", [(429, "{}"), (500, "oops"), (200, "<html>proxy</html>"), (200, '{"choices": []}'),
                                   (None, "")])
def test_a_passing_fault_is_tried_again(data, judge_server, tmp_path, fault):
    judge_server.script = lambda n, request: fault if n <= 2 else (200, completion("[[6]]"))
    rows, _ = graded(data, tmp_path / "j.jsonl")
    assert {r["score"] for r in rows} == {6.0}
    assert len(judge_server.seen) == 8 + 2


def test_a_slow_judge_is_given_up_at_its_time_limit_and_asked_again(data, judge_server, tmp_path):
    def slow_once(n, request):
        time.sleep(1.0 if n == 1 else 0)
        return 200, completion("[[6]]")

    judge_server.script = slow_once
    rows, _ = graded(data, tmp_path / "j.jsonl", timeout=0.4)
    assert len(rows) == 8
    assert len(judge_server.seen) == 9


def test_a_judge_that_dies_leaves_what_it_graded_and_no_answered_call_is_repeated(data, judge_server, tmp_path):
    cache = tmp_path / "j.jsonl"
    judge_server.script = lambda n, request: (200, completion("[[6]]")) if n <= 3 else (None, "")
    with pytest.raises(MissingError, match="the same command again"):
        graded(data, cache)
    assert len(judging.load_cache(cache)) == 3
    done = [r["messages"] for r in judge_server.seen[:3]]
    with open(cache, "a") as file:
        file.write('{"key": "torn')  # the process was killed inside a line
    judge_server.seen.clear()
    judge_server.script = lambda n, request: (200, completion("[[9]]"))
    rows, spent = graded(data, cache)
    assert (len(judge_server.seen), spent["calls"]) == (5, 5)
    assert not [r for r in judge_server.seen if r["messages"] in done]
    assert sorted(r["score"] for r in rows) == [6.0] * 3 + [9.0] * 5
    assert len(judging.load_cache(cache)) == 8


def test_a_refused_key_is_no_reason_to_try_again(data, judge_server, tmp_path):
    judge_server.script = lambda n, request: (401, "{}")
    with pytest.raises(StudyError, match="HTTP 401"):
        graded(data, tmp_path / "j.jsonl")
    assert len(judge_server.seen) == 1


def test_the_second_score_leaves_out_the_wrong_references():
    rows = [{"question": q, "category": "math", "turn": 1, "score": s} for q, s in ((111, 2.0), (112, 8.0), (113, None))]
    told = mt_bench.summary(rows)
    assert (told["mt_bench_score"], told["mt_bench_score_corrected"], told["unparsed"]) == (5.0, 8.0, 1)


def test_the_command_shows_the_cost_first_and_never_writes_the_key(data, judge_server, tmp_path, capsys):
    path = tmp_path / "run" / "answers.jsonl"
    record.write_jsonl(path, answers())
    command = [str(path), "--data", str(data), "--model", "judge", "--workers", "2"]
    assert judging.main([*command, "--dry", "--price-in", "1", "--price-out", "1"]) == 0
    assert "8 judge calls, 0 cached" in capsys.readouterr().out
    assert judge_server.seen == []
    judge_server.script = lambda n, request: (200, completion(f"your key is {KEY} [[7]]"))
    assert judging.main(command) == 0
    assert set(judge_server.headers) == {f"Bearer {KEY}"}
    written = "".join(p.read_text() for p in path.parent.iterdir() if p.is_file())
    assert judging.main(command) == 0
    made = record.read_json(path.with_name("mt_bench.json"))
    assert (made["mt_bench_score"], made["spent"]["calls"]) == (7, 8), "what the grades took stays recorded"
    assert len(judge_server.seen) == 8
    told = capsys.readouterr()
    assert KEY not in written + told.out + told.err


def test_what_is_missing_is_named_with_its_mend(data, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    path = tmp_path / "answers.jsonl"
    record.write_jsonl(path, answers())
    assert judging.main([str(path), "--data", str(data), "--model", "judge"]) == 3
    assert "OPENAI_BASE_URL" in capsys.readouterr().err
    assert judging.main([str(path), "--data", str(tmp_path / "none"), "--model", "judge"]) == 3
    assert "question.jsonl" in capsys.readouterr().err
    shipped = config.load_run(config.ROOT / "params/td_dpo/paper/dpo.yaml", study="td_dpo", scale="paper", mode="full")
    for place, levels in ((data, []), (tmp_path / "none", ["error"])):  # found before training, not after it
        run = config.apply(shipped, {"evaluation.mt_bench": str(place)})
        assert [f.level for f in config.study_module("td_dpo").check(run) if f.key == "evaluation.mt_bench"] == levels


def test_answers_resume_with_the_same_text_and_no_question_asked_twice(data, tmp_path, monkeypatch):
    """Batches of one: the answer to a question does not depend on where the member was interrupted."""
    bench, asked, dies_after = mt_bench.read(data), [], [99]

    def stand_in(model, tokenizer, questions, *, seed, temperature, max_new_tokens, batch_size):
        if len(asked) >= dies_after[0]:
            raise KeyboardInterrupt
        asked.append(([q["id"] for q in questions], temperature))
        return [{"question": q["id"], "category": q["category"], "turn": t, "text": f"{seed} {q['id']} {t}", "length": 3,
                 "finished": True} for q in questions for t in (1, 2)]

    monkeypatch.setattr(sampling, "answer_questions", stand_in)
    settings = {"seed": 42, "max_new_tokens": 4, "batch_size": 1}
    whole = mt_answers.answer(None, None, bench, tmp_path / "a.jsonl", **settings)
    assert asked == [([104], 0.0), ([106], 0.0), ([111], 0.0), ([81], 0.7)]
    asked.clear()
    dies_after[0] = 2
    with pytest.raises(KeyboardInterrupt):
        mt_answers.answer(None, None, bench, tmp_path / "b.jsonl", **settings)
    with open(tmp_path / "b.jsonl", "a") as file:
        file.write('{"question": 111, "tu')
    dies_after[0] = 99
    assert mt_answers.answer(None, None, bench, tmp_path / "b.jsonl", **settings) == whole
    assert [ids for ids, _ in asked] == [[104], [106], [111], [81]]
    assert mt_answers.answer(None, None, bench, tmp_path / "b.jsonl", **settings) == whole
    assert len(asked) == 4
    assert len(record.read_jsonl(tmp_path / "b.jsonl")) == 8
