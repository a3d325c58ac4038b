"""A W&B server on the loopback interface, as far as wandb 0.31.0's client and its core process ask: GraphQL, file
stream, file upload and download. It keeps what it is sent in memory, and can be reported to misbehave in the ways that
servers do.

    with serve() as server: ...       server.url, server.runs, server.requests; server.fault = "slow" | "malformed" | …
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote, urlparse

ENTITY = "team"
KEY = "f00d" * 10  # the form of a key: 40 hexadecimal digits
FEATURES: tuple[str, ...] = ()
# Replies that no server should send, whatever was asked.
MALFORMED = {
    "not_json": b"<html>gateway</html>",
    "wrong_types": b'{"data": {"viewer": 7, "model": [1], "project": "x"}}',
    "empty": b"",
    "cut_off": b'{"data": {"viewer": {"id": "V',
}
# The one found that ends wandb-core 0.31.0 (a nil pointer where it saves a run's files): {operation: reply}.
CORE_CRASH = {"CreateRunFiles": b'{"data": {"createRunFiles": null}}'}


class Server(ThreadingHTTPServer):
    """`fault`: None, "refuse" (the connection is cut), "slow" (each reply takes `delay` seconds), "error" (HTTP 500),
    or a name in MALFORMED; `fault_from`: the number of history rows after which it begins; `answers`: {operation: its
    reply}."""

    daemon_threads, allow_reuse_address = True, True
    request_queue_size = 128

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.runs: dict[str, dict] = {}
        self.requests: list[tuple[str, str]] = []  # (operation or path, run)
        self.bodies: list[bytes] = []  # all that was sent
        self.fault, self.delay, self.fault_from = None, 0.0, 0
        self.answers: dict[str, bytes] = {}  # operation -> what to reply to it, whatever it asked
        self.guard = threading.RLock()

    def rows(self, name: str) -> list[dict]:
        """The history of a run as it was sent."""
        return [json.loads(line) for line in self.runs[name]["history"]]

    def received(self) -> int:
        return sum(len(run["history"]) for run in self.runs.values())

    def sent(self) -> list[str]:
        """What would change a run, of all that was asked: the rest only reads."""
        return [name for name, _ in self.requests if name in ("UpsertBucket", "CreateRunFiles", "file_stream", "PUT")]

    def handle_error(self, request, client_address):  # a client that goes away is no news
        pass


@contextlib.contextmanager
def serve(port: int = 0):
    server = Server(port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def body(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.bodies.append(content)
        return content

    def reply(self, content: bytes, status: int = 200, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def misbehave(self) -> bool:
        """Whether the fault of the moment has dealt with this request."""
        server = self.server
        if not server.fault or server.received() < server.fault_from:
            return False
        if server.fault == "slow":
            time.sleep(server.delay)
            return False
        if server.fault == "refuse":
            self.close_connection = True
            self.connection.close()
        elif server.fault == "error":
            self.reply(b"{}", 500)
        else:
            self.reply(MALFORMED[server.fault])
        return True

    def do_POST(self):
        content, path = self.body(), urlparse(self.path).path
        if path == "/graphql":
            asked = json.loads(content)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            name, variables = operation.group(1) if operation else "?", asked.get("variables") or {}
            self.server.requests.append((name, str(variables.get("name") or variables.get("run") or "")))
            if self.misbehave():
                return
            if name in self.server.answers:
                return self.reply(self.server.answers[name])
            with self.server.guard:
                answer = graphql(self.server, name, asked["query"], variables)
            self.reply(json.dumps(answer).encode())
            return
        found = re.fullmatch(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream", path)
        self.server.requests.append(("file_stream" if found else path, unquote(found.group(3)) if found else ""))
        if self.misbehave():
            return
        if found and "file_stream" in self.server.answers:
            return self.reply(self.server.answers["file_stream"])
        if found:
            with self.server.guard:
                stream(self.server.runs[unquote(found.group(3))], json.loads(content))
        self.reply(b"{}")

    def do_PUT(self):
        content = self.body()
        _, _, run, name = urlparse(self.path).path.split("/", 3)
        self.server.requests.append(("PUT", f"{run}/{unquote(name)}"))
        if not self.misbehave():
            with self.server.guard:
                self.server.runs[unquote(run)]["files"][unquote(name)] = content
            self.reply(b"")

    def do_GET(self):
        self.server.requests.append(("GET", self.path))
        if self.misbehave():
            return
        _, _, run, name = urlparse(self.path).path.split("/", 3)
        content = self.server.runs.get(unquote(run), {}).get("files", {}).get(unquote(name))
        self.reply(
            content if content is not None else b"{}", 200 if content is not None else 404, "application/octet-stream"
        )


def stream(run: dict, sent: dict) -> None:
    """One request of the file stream: rows at their offset, the summary, and whether the run has ended."""
    for name, part in (sent.get("files") or {}).items():
        if name == "wandb-history.jsonl":
            run["history"][part["offset"] :] = part["content"]
        elif name == "wandb-summary.json":
            run["summary"] = part["content"][-1]
    if sent.get("complete"):
        run["state"] = "finished" if not sent.get("exitcode") else "failed"


def new_run(name: str, project: str) -> dict:
    return {
        "name": name,
        "id": base64.b64encode(f"Run:v1:{name}:{project}".encode()).decode(),
        "project": project,
        "config": "{}",
        "summary": "{}",
        "history": [],
        "files": {},
        "state": "running",
        "group": None,
        "displayName": name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def described(server: Server, run: dict) -> dict:
    """A run as the public API's RunFragment asks for it."""
    return {
        "id": run["id"],
        "projectId": "1",
        "tags": [],
        "name": run["name"],
        "displayName": run["displayName"],
        "sweepName": None,
        "state": run["state"],
        "config": run["config"],
        "group": run["group"],
        "jobType": None,
        "commit": None,
        "readOnly": False,
        "createdAt": run["created"],
        "heartbeatAt": run["created"],
        "description": "",
        "notes": "",
        "systemMetrics": "{}",
        "summaryMetrics": run["summary"],
        "historyLineCount": len(run["history"]),
        "user": {"name": "U", "username": "u"},
        "historyKeys": {"lastStep": last_step(run)},
    }


