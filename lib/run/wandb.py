"""W&B as a mirror of the records, which are the source of truth: nothing of W&B can stop or slow a run.

    Mirrors                 the runner's side: one process per run folder, `python -m lib.run.wandb …`
    online RUN_FOLDER       that process follows the run's members while they train
    offline RUN_FOLDER      writes the client's files of a run that is over
    sync RUN_FOLDER…        brings W&B up to date with records (`./run_all.sh sync`)
    fetch, results          the way back: a study's records from W&B, each file checked by its SHA-256

A member is the W&B run `<run_id>--<member>-<8 digits of its key, place and attempt>` in the group `<run_id>`; the final
run, that of the run's chosen cell as in its metrics.json, carries the run_id (with `--laptop` behind it at laptop scale)
and names its members. Trials of a search are not mirrored. A W&B run states a digest of the record it
was sent, and is marked as finished after everything else has got through: that is how sending twice changes nothing,
and how what was cut off is completed.

Why not `wandb beta sync --live` (0.31.0) in place of our own sender: it uploads the client's files, which somebody has
to write from the histories all the same; it waits forever for a writer that was killed; it exits with 0 after an error
(`transactionlog: EOF`); and what W&B holds it knows from a marker file, not from W&B.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lib import config, record
from lib.errors import MissingError, StudyError
from lib.record import digest, read_json, read_jsonl, sha256
from lib.run.preflight import wandb_host, wandb_key

FROM = "from=wandb"  # in the name of a folder of records that came from W&B
PROJECT = "llm-finetuning-studies"
MIRRORED = (".json", ".jsonl", ".yaml")
NOT_MIRRORED = {"status.json", "progress.json", "error.json"}  # the runner's own, of one attempt
POLL = 1.0  # seconds between two looks at the histories
STALL_SECONDS = 600  # for sending one W&B run; for the client's files, which a slow disk may hold up
SYNC = "where its records are: ./run_all.sh sync"
# Nothing of this machine or its user goes with a run, and nothing is sent but what is asked for.
SETTINGS = {"x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True, "disable_git": True}
SETTINGS |= {"save_code": False, "disable_job_creation": True, "x_save_requirements": False, "silent": True}
SETTINGS |= {"host": "", "program": "", "console": "off", "x_file_stream_transmit_interval": 2.0}
# The client retries for many minutes otherwise; its own process may take long to start on a slow disk.
SETTINGS |= {"x_graphql_retry_max": 1, "x_graphql_retry_wait_min_seconds": 0.3, "x_graphql_retry_wait_max_seconds": 1}
SETTINGS |= {"x_graphql_timeout_seconds": 15, "init_timeout": 30, "x_service_wait": 300.0}
SETTINGS |= {"finish_timeout": STALL_SECONDS / 2, "finish_timeout_raises": True}
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read by the client as it is imported
os.environ.setdefault("WANDB_SILENT", "true")


# ---- what W&B is to hold, read from the record


class Entry(NamedTuple):
    """One W&B run. `init`: what `wandb.init` is called with; `config`: the settings, and as `record` what it states of
    the record that it was sent; `files`: {name on W&B: local path}, the name being the path below the study's results
    folder; `finished`: its record is final."""

    init: dict
    config: dict
    summary: dict
    history: Path
    files: dict[str, Path]
    finished: bool

    def rows(self) -> list[tuple]:
        """The rows of the history, as `row_of` gives them."""
        return [row_of({"global_step": row.pop("step"), **row}) for row in read_jsonl(self.history)]


def row_of(values: dict) -> tuple:
    """A row of a history as sorted (name, value) pairs, without W&B's own and what is no number or text."""
    kept = {name: value for name, value in values.items() if isinstance(value, int | float | str)}
    return tuple(sorted((name, value) for name, value in kept.items() if not name.startswith("_")))


def _place(run_folder: Path) -> str:
    """<scale>-<mode>[,variation]/<study>"""
    return f"{run_folder.parents[1].name}/{run_folder.parent.name}"


