"""An OpenAI-compatible judge on the loopback interface that answers well, badly, slowly, with errors, or not at all.

As a script it grades every answer by a number made of its prompt, for trying `./run_all.sh judge` by hand:

    python -m tests.judge_endpoint PORT [--every-429 N] [--every-500 N] [--every-silent N] [--every-bad N] [--delay S]
    [--log F]
"""

import argparse
import contextlib
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from lib import record

SINGLE = {"system_prompt": "Be fair.", "prompt_template": "Q {question} A {answer}"}
TURNS = {"system_prompt": "Be fair.", "prompt_template": "{question_1} {answer_1} {question_2} {answer_2}"}


def write_bench(folder: Path) -> Path:
    """Four questions in FastChat's layout: 81 writing, 104 reasoning (its reference is known to be wrong), 106, 111."""
    kinds = {81: "writing", 104: "reasoning", 106: "reasoning", 111: "math"}
    record.write_jsonl(
        folder / "question.jsonl",
        [{"question_id": i, "category": c, "turns": [f"first {i}?", f"second {i}?"]} for i, c in kinds.items()],
    )
    record.write_jsonl(
        folder / "reference_answer/gpt-4.jsonl",
        [{"question_id": i, "choices": [{"turns": [f"ref-one-{i}", f"ref-two-{i}"]}]} for i in kinds if i != 81],
    )
    guided = [
        {**p, "prompt_template": p["prompt_template"] + refs}
        for p, refs in ((SINGLE, " R {ref_answer_1}"), (TURNS, " R {ref_answer_1} {ref_answer_2}"))
    ]
    names = ("single-v1", "single-v1-multi-turn", "single-math-v1", "single-math-v1-multi-turn")
    record.write_jsonl(
        folder / "judge_prompts.jsonl", [{"name": n, **p} for n, p in zip(names, (SINGLE, TURNS, *guided), strict=True)]
    )
    return folder


def completion(text: str, usage: bool = True) -> str:
    made = {"choices": [{"message": {"content": text}}]}
    return json.dumps(made | ({"usage": {"prompt_tokens": 10, "completion_tokens": 2}} if usage else {}))


def grade_of(request: dict) -> float:
    """From 1 to 10 in halves, by the prompt alone."""
    digest = hashlib.sha256(json.dumps(request["messages"], sort_keys=True).encode()).digest()
    return 1 + digest[0] % 19 / 2


class Endpoint:
    """`script`: (number of the call, request) -> (status, body, headers); a status of None closes the connection.
    `seen` are the requests, `times` when they came, `keys` their Authorization headers."""

    def __init__(self, port: int = 0):
        self.seen, self.times, self.keys, self.lock = [], [], [], threading.Lock()
        self.script = lambda number, request: (200, completion("[[7]]"))
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200 if self.path.endswith("/models") else 404)
                self.end_headers()
                self.wfile.write(b'{"data": []}')

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    endpoint.seen.append(request)
                    endpoint.times.append(time.monotonic())
                    endpoint.keys.append(self.headers.get("Authorization"))
                    number = len(endpoint.seen)
                status, body, *more = endpoint.script(number, request)
                if status is None:
                    return
                self.send_response(status)
                for name, value in (more[0] if more else {}).items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # a client that has given up
                    self.wfile.write(body.encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def main() -> None:
    top = argparse.ArgumentParser()
    top.add_argument("port", type=int)
    for name in ("429", "500", "silent", "bad"):
        top.add_argument(f"--every-{name}", type=int, default=0)
    top.add_argument("--delay", type=float, default=0.0)
    top.add_argument("--log", default="/dev/null", help="a line per call: its status and the digest of its prompt")
    given, made = top.parse_args(), None

    def every(name: str, number: int) -> bool:
        wanted = getattr(given, f"every_{name}")
        return bool(wanted) and number % wanted == 0

    def script(number: int, request: dict):
        time.sleep(given.delay)
        answer = (200, completion(f"So so. Rating: [[{grade_of(request):g}]]"))
        for name, faulty in (
            ("429", (429, "{}", {"Retry-After": "1"})),
            ("500", (500, "oops")),
            ("silent", (None, "")),
            ("bad", (200, completion("no grade"))),
        ):
            answer = faulty if every(name, number) else answer
        digest = hashlib.sha256(json.dumps(request["messages"]).encode()).hexdigest()[:12]
        with made.lock, open(given.log, "a") as log:
            log.write(f"{answer[0]} {digest} {answer[1][:60]!r}\n")
        return answer

    made = Endpoint(given.port)
    made.script = script
    print(made.url, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
