"""W&B as a mirror of the records, which are the source of truth: nothing of W&B can stop or slow a run.

    Mirrors                 one sender per run, a process of its own, started and ended by the runner
    python -m lib.run.wandb online|offline RUN_FOLDER   that process: follows a running notebook
    python -m lib.run.wandb sync RUN_FOLDER…            W&B brought up to date with records (`./run_all.sh sync`)
    fetch, results          the way back: a study's records from W&B, each file checked by its SHA-256

A member is the W&B run `<run_id>--<member>-<8 digits of its key, place and attempt>` in the group `<run_id>`; the final
run, that of the cell chosen on validation, carries the run_id (with `--laptop` behind it at laptop scale) and names its
members. Trials of a search are not mirrored, only the final run of the best. Both senders compare what W&B holds with the
record and send what differs, so sending twice changes nothing, and what was cut off half-way is completed.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from lib import config, record
from lib.errors import MissingError, StudyError
from lib.record import digest, read_json, read_jsonl
from lib.run.preflight import wandb_host, wandb_key

FROM = "from=wandb"  # in the name of a folder of records that came from W&B
PROJECT = "llm-finetuning-studies"
MIRRORED = (".json", ".jsonl", ".yaml")
NOT_MIRRORED = {"status.json", "progress.json", "queued.json", "error.json"}  # the runner's own, of one attempt
STALLED, UNREACHED = 75, 76  # exit codes of a sender: W&B kept it waiting; it wrote offline files for want of W&B
TRIES = 3  # of sending live, before the run's offline files are written instead
LOCAL_SECONDS = 300  # for files that are written here, which the network does not hold up but a slow disk does
REQUEST_SECONDS, SERVICE_SECONDS = 15, 300.0  # for one request; for the client's own process to start on a slow disk
POLL, REPROBE = 1.0, 20  # seconds between two looks at the histories; between two attempts to reach W&B
LIVE_SECONDS, SYNC_SECONDS = 8, 600  # for one run's data to get through, during a study and afterwards
SYNC = "./run_all.sh sync where its records are"
# Read by the client as it is imported. Only what is asked for leaves this machine: no telemetry of the client
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
os.environ.setdefault("WANDB_SILENT", "true")


# ---- what W&B is sent, read from the record


@dataclass
class Entry:
    """One W&B run to be. `files`: {name on W&B: local path}, the name being the path below the study's results folder;
    `finished`: its history, summary and files are final."""

    id: str
    name: str
    settings: dict
    history: Path
    record: dict
    summary: dict = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    finished: bool = True

    def __post_init__(self):
        self.record["files"] = {name: sha256(path) for name, path in self.files.items()}
        last = (
            self.history.parents[2] / "config.yaml"
        )  # the run's last notebook may be later than its members' training
        address = yaml.safe_load(last.read_text(encoding="utf-8")).get("wandb") or {}
        self.entity, self.mode = address.get("entity"), address.get("mode")
        self.project = address.get("project") or PROJECT

    @property
    def config(self) -> dict:
        """The run's settings without what is null or empty, because W&B drops empty sections."""
        return drop_empty({**self.settings, "record": self.record})

    def rows(self) -> dict[int, dict]:
        """{step: row} of the history, training and evaluation rows of one step merged, the step as `global_step`."""
        steps: dict[int, dict] = {}
        for row in read_jsonl(self.history):
            merged = steps.setdefault(row["step"], {"global_step": row["step"]})
            merged.update({k: v for k, v in row.items() if k != "step" and isinstance(v, int | float | str)})
        return dict(sorted(steps.items()))