def _entry(member: Path, id: str, name: str, about: dict, summary: dict, files: Iterable, finished: bool) -> Entry:
    """The entry with the settings and the history of `member`; of `files`, what a reader needs to judge again."""
    spec, run_folder = read_json(member / "member.json"), member.parents[1]
    kept = [path for path in sorted(files) if path.suffix in MIRRORED and path.name not in NOT_MIRRORED]
    named = {str(path.relative_to(run_folder.parent)): path for path in kept}
    about |= {"version": 1, "place": _place(run_folder), "run_id": run_folder.name}
    about |= {key: spec[key] for key in ("study", "scale", "mode")}
    about["files"] = {file: sha256(path) for file, path in named.items()}
    about["digest"] = digest([spec["config"], summary, about])
    # that of the run's last notebook, which may be later than its members' training
    address = config.load_yaml(run_folder / "config.yaml").get("wandb") or {}
    init = {"id": id, "name": name, "group": run_folder.name, "entity": address.get("entity")}
    init["project"] = address.get("project") or PROJECT
    return Entry(init, {**spec["config"], "record": about}, summary, member / "history.jsonl", named, finished)


def member_entry(member: Path) -> Entry | None:
    """The W&B run of one member; None where its record has not begun."""
    spec, done, run_folder = read_json(member / "member.json"), read_json(member / "done.json", {}), member.parents[1]
    if not spec:
        return None
    key, name = spec["key"]["all"], f"{run_folder.name}--{member.name}"
    finished = done.get("status") in record.FINISHED and done["key"]["all"] == key
    attempt = len(list((run_folder / "attempts").glob(f"{member.name}.*")))
    about = {"member": member.name, "cell": spec["cell_name"], "seed": spec["seed"], "key": key, "attempt": attempt}
    summary, files = (read_json(member / "metrics.json", {}), member.glob("*.*")) if finished else ({}, ())
    id = f"{name[:119]}-{digest([key, _place(run_folder), attempt])[:8]}"  # W&B takes 128 characters
    return _entry(member, id, name, about, summary, files, finished)


def final_entry(run_folder: Path, members: dict[str, Entry]) -> Entry | None:
    """The run's own W&B run: the history of its chosen cell's first member, the means over seeds as its summary, and
    the ids of its finished `members`. None while there is no whole record, or its search is still to come."""
    metrics, searched = read_json(run_folder / "metrics.json", {}), read_json(run_folder / "sweep" / "metrics.json", {})
    if "chosen_cell" not in metrics or not (run_folder / "done.json").exists():
        return None
    summary, folder = metrics["metrics"], run_folder.parents[1].name
    chosen = next((name for name in members if name.rsplit("-s", 1)[0] == metrics["chosen_cell"]), None)
    settings = members[chosen].config if chosen in members else None
    if not settings or ((settings.get("optuna") or {}).get("n_trials") and not searched.get("trials")):
        return None
    scale, mode = settings["record"]["scale"], settings["record"]["mode"]
    id = run_folder.name[:110] + ("" if scale == "paper" else f"--{scale}")
    if folder != f"{scale}-{mode}":  # a variation must not take the study's own place
        id += f"-{digest(folder)[:8]}"
    ids = {name: entry.init["id"] for name, entry in members.items()}
    about = {"chosen": chosen, "members": ids, "source": digest([ids, chosen])}
    files = [*run_folder.glob("*.*"), *run_folder.glob("sweep/metrics.json"), *run_folder.glob("sweep/best.yaml")]
    return _entry(run_folder / "members" / chosen, id, run_folder.name, about, summary, files, finished=True)


def entries(run_folder: Path) -> list[Entry]:
    """The W&B runs of everything finished in `run_folder`: its members, then its final run."""
    every = {path.name: member_entry(path) for path in sorted(run_folder.glob("members/*/"))}
    members = {name: entry for name, entry in every.items() if entry and entry.finished}
    return [*members.values(), *filter(None, [final_entry(run_folder, members)])]


