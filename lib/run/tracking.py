"""What of a run goes to W&B, and the processes beside the runs that send it.

The files of the record are the source of truth; W&B is a mirror of them, so nothing of W&B can stop or slow a run:

    lib/mirror/tracking.py     what a run's W&B runs are (entries), read from its record; the senders' start and end
    (Mirrors) lib/mirror/wandb_sync.py   the sender, a process of its own: live beside a running notebook, or later
    (`./run_all.sh sync`) lib/mirror/wandb_read.py   the way back: a study's records from W&B, checked, for the analysis

A member is the W&B run `<run_id>--<member>-<8 digits of its key, place and attempt>` in the group `<run_id>`; the final
run, that of the cell chosen on validation, carries the run_id (with `--laptop` behind it at laptop scale) and names its
members. Trials of a search are not mirrored, only the final run of the best.
"""

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from lib import record
from lib.run import keys

FROM = "from=wandb"  # in the name of a folder of records that came from W&B
PROJECT = "llm-finetuning-studies"
NOT_MIRRORED = {"status.json", "progress.json", "queued.json", "error.json"}  # the runner's own, of one attempt
STALLED, UNREACHED = 75, 76  # exit codes of a sender: W&B kept it waiting; it wrote offline files for want of W&B
TRIES = 3  # of sending live, before the run's offline files are written instead
LOCAL_SECONDS = 300  # for files that are written here, which the network does not hold up but a slow disk does


@dataclass
class Entry:
    """One W&B run to be: everything about it, from the record. `files`: {name on W&B: local path}, the name being the
    path below the study's results folder; `finished`: its history, summary and files are final."""

    id: str
    name: str
    group: str
    config: dict
    history: Path
    summary: dict
    files: dict[str, Path]
    finished: bool
    entity: str | None = None
    project: str = PROJECT
    mode: str | None = None
    spare: str = ""  # the id to take where `id` is another attempt's on W&B
    record: dict = field(default_factory=dict)

    @property
    def whole_config(self) -> dict:
        """What W&B is told of the run's settings; what is null or empty left out, because W&B drops empty sections."""
        return stated({**self.config, "record": self.record})