def drop_empty(value):
    """`value` without the keys, at any depth, that hold null or an empty section."""
    if isinstance(value, list):
        return [drop_empty(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    kept = {key: drop_empty(inner) for key, inner in value.items()}
    return {key: inner for key, inner in kept.items() if inner is not None and inner != {}}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _id(text: str, suffix: str = "") -> str:
    """A W&B run id: at most 128 characters, none of those that W&B refuses."""
    clean = re.sub(r"[^\w.+=-]", "_", text)
    return f"{clean[:119]}-{suffix}" if suffix else clean[:128]


def _about(run_folder: Path, spec: dict) -> dict:
    place = f"{run_folder.parents[1].name}/{run_folder.parent.name}"  # <scale>-<mode>[,variation]/<study>
    return {"version": 1, "place": place, "run_id": run_folder.name, **{k: spec[k] for k in ("study", "scale", "mode")}}


def _files(results: Path, folder: Path) -> dict[str, Path]:
    """The record's files in `folder`, by their names on W&B: what a reader needs to judge the study again."""
    kept = [p for p in sorted(folder.glob("*.*")) if p.suffix in MIRRORED and p.name not in NOT_MIRRORED]
    return {str(path.relative_to(results)): path for path in kept}


def member_entry(run_folder: Path, member: Path) -> Entry | None:
    """The W&B run of one member; None where its record has not begun."""
    spec, done = read_json(member / "member.json"), read_json(member / "done.json", {})
    if not spec:
        return None
    key, name = spec["key"]["all"], f"{run_folder.name}--{member.name}"
    finished = done.get("status") in record.FINISHED and done["key"]["all"] == key
    attempt, about = len(list((run_folder / "attempts").glob(f"{member.name}.*"))), _about(run_folder, spec)
    mine = {"member": member.name, "cell": spec["cell_name"], "seed": spec["seed"], "key": key, "attempt": attempt}
    return Entry(
        id=_id(name, digest([key, about["place"], attempt])[:8]),
        name=name,
        settings=spec["config"],
        history=member / "history.jsonl",
        record=about | mine,
        summary=read_json(member / "metrics.json", {}) if finished else {},
        files=_files(run_folder.parent, member) if finished else {},
        finished=finished,
    )


def final_entry(run_folder: Path) -> Entry | None:
    """The run's own W&B run: the history of its chosen cell's first member, the means over seeds as its summary, and
    the ids of all its members. With a search, of the best. None while there is no whole record."""
    metrics, sweep = read_json(run_folder / "metrics.json", {}), run_folder / "sweep"
    if "chosen_cell" not in metrics or not (run_folder / "done.json").exists():
        return None
    members = {m.name: m for m in sorted((run_folder / "members").glob("*/")) if (m / "done.json").exists()}
    chosen = next((m for name, m in members.items() if name.rsplit("-s", 1)[0] == metrics["chosen_cell"]), None)
    summary, searched = metrics["metrics"], read_json(sweep / "metrics.json", {})
    if searched.get("final"):
        chosen = members.get(searched["final_members"][0])
        summary = {k: v for k, v in searched["final"].items() if k != "cell"}
    spec = read_json(chosen / "member.json") if chosen else None
    if not spec or ((spec["config"].get("optuna") or {}).get("n_trials") and not searched.get("final")):
        return None  # its search is still to come
    ids = {name: e.id for name, m in members.items() if (e := member_entry(run_folder, m)) and e.finished}
    about, source, folder = _about(run_folder, spec), digest([ids, chosen.name]), run_folder.parents[1].name
    own = run_folder.name + ("" if about["scale"] == "paper" else f"--{about['scale']}")
    if folder != f"{about['scale']}-{about['mode']}":  # a variation must not take the study's own place
        own = _id(own, digest(folder)[:8])
    searches = {n: p for n, p in _files(run_folder.parent, sweep).items() if p.name in ("metrics.json", "best.yaml")}
    return Entry(
        id=_id(own),
        name=run_folder.name,
        settings=spec["config"],
        history=chosen / "history.jsonl",
        record=about | {"member": None, "chosen": chosen.name, "members": ids, "source": source},
        summary=summary,
        files=_files(run_folder.parent, run_folder) | searches,
    )


def entries(run_folder: Path) -> list[Entry]:
    """The W&B runs of everything finished in `run_folder`: its members, then its final run."""
    members = [member_entry(run_folder, member) for member in sorted((run_folder / "members").glob("*/"))]
    return [entry for entry in [*members, final_entry(run_folder)] if entry and entry.finished]


def is_over(run_folder: Path) -> bool:
    """Whether no notebook of this run is at work."""
    return all(read_json(p / "status.json", {}).get("status") != "running" for p in (run_folder, run_folder / "sweep"))


# ---- the runner's side


class Mirrors:
    """The senders that are under way, one process each; `close` waits for them a little and no longer."""

    def __init__(self):
        self.threads: dict[Path, threading.Thread] = {}
        self.processes: dict[Path, subprocess.Popen] = {}
        self.failed: set[Path] = set()
        self.unsent: set[Path] = set()  # in offline files only, though W&B was wanted
        self.local: set[Path] = set()  # whose sender writes files here and asks nothing of the network
        self.ending = self.killed = False

    def begin(self, folder: Path, mode: str) -> None:
        """A notebook of this run starts: online, its members are followed while they train."""
        if mode == "online":
            self.end(folder, mode)

    def end(self, folder: Path, mode: str) -> None:
        """It has ended: a follower sees that for itself; offline, the files are written now."""
        folder = folder.parent if folder.name == "sweep" else folder
        if mode != "disabled" and not (folder in self.threads and self.threads[folder].is_alive()):
            self.threads[folder] = threading.Thread(target=self._keep, args=(folder, mode), daemon=True)
            self.threads[folder].start()

    def _keep(self, folder: Path, wanted: str) -> None:
        """Keep a sender at work for this run. One that W&B stalls or crashes is started again; at last, offline."""
        modes = [wanted] * TRIES if wanted == "online" else []
        while True:
            mode = modes.pop() if modes else "offline"
            code = self._send(folder, mode)
            if code in (0, UNREACHED) or self.killed:
                (self.unsent.add if mode != wanted or code else self.unsent.discard)(folder)
                return
            if mode == "offline":
                self.failed.add(folder)
                return
            if is_over(folder):
                modes.clear()

    def _send(self, folder: Path, mode: str) -> int | None:
        (self.local.add if mode == "offline" else self.local.discard)(folder)
        with contextlib.suppress(OSError), open(folder / "wandb.log", "a") as log:
            command = [sys.executable, "-P", "-m", "lib.run.wandb", mode, str(folder)]
            stdin = subprocess.DEVNULL if self.ending else subprocess.PIPE  # its end says that nothing more comes
            process = subprocess.Popen(command, stdin=stdin, stdout=log, stderr=log, start_new_session=True)
            self.processes[folder] = process
            code = process.wait()
            if process.stdin:
                process.stdin.close()
            return code

    def close(self, seconds: float) -> None:
        """Wait for what is left, at most `seconds` in all, and for what is written here until it is; then end it. The
        record is whole without it."""
        deadline, self.ending = time.monotonic() + seconds, True
        for process in list(self.processes.values()):  # one may be starting
            if process.stdin:
                process.stdin.close()
        for folder, thread in self.threads.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            if seconds and folder in self.local:
                thread.join(LOCAL_SECONDS)
        self.killed = True
        late = {folder for folder, process in list(self.processes.items()) if process.poll() is None}
        for folder in late:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.processes[folder].pid, signal.SIGKILL)
        problems = {"not finished in time": late, "failed": self.failed, "in offline files only": self.unsent}
        for problem, folders in problems.items():
            if folders:
                logs = ", ".join(str(folder / "wandb.log") for folder in sorted(folders))
                fix = "the record is whole, and ./run_all.sh sync brings W&B up to date"
                print(f"W&B mirror {problem}, see {logs}; {fix}", file=sys.stderr)


# ---- what W&B holds


def api(seconds: int = REQUEST_SECONDS):
    """A connection for reading. Raises MissingError where there is no key (the client would ask for one at the
    terminal), where W&B refuses it, or does not answer."""
    if not wandb_key(os.environ):
        fix = ".venv/bin/wandb login (or set WANDB_API_KEY), then the same command again"
        raise MissingError("W&B", f"there is no key for {wandb_host(os.environ)}", "a key", fix)
    import wandb

    waits = {"x_graphql_retry_wait_min_seconds": 0.3, "x_graphql_retry_wait_max_seconds": 1}
    waits |= {"x_graphql_timeout_seconds": seconds, "x_service_wait": SERVICE_SECONDS}
    try:
        wandb.setup(wandb.Settings(silent=True, x_graphql_retry_max=1, **waits))
        connection = wandb.Api(timeout=seconds)
        connection.default_entity  # noqa: B018 (asks the server who we are)
        return connection
    except Exception as error:  # the client raises errors of half a dozen kinds, some of them plain ValueErrors
        answer, fix = (
            f"no usable answer ({first_line(error)})",
            "check the connection and WANDB_BASE_URL, then sync again",
        )
        raise MissingError("W&B", answer, "a server that knows this key", fix) from None


def first_line(error: BaseException) -> str:
    return record.redact(f"{type(error).__name__}: {error}").strip().splitlines()[0][:200]


def find(connection, entity: str | None, project: str, name: str):
    """The W&B run of that id, read afresh; None where there is none."""
    connection.flush()
    try:
        return connection.run("/".join(filter(None, (entity or connection.default_entity, project, name))))
    except Exception as error:
        if "could not find" in str(error).lower() or "not found" in str(error).lower():
            return None
        raise


def rows_of(found) -> dict[int, dict]:
    """{step: row} of a W&B run's history: of rows with one global_step, the last; W&B's own keys left out."""
    rows = [row for row in found.scan_history(use_cache=False) if row.get("global_step") is not None]
    steps = {row["global_step"]: {k: v for k, v in row.items() if not k.startswith("_")} for row in rows}
    return dict(sorted(steps.items()))


def lacking(entry: Entry, found) -> list[str]:
    """In what the W&B run `found` differs from the record; [] where they are equal."""
    if found is None:
        return ["run"]
    stored = {file.name: file.md5 for file in found.files()}
    same = {
        "state": found.state == "finished",
        "config": all(drop_empty(found.config.get(k)) == v for k, v in entry.config.items()),
        "summary": all(found.summary.get(k) == v for k, v in entry.summary.items() if v is not None),
        "history": rows_of(found) == entry.rows(),
    }
    for name, path in entry.files.items():
        md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).digest()
        same[name] = stored.get(name) == base64.b64encode(md5).decode()
    return [name for name, equal in same.items() if not equal]


