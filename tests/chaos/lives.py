"""A small study that is struck by faults and started again, and what must hold of it afterwards."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

from lib import record
from tests.conftest import PATIENCE, ROOT, TINY

HOOK = Path(__file__).with_name("hook")
# One run of one cell with two seeds and its analysis; nothing of it is a timing (role: no interleaved step cost).
STUDY = {
    **TINY,
    "role": "comparative",
    "training": {**TINY["training"], "max_steps": 8, "eval_steps": 4, "save_steps": 2},
}
RUN = "outputs/laptop-full/td_dpo/tiny"
COMMAND = ("full", "--scale", "laptop")


class Study:
    """One study in a folder of its own, with its own outputs, cache and temporary directory."""

    def __init__(self, home: Path, study: dict = STUDY):
        self.home = home
        self.run = home / RUN
        for name in ("params/td_dpo/laptop", "tmp"):
            (home / name).mkdir(parents=True)
        (home / "params/td_dpo/laptop/tiny.yaml").write_text(yaml.safe_dump(study))

    def start(self, faults: list[dict], *, terminal: int | None = None, command=COMMAND, **spec) -> subprocess.Popen:
        """The command that a person would type, with the hook in all its processes; on a `terminal` or into out.txt."""
        path = self.home / "spec.json"
        path.write_text(json.dumps({"home": str(self.home), "faults": faults, "patience": PATIENCE, **spec}))
        environment = {
            **os.environ, "STUDY_OUTPUTS": str(self.home / "outputs"), "STUDY_CACHE": str(self.home / "cache"),
            "TMPDIR": str(self.home / "tmp"), "CHAOS_SPEC": str(path), "CHAOS_HOME": str(self.home),
            "PYTHONPATH": f"{HOOK}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        environment.pop("STUDY_POOL", None)
        command = [sys.executable, "-m", "lib", *command, "--params", str(self.home / "params"), "--jobs", "1"]
        with open(self.home / "out.txt", "a") as out:
            stream = out if terminal is None else terminal
            return subprocess.Popen(
                command, env=environment, cwd=ROOT, stdin=terminal, stdout=stream, stderr=stream, start_new_session=True
            )

    def fired(self, fault: dict) -> bool:
        return (self.home / f"{fault['id']}.fired").exists()

    def go(self, fault: dict) -> None:
        (self.home / f"{fault['id']}.go").touch()

    def live(self, faults: list[dict], act=None, **spec) -> int:
        """One life: start it, `act(study, process, fault)` when a fault that tells has struck; returns the exit
        code."""
        process = self.start(faults, **spec)
        waiting = [f for f in faults if f["do"] == "tell"]
        deadline = time.monotonic() + 2 * PATIENCE  # a whole life, in which a fault that tells may take its time
        try:
            while process.poll() is None:
                for fault in [f for f in waiting if self.fired(f)]:
                    waiting.remove(fault)
                    act(self, process, fault)
                    self.go(fault)
                if time.monotonic() > deadline:
                    raise AssertionError(f"it hangs: see {self.home}/out.txt")
                time.sleep(0.05)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        return process.returncode

    def relatives(self) -> list[psutil.Process]:
        """Every living process of this study, whoever its parent is by now: they all have our variable."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("CHAOS_HOME") == str(self.home):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def orphans(self, seconds: float = 60.0) -> list[psutil.Process]:
        """Who is still there `seconds` after the runner has gone; a server or a kernel that nobody ends is there for
        ever."""
        deadline = time.monotonic() + seconds
        while (left := self.relatives()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left


def sleep_and_wake(study: Study, process: subprocess.Popen, fault: dict, seconds: float = 3.0) -> None:
    """The lid is closed: everything stops, and goes on later."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for member in family:
            try:
                member.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        if number == signal.SIGSTOP:
            time.sleep(seconds)


def second_runner(study: Study, process: subprocess.Popen, fault: dict) -> None:
    """The same command in another terminal must be refused, and say why."""
    before = len((study.home / "out.txt").read_text())
    second = study.start([])
    assert second.wait(PATIENCE) == 2, "a second runner was let in"
    assert "another runner works here" in (study.home / "out.txt").read_text()[before:]


def fill_disk(study: Study, process: subprocess.Popen, fault: dict) -> None:
    """Outputs stand on a file system of their own: take all that is left of it."""
    with open(study.home / "outputs" / "filler", "wb", buffering=0) as filler:
        free = shutil.disk_usage(study.home / "outputs").free
        try:
            os.posix_fallocate(filler.fileno(), 0, free)
            while True:
                filler.seek(0, os.SEEK_END)
                filler.write(b"x" * 4096)
        except OSError:
            pass


def mount(study: Study) -> bool:
    """Outputs on a tmpfs; False where this machine does not let us."""
    (study.home / "outputs").mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", study.home / "outputs"], capture_output=True
    )
    return done.returncode == 0


def unmount(study: Study) -> None:
    subprocess.run(["umount", "-l", study.home / "outputs"], capture_output=True)


# ------------------------------------------------------------------------------------------------------------ what must
# hold


def content(run: Path) -> dict[str, bytes]:
    """All of a record that must not depend on what happened on the way; times and costs are left out."""
    found = {}
    for folder in sorted((run / "members").glob("*/")):
        for path in [
            folder / "history.jsonl",
            folder / "predictions.jsonl",
            *folder.glob("checkpoints/*/*.safetensors"),
            *folder.glob("checkpoints/*/complete.json"),
        ]:
            found[str(path.relative_to(run))] = path.read_bytes()
        found[f"{folder.name}/metrics"] = plain(folder / "metrics.json")
    found["run metrics"] = plain(run / "metrics.json")
    found["claims"] = plain(run.parent / "comparison" / "claims.json")
    return found


def plain(path: Path) -> bytes:
    """A JSON file without its times."""

    def timeless(value):
        if isinstance(value, dict):
            return {
                k: timeless(v) for k, v in sorted(value.items()) if "second" not in k and k not in ("minutes", "hours")
            }
        return [timeless(v) for v in value] if isinstance(value, list) else value

    return json.dumps(timeless(record.read_json(path))).encode()


def differences(run: Path, calm: dict[str, bytes]) -> list[str]:
    mine = content(run)
    return sorted(name for name in {*mine, *calm} if mine.get(name) != calm.get(name))


def false_successes(study: Study, calm: dict[str, bytes]) -> list[str]:
    """What says it is done and is not what an undisturbed run has done. Asked after every life, also one that
    failed."""
    wrong = []
    for done in study.run.glob("members/*/done.json"):
        if record.read_json(done):
            name = done.parent.name
            for file in ("history.jsonl", "predictions.jsonl"):
                if (done.parent / file).read_bytes() != calm[f"members/{name}/{file}"]:
                    wrong.append(f"{name}/{file}")
            if plain(done.parent / "metrics.json") != calm[f"{name}/metrics"]:
                wrong.append(f"{name}/metrics.json")
    for folder, output in ((study.run, "run"), (study.run.parent / "comparison", "analysis")):
        if (record.read_json(folder / "status.json") or {}).get("status") == "succeeded":
            wrong += [
                f"{folder.name}/{name}"
                for name in (f"{output}.ipynb", "metrics.json", "done.json")
                if not (folder / name).exists()
            ]
    return wrong


def litter(study: Study) -> list[str]:
    """Temporary files that nobody will remove: in the outputs, the cache and the temporary directory."""
    found = [*(study.home / "tmp").iterdir()]
    for place in (study.home / "outputs", study.home / "cache"):
        found += [p for p in place.rglob("*") if p.name.endswith((".tmp", ".partial")) or p.name == "progress.json"]
    return [str(p.relative_to(study.home)) for p in found]


def events(home: Path, settings: dict = STUDY) -> tuple[list[dict], dict[str, bytes]]:
    """An undisturbed run: every event of it that a fault can strike at, and its content."""
    study = Study(home, settings)
    code = study.live([], record=str(home / "events.jsonl"))
    assert code == 0, (home / "out.txt").read_text()
    assert not study.orphans()
    assert not litter(study), litter(study)
    unique = {json.dumps(row, sort_keys=True): row for row in record.read_jsonl(home / "events.jsonl")}
    return list(unique.values()), content(study.run)