def is_over(run_folder: Path) -> bool:
    """Whether no notebook of this run is at work."""
    return all(read_json(p / "status.json", {}).get("status") != "running" for p in (run_folder, run_folder / "sweep"))


# ---- the runner's side


class Mirrors:
    """The senders that are under way, one process for each run folder; `close` waits for them a little and no longer."""

    def __init__(self):
        self.senders: dict[Path, subprocess.Popen] = {}
        self.stdin, life = os.pipe()  # every sender's input: it ends with `close`, and with this process
        self.life = os.fdopen(life, "wb")

    def follow(self, folder: Path, mode: str) -> None:
        """See that a sender is at work for this run, whose notebook begins or ends; one that W&B has stalled or crashed
        meanwhile is started anew. Offline there is nothing to do before its end."""
        alive = folder in self.senders and self.senders[folder].poll() is None
        if alive or not (mode == "online" or (mode == "offline" and is_over(folder))):
            return
        command = [sys.executable, "-P", "-m", "lib.run.wandb", mode, str(folder)]
        with contextlib.suppress(OSError), open(folder / "wandb.log", "a") as log:
            streams = {"stdin": self.stdin, "stdout": log, "stderr": log}
            self.senders[folder] = subprocess.Popen(command, start_new_session=True, **streams)

    def close(self, seconds: float) -> None:
        """Wait for what is left, at most `seconds` in all, and for what is written here until it is; then end it. The
        record is whole without it."""
        deadline = time.monotonic() + seconds
        self.life.close()
        for process in list(self.senders.values()):  # one may begin meanwhile
            local = seconds and "offline" in process.args
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STALL_SECONDS if local else max(0.0, deadline - time.monotonic()))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        if logs := [str(folder / "wandb.log") for folder, process in self.senders.items() if process.wait()]:
            fix = "the record is whole; to send the rest: ./run_all.sh sync"
            print(f"W&B mirror not complete, see {', '.join(logs)}; {fix}", file=sys.stderr)


# ---- what W&B holds


def client():
    import wandb

    wandb.setup(wandb.Settings(**SETTINGS))
    return wandb


def api():
    """A connection for reading. Raises MissingError where there is no key (the client would ask for one at the
    terminal), where W&B refuses it, or does not answer."""
    if not wandb_key():
        fix = ".venv/bin/wandb login (or set WANDB_API_KEY), then rerun the same command"
        raise MissingError("W&B", f"there is no key for {wandb_host()}", "a key", fix)
    try:
        connection = client().Api(timeout=15)
        connection.default_entity  # noqa: B018 (asks the server who we are)
        return connection
    except Exception as error:  # the client raises errors of half a dozen kinds, some of them plain ValueErrors
        what = f"no usable answer ({error!r:.200})"
        fix = "check the connection and WANDB_BASE_URL, then rerun the same command"
        raise MissingError("W&B", what, "a server that knows this key", fix) from None


def stated(run) -> dict:
    """The record that a W&B run was sent, as it states it; {} where there is no run."""
    return (run.config.get("record") or {}) if run else {}


def rows_of(run) -> set[tuple]:
    """What a W&B run's history holds; nothing where there is no run."""
    return {row_of(row) for row in run.scan_history(use_cache=False)} if run else set()


def diff(entry: Entry, run) -> list[str]:
    """In what the W&B run (None: there is none) differs from the record; [] where it holds it."""
    if run is None:
        return ["run"]
    sizes = {file.name: file.size for file in run.files()}
    recorded = stated(run).get("digest") == entry.config["record"]["digest"]
    same = {"state": run.state == "finished", "record": recorded, "history": rows_of(run).issuperset(entry.rows())}
    same["files"] = all(sizes.get(name) == path.stat().st_size for name, path in entry.files.items())
    return [name for name, equal in same.items() if not equal]


# ---- the sender


@contextlib.contextmanager
def alarm(seconds: int):
    """The system ends this process where the client keeps it waiting for longer: some of its calls never return. The
    client's core process watches for that and goes too."""
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


