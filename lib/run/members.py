"""A run's members: its grid cells x seeds, each trained, resumed, cached and scheduled on its own.

    inputs = prepare_all(run)       what a seed's members share, made once and kept on disk by content
    job = submit(run)               queue what is not cached     … the notebook continues with its method cells …
    watch(job)                      one line per member as it ends
    records = collect(job)          their metrics; raises when a member failed

A study supplies `lib/<study>/study.py` with `prepare(run, folder)` and `train(member, folder, shared) -> metrics`,
`shared` being the folder that `prepare` filled. Sections of the configuration that differ between members of one
preparation are named in its MEMBER_KEYS.
"""

import contextlib
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from lib import config, hub, record
from lib.errors import StudyError
from lib.run import keys, pool, runs, work

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it names optional kernels that are not installed
CACHE = hub.cache_folder()
PROCESSES = 8  # of a measurement, at first; claims about times want as many
TIMES = "step_cost"  # the function of a study that measures times


def stale(member, folder: Path) -> str:
    """Why this member has to be trained; the empty string where its record is up to date."""
    wanted = keys.member_key(member)
    done, begun = (record.read_json(folder / f"{name}.json", {}) for name in ("done", "member"))
    finished = done.get("status") in record.FINISHED and record.read_json(folder / "metrics.json") is not None
    old = done["key"] if finished else begun.get("key", wanted)
    if not finished and old["all"] == wanted["all"]:
        return "resumes" if any(folder.glob("checkpoints/*/complete.json")) else "no record"
    if old.get("code") == wanted["code"]:
        return keys.difference(old, wanted)
    return keys.difference(old, wanted, record.read_json(folder / "code.json"), keys.member_code(member))


def archive(folder: Path) -> None:
    """Move a record aside, without its checkpoints: nothing recorded is lost, and nothing stale is resumed."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    attempts = folder.parent.parent / "attempts"
    attempts.mkdir(parents=True, exist_ok=True)
    folder.rename(attempts / f"{folder.name}.{record.next_number(attempts, folder.name + '.*')}")


def take_over(run, outputs: Path) -> None:
    """Copy the records of a run's members that another folder below `outputs` has, up to date and under the same name."""
    for member in config.members(run):
        mine = Path(run.results_dir) / run.run_id / "members" / member.id
        others = sorted(outputs.glob(f"*/{run.study}/{run.run_id}/members/{member.id}")) if not mine.exists() else ()
        if found := [other for other in others if (other / "done.json").exists() and not stale(member, other)]:
            partial = mine.parent.with_name(f"{member.id}.partial")
            shutil.copytree(found[0], partial, dirs_exist_ok=True)
            mine.parent.mkdir(exist_ok=True)
            partial.rename(mine)


class Job(NamedTuple):
    run: Any
    members: list
    folders: dict[str, Path]
    tasks: dict[str, pool.Task]


def inputs_folder(run) -> Path:
    """Where what a seed's members share lies, named by all that it is made of; of a run, its first seed's."""
    return CACHE / run.study / keys.inputs_key(config.seeded(run, run.seed_list[0]))


def audit(run, folder: Path | None = None) -> dict:
    """The audit (lib/data.py) of the data of the run's first cell and seed, made once for the same data, settings and
    code; into audit.json of the run's `folder`."""
    first = config.seeded(config.apply(run, config.first_cell(run)), run.seed_list[0])
    path = CACHE / run.study / f"audit-{keys.inputs_key(first, 'audit')}.json"
    if (found := record.read_json(path)) is None:
        given = []
        if run.dataset.name in hub.SAMPLED:
            prepare_all(run)  # the other seeds' too, beside it and not after it
            given = [prepare_inputs(first)]
        found = config.study_module(run.study).audit(first, *given)
        if all(found["tokens"].values()):  # else the tokenizer is not here yet
            record.write_json(path, found)
    if folder is not None:
        record.write_json(folder / "audit.json", found)
    return found


def _spec(run) -> dict:
    """What another process makes the run of again: work.run_of."""
    return {"study": run.study, "scale": run.scale, "mode": run.mode, "config": config.dump(run)}


def _task(run, name: str, target: str, folder: Path, argument: dict, **more) -> pool.Task:
    argument = {**argument, "folder": str(folder)}
    compute = {"threads": run.compute.threads, "cpu": not run.compute.gpus}
    return pool.Task(name, f"lib.run.work:{target}", argument, folder, **compute, **more)