# ---- the sender


_beat = time.monotonic()


def beat() -> None:
    global _beat
    _beat = time.monotonic()


def watchdog(limit: float) -> None:
    """End this process when one call of the client takes longer than `limit` seconds: some of them wait for ever. Its
    core process watches for that and goes too."""

    def look() -> None:
        while time.monotonic() - _beat < limit:
            time.sleep(0.5)
        print(f"W&B kept one call waiting for more than {limit:g} s", flush=True)
        os._exit(STALLED)

    threading.Thread(target=look, daemon=True).start()


def begin(entry: Entry, name: str, mode: str, folder: Path, seconds: float):
    """A W&B run to log to, resumed where it is there already. Nothing of this machine or its user goes with it."""
    import wandb

    off = {"x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True, "disable_git": True}
    off |= {"save_code": False, "disable_job_creation": True, "x_save_requirements": False}
    off |= {"host": "", "program": "", "console": "off", "silent": True}
    waits = {"init_timeout": min(seconds, 30), "finish_timeout": seconds, "finish_timeout_raises": True}
    waits |= {"x_file_stream_transmit_interval": 2.0, "x_graphql_retry_max": 2, "x_service_wait": SERVICE_SECONDS}
    run = wandb.init(
        project=entry.project,
        entity=entry.entity,
        id=name,
        name=entry.name,
        group=entry.record["run_id"],
        mode=mode,
        dir=str(folder),
        resume="allow" if mode == "online" else None,
        reinit="create_new",
        config=entry.config,
        settings=wandb.Settings(**off, **waits),
    )
    run.define_metric("*", step_metric="global_step")
    beat()
    return run


def log(run, rows: dict[int, dict], sent: dict[int, dict]) -> None:
    """Log the rows that W&B does not have as they are; no `step=`, because W&B drops a step that goes back."""
    for row in (row for step, row in rows.items() if sent.get(step) != row):
        run.log(row)
    sent |= rows
    beat()


def finish(run, entry: Entry) -> None:
    """The final configuration, summary and files, and the end of the run. TimeoutError where they do not get through."""
    run.config.update(entry.config, allow_val_change=True)
    run.summary.update({k: v for k, v in entry.summary.items() if v is not None})
    for name, path in entry.files.items():
        run.save(str(path), base_path=str(path).removesuffix(name), policy="now")
    run.finish()
    beat()


class Sender:
    """A connection to W&B and the runs that are open on it."""

    def __init__(self, folder: Path, seconds: float):
        self.folder, self.seconds, self.api = folder, seconds, api(min(seconds, REQUEST_SECONDS))
        self.open: dict[str, tuple] = {}  # entry id -> (W&B run, {step: row} that W&B has)

    def remote(self, entry: Entry) -> tuple[str, object]:
        """(id to use, the run there or None). A final run of other members (before --force, say) stays as it is."""
        found, source = find(self.api, entry.entity, entry.project, entry.id), entry.record.get("source")
        if found is not None and source and (found.config.get("record") or {}).get("source") != source:
            other = _id(entry.id, source[:8])
            return other, find(self.api, entry.entity, entry.project, other)
        return entry.id, found

    def send(self, entry: Entry, rows: dict[int, dict]) -> None:
        if entry.id not in self.open:
            name, found = self.remote(entry)
            run = begin(entry, name, "online", self.folder, self.seconds)
            self.open[entry.id] = (run, rows_of(found) if found else {})
        log(self.open[entry.id][0], rows, self.open[entry.id][1])

    def follow(self, entry: Entry) -> None:
        """Log what is new in an unfinished member's history, all but its newest step (its evaluation may still come)."""
        rows = entry.rows()
        if len(rows) >= 2 or entry.id in self.open:
            self.send(entry, dict(list(rows.items())[:-1]))

    def complete(self, entry: Entry) -> str:
        """Bring W&B up to date with a finished record; says what had to be sent, "" where nothing had."""
        differing = ["live"]
        if entry.id not in self.open:
            differing = lacking(entry, self.remote(entry)[1])
            beat()
        if differing:
            self.send(entry, entry.rows())
            finish(self.open.pop(entry.id)[0], entry)
        return ", ".join(differing)


def live(folder: Path, gone: threading.Event) -> int:
    """Follow a run while its notebook is at work, then complete it. Waits for W&B as long as there is time; where the
    run is over and W&B was not to be reached, its offline files are written. Returns the exit code."""
    sender, asked, finished, stamps, last = None, None, set(), {}, False
    while not last:
        last = is_over(folder) or gone.is_set()  # before the look: what was written until then is seen
        beat()
        if sender is None and (asked is None or (not last and time.monotonic() - asked > REPROBE)):
            asked = time.monotonic()
            try:
                sender = Sender(folder, LIVE_SECONDS)
                print("W&B answers", flush=True)
            except MissingError as error:
                print(error, flush=True)
        for member in sorted((folder / "members").glob("*/")) if sender else ():
            stamp = [p.stat().st_mtime_ns for n in ("history.jsonl", "done.json") if (p := member / n).exists()]
            entry = member_entry(folder, member) if last or stamps.get(member) != stamp else None
            stamps[member] = stamp
            if entry and entry.finished and entry.id not in finished:
                sender.complete(entry)
                finished.add(entry.id)
            elif entry and not entry.finished:
                sender.follow(entry)
        if not last:
            gone.wait(POLL)
    if sender is None:
        offline(folder)
        return UNREACHED
    if final := final_entry(folder):
        sender.complete(final)
    for run, _ in sender.open.values():  # unfinished members stay unfinished on W&B: the next attempt continues them
        run.finish(exit_code=1)
    print(f"{len(finished)} finished members are on W&B", flush=True)
    return 0


def offline(folder: Path) -> None:
    """Offline files of everything finished in the run, for `wandb leet` and `wandb sync`, in place of older ones."""
    shutil.rmtree(folder / "wandb", ignore_errors=True)
    wanted = entries(folder)
    for entry in wanted:
        run = begin(entry, entry.id, "offline", folder, SYNC_SECONDS)
        log(run, entry.rows(), {})
        finish(run, entry)
    print(f"{len(wanted)} W&B runs in offline files", flush=True)


def send_all(folders: list[Path], entity: str | None = None, project: str | None = None) -> int:
    """Bring W&B up to date with these runs. Exit code: 0 it is, 1 something is still missing there."""
    sent, count, incomplete = 0, 0, 0
    for folder in folders:
        wanted = entries(folder)
        if wanted and wanted[0].mode == "disabled":
            print(f"{folder.name}: its YAML says wandb.mode: disabled; left out", flush=True)
            continue
        sender = Sender(folder, SYNC_SECONDS)
        for entry in wanted:
            entry.entity, entry.project, count = entity or entry.entity, project or entry.project, count + 1
            if differing := sender.complete(entry):
                sent += 1
                for wait in range(3):  # its server may take a moment to show what it was given
                    time.sleep(wait)
                    beat()
                    if not (left := lacking(entry, sender.remote(entry)[1])):
                        break
                incomplete += bool(left)
                lacks = f"; W&B STILL LACKS {', '.join(left)}" if left else ""
                print(f"  {entry.name}: sent {differing}{lacks}", flush=True)
    print(f"W&B: {count} runs looked at, {sent} brought up to date, {count - sent} were", flush=True)
    return 1 if incomplete else 0


# ---- the way back


def fetch(into: Path, place: str, *, run_ids: Iterable[str], project: str, entity: str | None = None) -> Path:
    """The records of these runs from W&B in the folder `into`/<study>, as the runner leaves them; returns that folder.

    `place`: where they were made, `<scale>-<mode>[,<variation made with --set>]/<study>`. A file that is there already
    with the right checksum is kept. Raises StudyError where a run is not on W&B, or a file of it
    is missing or not the one that its run states; MissingError where W&B cannot be reached.
    """
    folder, study = place.split("/")
    scale, mode = folder.split(",")[0].split("-")
    connection, results, planned = api(), into / study, []
    path = "/".join(filter(None, (entity or connection.default_entity, project)))
    for run_id in run_ids:
        group = connection.runs(path, filters={"group": run_id}, order="+created_at", lazy=False)
        mine = {run.id: run for run in group if (run.config.get("record") or {}).get("place") == place}
        final = next((run for run in reversed(mine.values()) if run.config["record"].get("member") is None), None)
        if final is None:
            raise StudyError(f"W&B {path}", f"no finished run {run_id} of {place}", "the run and its members", SYNC)
        members = final.config["record"]["members"]
        if absent := ", ".join(member for member, name in members.items() if name not in mine):
            raise StudyError(f"W&B {path}", f"{run_id} without {absent}", "every member of the run", SYNC)
        for run in [final, *(mine[name] for name in members.values())]:
            download(run, results)
        settings = config.load_yaml(results / run_id / "config.yaml")
        planned.append({**settings, "study": study, "scale": scale, "mode": mode})
    record.write_json(results / "comparison" / "runs.json", planned)
    return results


def download(run, results: Path) -> None:
    """The files of one W&B run, each checked against the SHA-256 in the run's configuration."""
    there = {file.name: file for file in run.files()}
    for name, checksum in run.config["record"].get("files", {}).items():
        target = (results / name).resolve()
        if not target.is_relative_to(results.resolve()):
            raise StudyError(f"W&B run {run.id}", f"a file named {name!r}", "a path inside the study's results")
        if target.exists() and sha256(target) == checksum:
            continue
        if name not in there:
            raise StudyError(f"W&B run {run.id}", f"{name} is missing", f"SHA-256 {checksum}", SYNC)
        there[name].download(root=str(results), replace=True)
        if sha256(target) != checksum:
            target.unlink()
            raise StudyError(f"W&B run {run.id}", f"{name} is not what its checksum says", f"SHA-256 {checksum}", SYNC)


def results(study: str, scale: str, mode: str, results_dir: str | Path | None, source: dict | None = None) -> Path:
    """Where an analysis reads: its `results_dir` (default outputs/<scale>-<mode>/<study>), or, where `source` names
    them ({"project": ..., "run_ids": [...], "entity": ..., "place": ...}), the records of those runs from W&B."""
    own = Path(results_dir or config.ROOT / "outputs" / f"{scale}-{mode}" / study)
    if not source:
        return own
    into = own.parent if results_dir else config.ROOT / "outputs" / f"{scale}-{mode},{FROM}"
    return fetch(into, **{"place": f"{scale}-{mode}/{study}", **source})


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.run.wandb")
    parser.add_argument("what", choices=("online", "offline", "sync"))
    parser.add_argument("--entity")
    parser.add_argument("--project")
    parser.add_argument("folders", nargs="+", type=Path)
    options = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once: nothing here needs to be put in order
    if options.what == "sync":
        watchdog(SYNC_SECONDS + 60)
        return send_all(options.folders, options.entity, options.project)
    folder, gone = options.folders[0], threading.Event()
    # The runner closes this process's input at its end, and its death closes it too.
    threading.Thread(target=lambda: (sys.stdin.read(), gone.set()), daemon=True).start()
    import wandb  # noqa: F401 (as long as the disk takes; the watchdog is for calls to W&B)

    beat()
    watchdog(4 * LIVE_SECONDS)
    if options.what == "online":
        return live(folder, gone)
    while not is_over(folder) and not gone.wait(POLL):
        beat()
    offline(folder)
    return 0


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except MissingError as error:
        print(record.redact(str(error)), file=sys.stderr)
        code = error.exit_code
    except Exception as error:
        print(first_line(error), file=sys.stderr, flush=True)
        code = 1
    sys.stdout.flush()
    os._exit(code)  # the client's own exit hook may wait for ever for runs that are still open