class Sender:
    """A connection to W&B (offline: to none), and the runs that are open on it."""

    @alarm(STALL_SECONDS)
    def __init__(self, mode: str):
        self.api, self.mode = api() if mode == "online" else None, {"mode": mode, "reinit": "create_new"}
        self.open: dict[str, tuple] = {}  # id -> (W&B run, the rows that it has)

    def find(self, entry: Entry):
        """The W&B run of this entry, read afresh; None where there is none."""
        self.api.flush()
        try:
            return self.api.run("/".join(entry.init[key] for key in ("entity", "project", "id") if entry.init[key]))
        except Exception as error:  # a CommError, as for everything else that may be wrong
            if "Could not find run" not in str(error):
                raise

    @alarm(STALL_SECONDS)
    def send(self, entry: Entry, complete: bool) -> list[str]:
        """Send what W&B does not have of this record; returns in what it differed. `complete`: with summary and files,
        as a finished run."""
        rows, differs = entry.rows(), ["the rest"]
        if entry.init["id"] not in self.open:
            there, source = self.find(entry) if self.api else None, entry.config["record"].get("source")
            if there and stated(there).get("source") != source:  # of other members, before --force, say: it stays
                entry.init["id"] += f"-{source[:8]}"
                there = self.find(entry)
            differs = diff(entry, there) if complete else ["history"] * bool(rows)
            if not differs:
                return []
            place, resume = str(entry.history.parents[2]), "allow" if self.api else None
            run = client().init(**entry.init, config=entry.config, dir=place, resume=resume, **self.mode)
            run.define_metric("*", step_metric="global_step")
            self.open[entry.init["id"]] = run, rows_of(there)
        run, sent = self.open[entry.init["id"]]
        for row in rows:
            if row not in sent:
                run.log(dict(row))  # without `step=`, because W&B drops a step that goes back
        sent.update(rows)
        if complete:
            run.config.update(entry.config, allow_val_change=True)
            run.summary.update({key: value for key, value in entry.summary.items() if value is not None})
            for name, path in entry.files.items():
                run.save(str(path), base_path=str(path).removesuffix(name), policy="now")
            run.finish()  # TimeoutError where something does not get through
            del self.open[entry.init["id"]]
            print(f"  {entry.init['name']}: sent {', '.join(differs)}", flush=True)
        return differs


def follow(folder: Path) -> None:
    """Send what is new while a notebook is at work, then the final run."""
    sender, seen, over = Sender("online"), {}, False
    while not over:
        # The runner closes this process's input at its end, and its death closes it too.
        is_gone, _, _ = select.select([sys.stdin], [], [], POLL)
        over = is_gone or is_over(folder)  # before the look: what was written until then is seen
        for member in sorted(folder.glob("members/*/")):
            files = [*member.glob("history.jsonl"), *member.glob("done.json")]
            stamp = [path.stat().st_mtime_ns for path in files]
            if seen.get(member) != stamp and (entry := member_entry(member)):
                sender.send(entry, entry.finished)
            seen[member] = stamp
    for entry in entries(folder):
        if "members" in entry.config["record"]:
            sender.send(entry, True)
    for run, _ in sender.open.values():  # unfinished members stay unfinished on W&B: the next attempt continues them
        run.finish(exit_code=1)


def write_offline(folder: Path) -> None:
    """Offline files of everything finished in the run, for `wandb leet` and `wandb sync`, in place of older ones."""
    shutil.rmtree(folder / "wandb", ignore_errors=True)
    sender = Sender("offline")
    for entry in entries(folder):
        sender.send(entry, True)