def _start(task: pool.Task, function) -> None:
    """Queue a task. With STUDY_SLOTS=0 its function is called in this very kernel instead, for pdb and for code defined
    in a cell."""
    if os.environ.get("STUDY_SLOTS") != "0":
        pool.start(task)
        return
    started = time.monotonic()
    with work.in_process(task.threads, task.cpu):
        function(task.argument)
    task.state, task.seconds = "succeeded", time.monotonic() - started


def _wait(run, task: pool.Task, phase: str, wanted: str, **counts: int | str) -> None:
    """Wait for what is no member. Raises StudyError where it does not succeed."""
    pool.wait_for([task], on_tick=lambda: _progress(run, {"phase": phase, **counts, **_last(task.folder)}))
    if task.state != "succeeded":
        raise StudyError(f"{run.run_id}: {task.name}", ": ".join(_ending(task)), wanted, f"read {task.log}")


def prepare_inputs(run, *others) -> Path:
    """The folder of what a seed's members share (data, tokenizer, base model, reference log-probabilities), made where
    it is not there yet, and beside it what runs of other seeds share."""
    folders = {inputs_folder(each): config.seeded(each, each.seed_list[0]) for each in (run, *others)}
    missing, tasks = [final for final in sorted(folders) if not (final / "complete.json").exists()], []
    with contextlib.ExitStack() as locks:
        for final in missing:  # another notebook may be making the very same: it is waited for here, not in a slot
            final.parent.mkdir(parents=True, exist_ok=True)
            locks.enter_context(FileLock(f"{final}.lock"))
        for final in (final for final in missing if not (final / "complete.json").exists()):
            partial, check = final.with_name(final.name + ".partial"), (final / "complete.json").exists
            partial.mkdir(exist_ok=True)
            argument = {**_spec(folders[final]), "final": str(final)}
            tasks.append(_task(run, "prepare", "prepare", partial, argument, check=check))
            _start(tasks[-1], work.prepare)
        for number, task in enumerate(tasks, 1):
            _wait(run, task, "preparing", "data, tokenizer and base model", of=f"{number} of {len(tasks)}")
    return next(iter(folders))


def prepare_all(run) -> Path:
    """The folder of what the run's first member and others of its seed share, with those of every seed that is still to
    be trained, of a choice of pilots that is still to come too: one after the other they would leave slots empty."""
    planned = config.members(runs.settle(run, guess=True))
    root = Path(run.results_dir) / run.run_id / "members"
    return prepare_inputs(planned[0].run, *(m.run for m in planned if stale(m, root / m.id)))


def measure(run, function: str = TIMES, processes: int = PROCESSES) -> None:
    """Run a measurement of the study in so many processes, one after the other, each of which writes into a folder of its
    own, and put what they wrote together in the run's. Processes that have been measured stay. What the search is
    to find is left out: the run's own values, at paper scale the published ones, are measured."""
    run = config.tune(run)
    folder, inputs, key = Path(run.results_dir) / run.run_id, prepare_inputs(run), keys.measurement_key(run, function)
    rows = []
    for number in range(processes):
        place = folder / function / str(number)
        if measured(place) != key:
            place.mkdir(parents=True, exist_ok=True)
            task = _task(run, function, "measure", place, {**_spec(run), "function": function, "inputs": str(inputs)})
            _start(task, work.measure)
            phase = f"measuring {function.replace('_', ' ')}, process {number + 1} of {processes}"
            _wait(run, task, phase, "a measurement", done=number, members=processes)
            record.write_json(place / "done.json", {"key": key})
        rows += [{"process": number, **row} for row in record.read_jsonl(place / f"{function}.jsonl")]
    record.write_jsonl(folder / f"{function}.jsonl", rows)
    (folder / "progress.json").unlink(missing_ok=True)


def measured(place: Path) -> str | None:
    """The key of what a process measured in this folder."""
    return record.read_json(place / "done.json", {}).get("key")


def submit(run, members: list | None = None, *, subfolder: str = "members") -> Job:
    """Queue every member whose record is not up to date; the others are used as they are."""
    members = config.members(run) if members is None else members
    folders = {m.id: Path(run.results_dir) / run.run_id / subfolder / m.id for m in members}
    reasons = {m.id: reason for m in members if (reason := stale(m, folders[m.id]))}
    for member_id in folders.keys() - reasons.keys():
        work.drop_training_state(folders[member_id])  # where it was killed just after its sentinel
    late = [member for member in members if member.id in reasons]
    if late:
        prepare_inputs(*(member.run for member in late))
    job = Job(run, members, folders, {m.id: _member_task(m, folders[m.id]) for m in late})
    for task in job.tasks.values():
        _start(task, work.train)
    print(f"{len(members)} members: {len(members) - len(job.tasks)} cached, {len(job.tasks)} to train")
    for member_id, reason in list(reasons.items())[:3]:
        print(f"  {member_id}: {reason}")
    return job


