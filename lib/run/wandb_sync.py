"""The sender: a process of its own that mirrors records to W&B. Training never waits for it and does not know of it.

    python -m lib.run.wandb_sync live online|offline RUN_FOLDER      beside a running notebook (tracking.py starts
    it) python -m lib.run.wandb_sync sync RUN_FOLDER…                    bring W&B up to date with records
    (`./run_all.sh sync`)

Both compare what W&B holds with the record and send what differs: a step is sent again only where W&B's row for it
differs, a file only where its MD5 does. So sending twice changes nothing, and what was cut off half-way is completed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from lib import record
from lib.errors import MissingError
from lib.run import tracking, wandb_read

POLL = 1.0  # seconds between two looks at the histories of running members
LIVE_SECONDS, SYNC_SECONDS = 8, 600  # for one run's data to get through, beside a running study and afterwards
REPROBE = 20  # seconds between two attempts to reach W&B while a run goes on
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
        os._exit(tracking.STALLED)

    threading.Thread(target=look, daemon=True).start()


def begin(entry: tracking.Entry, name: str, mode: str, folder: Path, seconds: float):
    """A W&B run to log to, resumed where it is there already. Nothing of this machine or its user goes with it."""
    import wandb

    run = wandb.init(
        project=entry.project,
        entity=entry.entity,
        id=name,
        name=entry.name,
        group=entry.group,
        mode=mode,
        dir=str(folder),
        resume="allow" if mode == "online" else None,
        reinit="create_new",
        config=entry.whole_config,
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=min(seconds, 30),
            finish_timeout=seconds,
            finish_timeout_raises=True,
            save_code=False,
            disable_git=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            x_file_stream_transmit_interval=2.0,
            x_graphql_retry_max=2,
            x_service_wait=wandb_read.SERVICE_SECONDS,
            host="",
            program="",
        ),
    )
    run.define_metric("*", step_metric="global_step")
    beat()
    return run


def log(run, rows: dict[int, dict], sent: dict[int, dict]) -> int:
    """Log the rows that W&B does not have as they are; no `step=`, because W&B drops a step that goes back."""
    new = {step: row for step, row in rows.items() if sent.get(step) != row}
    for step, row in new.items():
        run.log(row)
        sent[step] = row
    beat()
    return len(new)


def finish(run, entry: tracking.Entry) -> None:
    """The final configuration, summary and files, and the end of the run. Raises TimeoutError where they do not get
    through."""
    run.config.update(entry.whole_config, allow_val_change=True)
    run.summary.update({k: v for k, v in entry.summary.items() if v is not None})
    for name, path in entry.files.items():
        run.save(str(path), base_path=str(path).removesuffix(name), policy="now")
    run.finish()
    beat()


class Sender:
    """A connection to W&B and the runs that are open on it."""

    def __init__(self, folder: Path, seconds: float):
        self.folder, self.seconds, self.api = folder, seconds, wandb_read.api(min(seconds, wandb_read.SECONDS))
        self.open: dict[str, tuple] = {}  # entry id -> (W&B run, {step: row} that W&B has)

    def remote(self, entry: tracking.Entry) -> tuple[str, object]:
        """(id to use, the run there or None). A final run of other members is left alone, and a spare id taken."""
        found = wandb_read.find(self.api, entry.entity, entry.project, entry.id)
        source = entry.record.get("source")
        if found is not None and source and (found.config.get("record") or {}).get("source") != source:
            return entry.spare, wandb_read.find(self.api, entry.entity, entry.project, entry.spare)
        return entry.id, found

    def follow(self, entry: tracking.Entry) -> None:
        """Log what is new in an unfinished member's history, all but its newest step (its evaluation may still
        come)."""
        rows = tracking.by_step(record.read_jsonl(entry.history))
        if len(rows) < 2 and entry.id not in self.open:
            return
        self._log(entry, dict(list(rows.items())[:-1]))

    def _log(self, entry: tracking.Entry, rows: dict[int, dict]) -> None:
        if entry.id not in self.open:
            name, found = self.remote(entry)
            sent = wandb_read.rows(found) if found else {}
            self.open[entry.id] = (begin(entry, name, "online", self.folder, self.seconds), sent)
        log(self.open[entry.id][0], rows, self.open[entry.id][1])

    def complete(self, entry: tracking.Entry) -> str:
        """Bring W&B up to date with a finished record; says what had to be sent, "" where nothing had."""
        differing = []
        if entry.id not in self.open:
            _, found = self.remote(entry)
            beat()
            if not (differing := wandb_read.lacking(entry, found)):
                return ""
        self._log(entry, tracking.by_step(record.read_jsonl(entry.history)))
        finish(self.open.pop(entry.id)[0], entry)
        return ", ".join(differing) or "live"

    def verify(self, entry: tracking.Entry, looks: int = 3) -> list[str]:
        """What W&B still lacks after it was sent; its server may take a moment to show what it was given."""
        for look in range(looks):
            beat()
            if not (left := wandb_read.lacking(entry, self.remote(entry)[1])):
                break
            time.sleep(look)
        return left

    def abandon(self) -> None:
        """Leave unfinished members open on W&B; the next attempt goes on with them."""
        for run, _ in self.open.values():
            run.finish(exit_code=1)
        self.open.clear()


def live(folder: Path) -> int:
    """Follow a run while its notebook is at work, then complete it. Waits for W&B as long as there is time; where the
    run is over and W&B was not to be reached, its offline files are written. Returns the exit code."""
    gone, sender, asked, finished, stamps = runner_gone(), None, False, set(), {}
    while True:
        last = tracking.over(folder) or gone.is_set()  # before the look: what was written until then is seen
        beat()
        if sender is None and not (asked and last):
            sender, asked = reach(folder), True
        if sender:
            for entry in _now(folder, stamps, last):
                if entry.finished and entry.id not in finished:
                    sender.complete(entry)
                    finished.add(entry.id)
                elif not entry.finished:
                    sender.follow(entry)
        if last:
            break
        if sender:
            time.sleep(POLL)
        else:
            pause(folder, gone, REPROBE)
    if sender is None:
        offline(folder)
        return tracking.UNREACHED
    if final := tracking.final_entry(folder):
        sender.complete(final)
    sender.abandon()
    print(f"{len(finished)} finished members are on W&B", flush=True)
    return 0


def runner_gone() -> threading.Event:
    """Set when this process's input ends: the runner has closed it, or was killed."""
    gone = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), gone.set()), daemon=True).start()
    return gone