def send_all(folders: list[Path], **address: str) -> int:
    """Bring W&B up to date with these runs, until it holds everything. `address`: entity and project, "" for the runs'
    own. Exit code: 0 it does, 1 something is still missing there."""
    left = [entry for folder in folders for entry in entries(folder)]
    sender, looked, sent = Sender("online"), len(left), 0
    for entry in left:
        entry.init.update({key: value for key, value in address.items() if value})
    for seconds in range(4):  # what was sent is looked at again; its server may take a moment to show it
        time.sleep(seconds)
        left = [entry for entry in left if sender.send(entry, True)]
        sent = sent or len(left)
        if not left:
            break
    lacks = f"; W&B STILL LACKS {', '.join(entry.init['name'] for entry in left)}" if left else ""
    print(f"W&B: {looked} runs looked at, {sent} brought up to date{lacks}", flush=True)
    return 1 if left else 0


# ---- the way back


def fetch(into: Path, place: str, *, run_ids: Iterable[str], project: str, entity: str | None = None) -> Path:
    """The records of these runs from W&B in the folder `into`/<study>, as the runner leaves them; returns that folder.

    `place`: where they were made, `<scale>-<mode>[,<variation made with --set>]/<study>`. A file that is there already
    with the right checksum is kept. Raises StudyError where a run is not on W&B, or a file of it is missing or not the
    one that its run states; MissingError where W&B cannot be reached.
    """
    connection, results, planned = api(), into / place.split("/")[1], []
    path = f"{entity}/{project}" if entity else project
    for run_id in run_ids:
        group = connection.runs(path, filters={"group": run_id}, order="+created_at", lazy=False)
        mine = {run.id: run for run in group if stated(run).get("place") == place}
        final = next((run for run in reversed(mine.values()) if "members" in stated(run)), None)
        members = stated(final).get("members", {})
        if final is None or set(members.values()) - set(mine):
            what = f"no finished run {run_id} of {place} with all of its members"
            raise StudyError(f"W&B {path}", what, "the run and its members", SYNC)
        for run in [final, *(mine[id] for id in members.values())]:
            download(run, results)
        context = {key: stated(final)[key] for key in ("study", "scale", "mode")}
        planned.append(config.load_yaml(results / run_id / "config.yaml") | context)
    record.write_json(results / "comparison" / "runs.json", planned)
    return results


def download(run, results: Path) -> None:
    """The files of one W&B run, each checked against the SHA-256 in the run's configuration."""
    there = {file.name: file for file in run.files()}
    for name, checksum in stated(run).get("files", {}).items():
        target = (results / name).resolve()
        if not target.is_relative_to(results.resolve()):
            raise StudyError(f"W&B run {run.id}", f"a file named {name!r}", "a path inside the study's results")
        if target.exists() and sha256(target) == checksum:
            continue
        if name in there:
            there[name].download(root=str(results), replace=True)
        if name not in there or sha256(target) != checksum:
            target.unlink(missing_ok=True)
            what = f"{name} is {'not what its checksum says' if name in there else 'missing'}"
            raise StudyError(f"W&B run {run.id}", what, f"SHA-256 {checksum}", SYNC)


def results(study: str, scale: str, mode: str, results_dir: str | Path | None, source: dict | None = None) -> Path:
    """Where an analysis reads: its `results_dir` (default outputs/<scale>-<mode>/<study>), or, where `source` names
    them ({"project": ..., "run_ids": [...], "entity": ..., "place": ...}), the records of those runs from W&B."""
    own = Path(results_dir or config.default_results(study, scale, mode))
    if not source:
        return own
    into = own.parent if results_dir else config.outputs() / f"{scale}-{mode},{FROM}"
    return fetch(into, **{"place": f"{scale}-{mode}/{study}", **source})


def main(what: str, *arguments: str) -> int | None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once: nothing here needs to be put in order
    if what == "sync":
        entity, project, *folders = arguments
        return send_all([Path(folder) for folder in folders], entity=entity, project=project)
    {"online": follow, "offline": write_offline}[what](Path(arguments[0]))


if __name__ == "__main__":
    try:
        code = main(*sys.argv[1:]) or 0
    except Exception as error:
        print(record.redact(f"{type(error).__name__}: {error}"), file=sys.stderr, flush=True)
        code = getattr(error, "exit_code", 1)
    os._exit(code)  # the client's own exit hook may wait forever for runs that are still open