def address(server: Server, run: dict, name: str) -> str:
    return f"{server.url}/files/{quote(run['name'], safe='')}/{quote(name, safe='')}"


def stored(server: Server, run: dict, name: str) -> dict:
    """A file as the public API's RunFilesFragment asks for it."""
    content, url = run["files"][name], address(server, run, name)
    return {
        "id": name,
        "name": name,
        "url": url,
        "directUrl": url,
        "sizeBytes": str(len(content)),
        "mimetype": "",
        "updatedAt": run["created"],
        "md5": base64.b64encode(hashlib.md5(content).digest()).decode(),
    }


def paged(edges: list[dict], after: str | None, size: int) -> tuple[list[dict], dict]:
    """One page of `edges` behind the cursor `after`, and its pageInfo."""
    start = next((i + 1 for i, edge in enumerate(edges) if edge["cursor"] == after), 0)
    page = edges[start : start + size]
    return page, {"endCursor": page[-1]["cursor"] if page else "", "hasNextPage": start + size < len(edges)}


def last_step(run: dict) -> int:
    return json.loads(run["history"][-1])["_step"] if run["history"] else -1


def graphql(server: Server, name: str, query: str, given: dict) -> dict:
    """The data of one operation."""
    run = server.runs.get(given.get("name") or given.get("run") or given.get("runName") or "")
    if name == "Viewer" or "viewer" in query:
        return {
            "data": {
                "viewer": {
                    "id": "V",
                    "entity": ENTITY,
                    "username": "u",
                    "email": "",
                    "flags": "{}",
                    "admin": False,
                    "teams": {"edges": [{"node": {"name": ENTITY}}]},
                }
            }
        }
    if name == "ServerFeaturesQuery":
        return {"data": {"serverInfo": {"features": [{"name": f, "isEnabled": True} for f in FEATURES]}}}
    if name == "UpsertBucket":
        return upsert(server, given)
    if name == "RunResumeStatus":
        bucket = run and {
            "id": run["id"],
            "name": run["name"],
            "summaryMetrics": run["summary"],
            "displayName": run["displayName"],
            "logLineCount": 0,
            "historyLineCount": len(run["history"]),
            "eventsLineCount": 0,
            "historyTail": json.dumps(run["history"][-1:]),
            "eventsTail": "[]",
            "config": run["config"],
            "tags": [],
            "notes": "",
            "wandbConfig": '{"t": 1}',
        }
        return {
            "data": {
                "model": {
                    "id": "P",
                    "name": given.get("project"),
                    "entity": {"id": "E", "name": ENTITY},
                    "bucket": bucket,
                }
            }
        }
    if name == "CreateRunFiles":
        files = [{"name": f, "uploadUrl": address(server, run, f)} for f in given["files"]]
        return {"data": {"createRunFiles": {"runID": run["id"], "uploadHeaders": [], "files": files}}}
    if name == "Run":
        return {"data": {"project": {"internalId": "1", "run": run and described(server, run)}}}
    if name == "RunFiles":
        wanted = given.get("fileNames") or list(run["files"])
        edges = [{"cursor": f, "node": stored(server, run, f)} for f in sorted(run["files"]) if f in wanted]
        files, page = paged(edges, given.get("fileCursor"), given.get("fileLimit") or 50)
        return {
            "data": {
                "project": {
                    "internalId": "1",
                    "run": {"fileCount": len(edges), "files": {"edges": files, "pageInfo": page}},
                }
            }
        }
    if name == "Runs":
        group = json.loads(given["filters"])["group"]
        mine = sorted((r for r in server.runs.values() if r["group"] == group), key=lambda r: (r["created"], r["name"]))
        edges = [{"cursor": r["name"], "node": described(server, r)} for r in mine]
        runs, page = paged(edges, given.get("cursor"), given.get("perPage") or 50)
        return {
            "data": {
                "project": {
                    "internalId": "1",
                    "runCount": len(edges),
                    "readOnly": False,
                    "runs": {"edges": runs, "pageInfo": page},
                }
            }
        }
    if name == "RunHistoryKeys":
        return {"data": {"project": {"run": {"historyKeys": {"lastStep": last_step(run), "sets": [], "keys": {}}}}}}
    if name == "HistoryPage":
        rows = [line for line in run["history"] if given["minStep"] <= json.loads(line)["_step"] < given["maxStep"]]
        return {"data": {"project": {"run": {"history": rows[: given["pageSize"]]}}}}
    if name == "RunParquetHistory":
        return {"data": {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": []}}}}}
    return {"data": None, "errors": [{"message": f"this server does not know {name}"}]}


def upsert(server: Server, given: dict) -> dict:
    by_id = {r["id"]: r for r in server.runs.values()}
    run = by_id.get(given.get("id")) or server.runs.get(given.get("name") or "")
    inserted = run is None
    if inserted:
        run = server.runs[given["name"]] = new_run(given["name"], given.get("project") or "uncategorized")
    for key, value in (
        ("config", given.get("config")),
        ("group", given.get("groupName")),
        ("state", given.get("state")),
        ("displayName", given.get("displayName")),
        ("summary", given.get("summaryMetrics")),
    ):
        if value:
            run[key] = value
    project = {"id": "P", "name": run["project"], "entity": {"id": "E", "name": ENTITY}}
    return {
        "data": {
            "upsertBucket": {
                "inserted": inserted,
                "bucket": {**described(server, run), "project": project, "historyLineCount": len(run["history"])},
            }
        }
    }


if __name__ == "__main__":  # to try things by hand: python -m tests.wandb_server 8090
    import sys

    with serve(int(sys.argv[1])) as listening:
        print(f"WANDB_BASE_URL={listening.url} WANDB_API_KEY={KEY}  entity {ENTITY}; Ctrl-C ends it", flush=True)
        threading.Event().wait()