def pause(folder: Path, gone: threading.Event, seconds: float) -> None:
    """Let so many seconds pass, or less where the run ends meanwhile."""
    end = time.monotonic() + seconds
    while (
        not tracking.over(folder)
        and not gone.wait(min(1.0, max(0.0, end - time.monotonic())))
        and time.monotonic() < end
    ):
        beat()


def _now(folder: Path, stamps: dict, last: bool) -> list[tracking.Entry]:
    """The members whose record has changed since the last look; at the last, all."""
    found = []
    for member in sorted((folder / "members").glob("*/")):
        stamp = [
            (p.stat().st_mtime_ns, p.stat().st_size) if p.exists() else None
            for p in (member / "history.jsonl", member / "done.json")
        ]
        if (last or stamps.get(member) != stamp) and (entry := tracking.member_entry(folder, member)):
            stamps[member] = stamp
            found.append(entry)
    return found


def reach(folder: Path) -> Sender | None:
    try:
        sender = Sender(folder, LIVE_SECONDS)
        print("W&B answers", flush=True)
        return sender
    except MissingError as error:
        print(error, flush=True)
        return None


def offline(folder: Path) -> None:
    """Offline files of everything finished in the run, for `wandb leet` and `wandb sync`; what is there already
    stays."""
    wandb_read.quiet()
    wanted = {entry.id: entry for entry in tracking.entries(folder)}
    there = set()
    for marker in (folder / "wandb").glob("offline-run-*/mirrored.json"):
        made = record.read_json(marker, {})
        if made.get("id") in wanted and made.get("record") == json.loads(json.dumps(wanted[made["id"]].record)):
            there.add(made["id"])
    for run in (folder / "wandb").glob("*run-*"):
        if run.is_dir() and record.read_json(run / "mirrored.json", {}).get("id") not in there:
            shutil.rmtree(run, ignore_errors=True)  # of another attempt, or cut off: the record is what counts
    for name, entry in wanted.items():
        if name not in there:
            run = begin(entry, name, "offline", folder, SYNC_SECONDS)
            place = Path(run.settings.sync_dir)
            log(run, tracking.by_step(record.read_jsonl(entry.history)), {})
            finish(run, entry)
            record.write_json(place / "mirrored.json", {"id": name, "record": entry.record})
    print(f"{len(wanted)} W&B runs in offline files, {len(wanted) - len(there)} written now", flush=True)


def sync(folders: list[Path], entity: str | None, project: str | None) -> int:
    """Bring W&B up to date with these runs. Exit code: 0 it is, 1 something is still missing there."""
    sender, short, count, sent = None, [], 0, 0
    for folder in folders:
        for entry in tracking.entries(folder):
            if entry.mode == "disabled":
                print(f"{folder.name}: its YAML says wandb.mode: disabled; left out", flush=True)
                break
            entry.entity, entry.project = entity or entry.entity, project or entry.project
            sender = sender or Sender(folder, SYNC_SECONDS)
            sender.folder, count = folder, count + 1
            if differing := sender.complete(entry):
                sent += 1
                left = sender.verify(entry)
                short += [entry.name] if left else []
                told = f"; W&B STILL LACKS {', '.join(left)}" if left else ""
                print(f"  {entry.name}: sent {differing}{told}", flush=True)
    print(
        f"W&B: {count} runs looked at, {sent} brought up to date, {count - sent} were"
        + (f"; still incomplete: {', '.join(short)}" if short else ""),
        flush=True,
    )
    return 1 if short else 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.run.wandb_sync")
    parser.add_argument("what", choices=("live", "sync"))
    parser.add_argument("--entity")
    parser.add_argument("--project")
    parser.add_argument("rest", nargs="+")
    given = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once: nothing here needs to be put in order
    if given.what == "live":
        mode, folder = given.rest[0], Path(given.rest[1])
        wandb_read.quiet()
        import wandb  # noqa: F401 (as long as the disk takes; the watchdog is for calls to W&B)

        beat()
        watchdog(4 * LIVE_SECONDS)
        if mode == "online":
            return live(folder)
        pause(folder, runner_gone(), float("inf"))
        offline(folder)
        return 0
    watchdog(SYNC_SECONDS + 60)
    wandb_read.key_or_mend()
    return sync([Path(p) for p in given.rest], given.entity, given.project)


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except MissingError as error:
        print(record.redact(str(error)), file=sys.stderr)
        code = error.exit_code
    except Exception as error:
        print(wandb_read.first_line(error), file=sys.stderr, flush=True)
        code = 1
    sys.stdout.flush()
    os._exit(code)  # the client's own exit hook may wait for ever for runs that are still open