def stated(value):
    """`value` without the keys, at any depth, that hold null or an empty section."""
    if isinstance(value, list):
        return [stated(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    kept = {key: stated(inner) for key, inner in value.items()}
    return {key: inner for key, inner in kept.items() if inner is not None and inner != {}}


def scalars(row: dict) -> dict:
    """What W&B draws: numbers, strings and truth values; the files hold the rest."""
    return {k: v for k, v in row.items() if isinstance(v, int | float | str)}


def by_step(rows: list[dict]) -> dict[int, dict]:
    """{step: row} of a member's history, training and evaluation rows of one step merged, the step as `global_step`."""
    steps: dict[int, dict] = {}
    for row in rows:
        merged = steps.setdefault(row["step"], {"global_step": row["step"]})
        merged.update(scalars({k: v for k, v in row.items() if k != "step"}))
    return dict(sorted(steps.items()))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _id(text: str, digest: str = "") -> str:
    """A W&B run id: at most 128 characters, none of those that W&B refuses."""
    clean = re.sub(r"[^\w.+=-]", "_", text)
    return f"{clean[:119]}-{digest}" if digest else clean[:128]


def place_of(run_folder: Path) -> str:
    """Which results these are: `<scale>-<mode>[,variation]/<study>`."""
    return f"{run_folder.parent.parent.name}/{run_folder.parent.name}"


def member_entry(run_folder: Path, member: Path) -> Entry | None:
    """The W&B run of one member; None where its record has not begun."""
    spec = record.read_json(member / "member.json")
    if not spec:
        return None
    done = record.read_json(member / "done.json", {})
    finished = done.get("status") in record.FINISHED and done["key"]["all"] == spec["key"]["all"]
    attempt = sum(1 for _ in (run_folder / "attempts").glob(f"{member.name}.*"))
    digest = keys.digest([spec["key"]["all"], place_of(run_folder), attempt])[:8]
    files = _files(run_folder.parent, member) if finished else {}
    name = f"{run_folder.name}--{member.name}"
    return Entry(
        id=_id(name, digest),
        name=name,
        group=run_folder.name,
        config=spec["config"],
        history=member / "history.jsonl",
        summary=record.read_json(member / "metrics.json", {}) if finished else {},
        files=files,
        finished=finished,
        **_address(run_folder, spec),
        record={
            **_about(run_folder, spec),
            "member": member.name,
            "cell": spec["cell_name"],
            "seed": spec["seed"],
            "key": spec["key"]["all"],
            "attempt": attempt,
            "files": {n: sha256(p) for n, p in files.items()},
        },
    )


def final_entry(run_folder: Path) -> Entry | None:
    """The run's own W&B run: the history of its chosen cell's first member, the means over seeds as its summary, and
    the ids of all its members. With a search, of the best. None while there is no whole record."""
    made = record.read_json(run_folder / "metrics.json")
    members = {m.name: m for m in sorted((run_folder / "members").glob("*/")) if (m / "done.json").exists()}
    if not made or not members or "chosen_cell" not in made or not (run_folder / "done.json").exists():
        return None
    chosen = next((m for m in members.values() if m.name.rsplit("-s", 1)[0] == made["chosen_cell"]), None)
    summary, searched = made["metrics"], record.read_json(run_folder / "sweep" / "metrics.json", {})
    if searched.get("final"):
        chosen = members.get(searched["final_members"][0])
        summary = {k: v for k, v in searched["final"].items() if k != "cell"}
    spec = record.read_json(chosen / "member.json") if chosen else None
    if not spec or ((spec["config"].get("optuna") or {}).get("n_trials") and not searched.get("final")):
        return None  # its search is still to come
    ids = {name: e.id for name, m in members.items() if (e := member_entry(run_folder, m)) and e.finished}
    results = run_folder.parent
    files = _files(results, run_folder) | _files(results, run_folder / "sweep", ("metrics.json", "best.yaml"))
    # Other members (after --force, say) make another run on W&B: what was published under the first id stays as it is.
    about, source = _about(run_folder, spec), keys.digest([ids, chosen.name])
    scale, folder = about["scale"], run_folder.parent.parent.name
    own = run_folder.name + ("" if scale == "paper" else f"--{scale}")
    if folder != f"{scale}-{about['mode']}":  # a variation must not take the study's own place
        own = _id(own, keys.digest(folder)[:8])
    return Entry(
        id=_id(own),
        spare=_id(own, source[:8]),
        name=run_folder.name,
        group=run_folder.name,
        config=spec["config"],
        history=chosen / "history.jsonl",
        summary=summary,
        files=files,
        finished=True,
        **_address(run_folder, spec),
        record={
            **about,
            "member": None,
            "chosen": chosen.name,
            "members": ids,
            "source": source,
            "files": {n: sha256(p) for n, p in files.items()},
        },
    )


def _about(run_folder: Path, spec: dict) -> dict:
    return {
        "version": 1,
        "place": place_of(run_folder),
        "run_id": run_folder.name,
        **{k: spec[k] for k in ("study", "scale", "mode")},
    }


def _address(run_folder: Path, spec: dict) -> dict:
    """Where on W&B: as the run's last notebook was told, which may be later than its members' training."""
    tracked = _settings(run_folder / "config.yaml").get("wandb") or spec["config"].get("wandb") or {}
    return {"entity": tracked.get("entity"), "project": tracked.get("project") or PROJECT, "mode": tracked.get("mode")}


def _settings(path: Path) -> dict:
    import yaml

    return (yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None) or {}


def _files(results: Path, folder: Path, names: tuple[str, ...] | None = None) -> dict[str, Path]:
    """The record's files in `folder`, by their names on W&B: what a reader needs to judge the study again."""
    kept = [
        p
        for p in sorted(folder.glob("*"))
        if p.is_file()
        and p.suffix in (".json", ".jsonl", ".yaml")
        and p.name not in NOT_MIRRORED
        and (names is None or p.name in names)
    ]
    return {str(p.relative_to(results)): p for p in kept}


def entries(run_folder: Path) -> list[Entry]:
    """The W&B runs of everything finished in `run_folder`: its members, then its final run."""
    members = [member_entry(run_folder, m) for m in sorted((run_folder / "members").glob("*/"))]
    return [e for e in [*members, final_entry(run_folder)] if e and e.finished]


def over(run_folder: Path) -> bool:
    """Whether no notebook of this run is at work."""
    states = [record.read_json(run_folder / part / "status.json", {}).get("status") for part in ("", "sweep")]
    return "running" not in states


class Mirrors:
    """The senders that are under way, one process each beside the runs; `close` waits for them a little and no
    longer."""

    def __init__(self):
        self.live: dict[Path, threading.Thread] = {}
        self.processes: dict[Path, subprocess.Popen] = {}
        self.failed: list[Path] = []
        self.unsent: set[Path] = set()  # in offline files only, though W&B was wanted
        self.local: set[Path] = set()  # whose sender writes files here and asks nothing of the network
        self.ending = self.killed = False

    def begin(self, folder: Path, mode: str) -> None:
        """A notebook of this run starts: online, its members are followed while they train."""
        if mode == "online":
            self._start(folder, mode)

    def end(self, folder: Path, mode: str) -> None:
        """It has ended: a follower sees that for itself; offline, the files are written now."""
        if mode != "disabled":
            self._start(folder, mode)

    def _start(self, folder: Path, mode: str) -> None:
        folder = folder.parent if folder.name == "sweep" else folder
        if folder not in self.live or not self.live[folder].is_alive():
            self.live[folder] = threading.Thread(target=self._keep, args=(folder, mode), daemon=True)
            self.live[folder].start()

    def _keep(self, folder: Path, mode: str) -> None:
        """Keep a sender at work for this run. One that W&B stalls or crashes is started again; at last, offline."""
        now = mode
        for attempt in range(1, TRIES + 2):
            code = self._send(folder, now)
            if code in (0, UNREACHED) or self.killed:
                (self.unsent.add if now != mode or code else self.unsent.discard)(folder)
                break
            if now == "offline" or code is None:
                self.failed.append(folder)
                break
            now = "offline" if attempt == TRIES or over(folder) else now

    def _send(self, folder: Path, mode: str) -> int | None:
        (self.local.add if mode == "offline" else self.local.discard)(folder)
        with contextlib.suppress(OSError), open(folder / "wandb.log", "a") as log:
            process = self.processes[folder] = subprocess.Popen(
                [sys.executable, "-P", "-m", "lib.run.wandb_sync", "live", mode, str(folder)],
                stdin=subprocess.DEVNULL if self.ending else subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )  # the end of its input tells the sender that nothing more will come
            code = process.wait()
            if process.stdin:
                process.stdin.close()
            return code
        return None

    def close(self, seconds: float) -> None:
        """Wait for what is left, at most `seconds` in all, and for what is written here until it is; then end it. The
        record is whole without it."""
        deadline, self.ending = time.monotonic() + seconds, True
        for process in list(self.processes.values()):  # one may be starting
            if process.stdin:
                process.stdin.close()
        for folder, thread in self.live.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            if seconds and folder in self.local:
                thread.join(LOCAL_SECONDS)
        self.killed = True
        late = [folder for folder, process in list(self.processes.items()) if process.poll() is None]
        for folder in late:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.processes[folder].pid, signal.SIGKILL)
        for folder in [*late, *self.failed]:
            how = "not finished in time" if folder in late else "failed"
            print(
                f"W&B mirror of {folder.name}: {how} (see {folder / 'wandb.log'}); the record is whole, and "
                "./run_all.sh sync brings W&B up to date",
                file=sys.stderr,
            )
        if unsent := self.unsent.difference(late, self.failed):
            print(
                f"W&B could not be used: {len(unsent)} run{'s' * (len(unsent) > 1)} in offline files only (why: wandb.log); "
                "./run_all.sh sync brings W&B up to date",
                file=sys.stderr,
            )