def _member_task(member, folder: Path) -> pool.Task:
    run, wanted, nonce = member.run, keys.member_key(member), os.urandom(8).hex()
    previous = record.read_json(folder / "member.json")
    if previous and previous["key"]["all"] != wanted["all"] or (folder / "done.json").exists():
        archive(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "error.json").unlink(missing_ok=True)
    identity = {"run_id": run.run_id, "member": member.id, "cell": member.cell, "cell_name": member.cell_name}
    spec = {**_spec(run), **identity, "seed": member.seed}
    record.write_json(folder / "member.json", {**spec, "key": wanted})
    record.write_json(folder / "code.json", keys.member_code(member))
    argument = {"spec": spec, "inputs": str(inputs_folder(run)), "key": wanted, "nonce": nonce}

    def check() -> bool:
        return record.read_json(folder / "done.json", {}).get("nonce") == nonce

    return _task(run, member.id, "member", folder, argument, slots=run.compute.devices, check=check)


def watch(job: Job) -> None:
    """Wait for the members, saying one line as each ends; the runner shows their steps in between."""
    tasks, steps = list(job.tasks.values()), {m.id: config.steps(m.run) for m in job.members if m.id in job.tasks}
    began, whole = None, {"pilots": any(m.pilot and m.id in steps for m in job.members), "members": len(tasks)}

    def changed(task: pool.Task) -> None:
        nonlocal began
        began = began or time.monotonic()  # of the first member's turn, not of its place in the queue
        if task.ended:
            outcome = _outcome(task, job.run.optuna.objective_metric)
            print(f"[{sum(t.ended for t in tasks)}/{len(tasks)}] {task.name}: {outcome}")

    def tick() -> None:
        now = time.monotonic()
        at_work = [t for t in tasks if t.state == "running"]
        running = [{"member": t.name, "steps": steps[t.name], **_last(t.folder)} for t in at_work]
        counts = {"done": sum(t.ended for t in tasks), "elapsed": round(now - (began or now), 1)}
        _progress(job.run, {"phase": "training", **whole, **counts, "running": running})

    pool.wait_for(tasks, changed, tick)
    _progress(job.run, {"phase": "recording", **whole, "done": len(tasks), "running": []})


def _ending(task: pool.Task) -> tuple[str, str]:
    """How a task that did not succeed ended (lost, failed or out_of_memory), and its exception."""
    error = record.read_json(task.folder / "error.json", {}) if task.state == "failed" else {}
    unsaid = "its log says why" if task.state == "failed" else "its process was lost"
    return error.get("status", task.state), error.get("exception", unsaid)


def _outcome(task: pool.Task, metric: str) -> str:
    status, said = _ending(task)
    if task.state == "succeeded":
        metrics = record.read_json(task.folder / "metrics.json", {})
        status, value = metrics.get("status", status), metrics.get(metric)
        said = f"{metric} {value:.3f}" if isinstance(value, float) else ""
    return f"{status} in {task.seconds:.1f} s  {said.splitlines()[0] if said else ''}"


def collect(job: Job) -> list[dict]:
    """The members' metrics, in the grid's order. Raises StudyError naming every member that failed or was lost."""
    failed = [t for t in job.tasks.values() if t.state != "succeeded"]
    if failed:
        what = f"{len(failed)} of {len(job.tasks)} members did not finish"
        for task in failed:
            what += f"\n  {task.name}: {': '.join(_ending(task))}  (log: {task.log})"
        fix = "rerun the same command to resume what is left"
        raise StudyError(f"run {job.run.run_id}", what, "every member completed or diverged", fix)
    read = {m.id: record.read_json(job.folders[m.id] / "metrics.json") for m in job.members}
    who = [(m.id, {"member": m.id, "cell": m.cell_name, "seed": m.seed, "pilot": m.pilot}) for m in job.members]
    return [own | read[name] for name, own in who]


def _progress(run, state: dict) -> None:
    """For the runner's live display and for `status` in another terminal."""
    record.write_json(Path(run.results_dir) / run.run_id / "progress.json", state)


def _last(folder: Path) -> dict:
    """The last step of a running member, from the end of its history."""
    with contextlib.suppress(OSError, ValueError), open(folder / "history.jsonl", "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        for line in reversed(file.read().decode(errors="replace").split("\n")):
            if line.startswith("{") and '"loss"' in line and line.endswith("}"):
                row = json.loads(line)
                return {k: row[k] for k in ("step", "steps", "loss") if row.get(k) is not None}
    return {}
