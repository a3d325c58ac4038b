"""Members: killed and resumed to the same bytes, cached by what their numbers depend on, and never a false success."""

import contextlib
import os
import shutil
import subprocess
import types
from pathlib import Path

import pytest
import torch

from lib import claims, config, record, tables
from lib.errors import StudyError
from lib.run import keys, members, pool, runner, runs, work
from tests.conftest import TINY


def finished(job):
    members.watch(job)
    return members.collect(job)


def content(folder: Path) -> dict[str, bytes]:
    """What must not depend on what happened on the way: history, predictions, metrics without their seconds,
    weights."""
    metrics = {k: v for k, v in record.read_json(folder / "metrics.json").items() if "seconds" not in k}
    weights = sorted((folder / "checkpoints").rglob("model.safetensors"))
    return {
        "metrics": repr(sorted(metrics.items())).encode(),
        "weights": weights[-1].read_bytes(),
        **{name: (folder / name).read_bytes() for name in ("history.jsonl", "predictions.jsonl")},
    }


@pytest.fixture(scope="module")
def undisturbed(pool_socket, tmp_path_factory):
    import yaml

    folder = tmp_path_factory.mktemp("undisturbed")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "seed_list": [1]}))
    run = config.load_run(path, study="td_dpo", scale="laptop", mode="full", results_dir=folder / "results")
    members.prepare_inputs(run)
    finished(members.submit(run))
    return content(folder / "results" / "tiny" / "members" / "default-s1")


@pytest.mark.parametrize("kill_at", [1, 3, 5, 8, 11, "save"])
def test_killed_and_resumed_equals_undisturbed(tiny, undisturbed, pool_socket, tmp_path, kill_at, monkeypatch):
    """kill -9 after a step, or inside the save at step 8: the pool starts the member again and its record is the
    same."""
    task_of = members._member_task

    def faulty(member, folder):
        task = task_of(member, folder)
        task.target = "tests.faults:killed_member"
        task.argument |= {"kill_at": kill_at, "marker": str(tmp_path / "killed")}
        return task

    monkeypatch.setattr(members, "_member_task", faulty)
    run = tiny(seed_list=[1])
    members.prepare_inputs(run)
    job = members.submit(run)
    finished(job)
    assert (tmp_path / "killed").exists()
    assert job.tasks["default-s1"].attempts == 2
    assert content(job.folders["default-s1"]) == undisturbed


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_while_a_member_trains(tiny, undisturbed, pool_socket, small_disk):
    """The member fails with the system's own words, nothing counts as done, and with space again it goes on to the same
    end."""
    run = tiny(seed_list=[1]).model_copy(update={"results_dir": small_disk / "results"})
    members.prepare_inputs(run)
    job = members.submit(run)
    history = job.folders["default-s1"] / "history.jsonl"

    def fill():
        if history.exists() and not (small_disk / "filler").exists():
            with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as filler:
                while True:
                    filler.write(b"x" * 4096)

    pool.wait_for(list(job.tasks.values()), on_tick=fill, on_change=lambda _: fill())
    if job.tasks["default-s1"].state != "succeeded":  # a fast machine may be done before the disk is full
        assert job.tasks["default-s1"].state == "failed"
        assert not (job.folders["default-s1"] / "done.json").exists()
    (small_disk / "filler").unlink()
    again = members.submit(run)
    finished(again)
    assert content(job.folders["default-s1"]) == undisturbed
    assert not list(small_disk.rglob("*.tmp"))


def test_outputs_that_turn_read_only_while_a_run_starts(tiny, pool_socket, small_disk):
    run = tiny(seed_list=[1]).model_copy(update={"results_dir": small_disk / "results"})
    members.prepare_inputs(run)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="Read-only file system"):
        members.submit(run)


def test_a_second_submit_trains_nothing_and_a_changed_setting_says_what_changed(tiny, pool_socket):
    run = tiny(seed_list=[1])
    members.prepare_inputs(run)
    finished(members.submit(run))
    again = members.submit(run)
    assert again.tasks == {}
    assert len(members.collect(again)) == 1
    (member,), folder = config.members(run), Path(run.results_dir) / "tiny" / "members" / "default-s1"
    kept = (folder / "metrics.json").read_text()
    (folder / "metrics.json").write_text("")
    assert members.stale(member, folder) == "resumes", "a record without its numbers is none"
    (folder / "metrics.json").write_text(kept)
    assert members.stale(member, folder) == ""
    changed = config.apply(run, {"learning_rate": 2e-3})
    (member,) = config.members(changed)
    reason = members.stale(member, Path(run.results_dir) / "tiny" / "members" / member.id)
    assert reason == "training.learning_rate 0.001 -> 0.002"
    (folder / "done.json").unlink()  # killed before its end: its checkpoints are of no use to another setting
    assert members.stale(member, folder) == "training.learning_rate 0.001 -> 0.002"
    finished(members.submit(changed))
    attempts = Path(run.results_dir) / "tiny" / "attempts"
    assert (attempts / "default-s1.1" / "metrics.json").exists(), "the old record is kept"


def test_a_member_that_is_asked_to_stop_saves_and_goes_on_from_there(
    tiny, undisturbed, pool_socket, tmp_path, monkeypatch
):
    """SIGTERM of whoever (a scheduler, Ctrl-C): a checkpoint where there would be none, and the same record in the end.
    It is sent from inside, at a step: from outside, a slow machine may send it when all is done."""
    task_of = members._member_task

    def stopped(member, folder):
        task = task_of(member, folder)
        task.target = "tests.faults:stopped_member"
        task.argument |= {"stop_at": 3, "marker": str(tmp_path / "stopped")}
        return task

    monkeypatch.setattr(members, "_member_task", stopped)
    run = tiny(seed_list=[1], training={**TINY["training"], "save_steps": 100})
    members.prepare_inputs(run)
    job = members.submit(run)
    task = job.tasks["default-s1"]
    pool.wait_for([task])
    assert task.state == "succeeded"
    assert task.attempts == 2, "it was started again"
    assert "is saved" in task.log.read_text()
    assert content(task.folder) == undisturbed


def test_a_finished_member_keeps_its_weights_and_not_its_optimiser(tiny, pool_socket, tmp_path):
    run = tiny(seed_list=[1])
    members.prepare_inputs(run)
    job = members.submit(run)
    finished(job)
    folder = job.folders["default-s1"] / "checkpoints"
    kept = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {"model.safetensors", "complete.json"} <= kept
    assert not kept & {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    trial = shutil.copytree(folder.parent, tmp_path / "sweep/trials/one")
    work.drop_training_state(trial)
    assert not (trial / "checkpoints").exists(), "of a search's trial nobody loads the weights"
    late = next(folder.glob("checkpoint-*")) / "optimizer.pt"  # killed between its sentinel and this
    late.write_text("moments")
    assert members.submit(run).tasks == {}
    assert not late.exists()


def test_a_kill_between_a_save_and_its_tidying_leaves_no_third_checkpoint(tmp_path):
    """Found by the fourth of a hundred faults: the last checkpoint was saved, the older ones not yet removed."""
    from lib import training as checkpoints

    place = tmp_path / "checkpoints"
    for step in (2, 4, 6, 8):
        (place / f"checkpoint-{step}").mkdir(parents=True)
        checkpoints.mark_complete(place / f"checkpoint-{step}", {"step": step, "fingerprint": "f", "best_step": 4})
    (place / "checkpoint-10").mkdir()  # killed inside its save
    assert checkpoints.resume_point(tmp_path, "f")[0] == place / "checkpoint-8"
    assert [p.name for p in checkpoints.checkpoint_folders(place)] == ["checkpoint-4", "checkpoint-8"]
    assert checkpoints.resume_point(tmp_path, "another") == (None, {"step": -1})
    assert checkpoints.checkpoint_folders(place) == []


def test_what_a_killed_writer_of_a_checkpoint_leaves_is_swept(tmp_path):
    """Markers and histories are written like every other file, so that what a kill leaves has the name that is
    swept."""
    from lib import training as checkpoints

    for what in ("mark", "cut"):
        folder = tmp_path / what
        folder.mkdir()
        (folder / "history.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
        (folder / "checkpoint-4").mkdir()
        if not (pid := os.fork()):
            os.replace = lambda *_: os.kill(os.getpid(), 9)
            if what == "mark":
                checkpoints.mark_complete(folder / "checkpoint-4", {"step": 4})
            checkpoints.resume_point(folder, "f")
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 9
        assert [p for p in folder.rglob("*") if p.name.endswith(".tmp")]
        (folder / "run.partial.ipynb").touch()
        runner.remove_leftovers(folder)
        assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["history.jsonl", "run.partial.ipynb"]


def test_a_failing_member_is_named_with_its_exception_and_the_others_go_on(tiny, pool_socket):
    run = tiny()
    members.prepare_inputs(run)
    job = members.submit(run)
    members.watch(job)
    shutil.rmtree(job.folders["default-s2"])
    broken = config.apply(run, {"seed_list": [1, 2]})
    original = members._member_task

    def without_inputs(member, folder):
        task = original(member, folder)
        task.argument["inputs"] = "/nowhere"
        return task

    members._member_task = without_inputs
    try:
        job = members.submit(broken)
    finally:
        members._member_task = original
    members.watch(job)
    with pytest.raises(StudyError, match="default-s2: failed"):
        members.collect(job)
    assert (job.folders["default-s1"] / "metrics.json").exists()
    assert not (job.folders["default-s2"] / "metrics.json").exists()


def test_a_member_without_memory_ends_so_with_its_batch_and_the_setting_to_lower(
    tiny, pool_socket, monkeypatch, capsys
):
    """torch.OutOfMemoryError in step 3 of one: its record says out_of_memory, it is not tried again, the other goes
    on."""
    task_of = members._member_task

    def small_gpu(member, folder):
        task = task_of(member, folder)
        task.target = "tests.faults:out_of_memory_member" if member.seed == 2 else task.target
        return task

    monkeypatch.setattr(members, "_member_task", small_gpu)
    run = tiny()
    members.prepare_inputs(run)
    job = members.submit(run)
    members.watch(job)
    task, folder = job.tasks["default-s2"], job.folders["default-s2"]
    assert (task.state, task.attempts) == ("failed", 1)
    assert "default-s2: out_of_memory" in capsys.readouterr().out
    assert not (folder / "done.json").exists()
    error = record.read_json(folder / "error.json")
    assert error["status"] == "out_of_memory"
    first = error["exception"].splitlines()[0]
    tokens = int(first.split(" tokens")[0].split()[-1])
    assert "step 3: no memory for a batch of 8 pairs with" in first
    assert tokens > 8 * 4
    assert "lower training.per_device_train_batch_size (8)" in error["exception"]
    assert "CUDA out of memory" in task.log.read_text(), "the allocator's own words are in the log"
    with pytest.raises(StudyError, match="default-s2: out_of_memory"):
        members.collect(job)
    assert (job.folders["default-s1"] / "metrics.json").exists()
    assert not (job.folders["default-s2"] / "metrics.json").exists()
    everyone = tables.load(run.results_dir, config.members(run)).everyone
    (missing,) = everyone[everyone["status"] != "completed"].to_dict("records")
    assert (missing["member"], missing["status"]) == ("default-s2", "out_of_memory")


def test_a_measurement_is_repeated_in_fresh_processes_and_those_measured_stay(tiny, pool_socket):
    """Claims about times have a process as their unit, and may ask for more of them later."""
    assert members.PROCESSES >= claims.MIN_PROCESSES
    run = tiny(seed_list=[1])
    path, before = run.results_dir / "tiny" / "step_cost.jsonl", []
    for processes in (1, 2):
        members.measure(run, "step_cost", processes)
        rows = record.read_jsonl(path)
        assert sorted({row["process"] for row in rows}) == list(range(processes))
        assert rows[: len(before)] == before
        before = rows
    assert set(tables.load(run.results_dir).costs) >= {"process", "seconds", "seconds_baseline"}


def test_exit_code_0_with_another_attempts_sentinel_is_no_success(tiny, pool_socket, monkeypatch):
    run = tiny(seed_list=[1])
    members.prepare_inputs(run)
    job = members.submit(run)
    members.watch(job)
    task = members._member_task(config.members(run)[0], job.folders["default-s1"])
    record.write_json(task.folder / "done.json", {"status": "completed", "nonce": "of yesterday"})
    assert not task.check()


def test_intervals_of_log_lines_and_saves_train_nothing_again(tiny, undisturbed, pool_socket, tmp_path):
    """The log's lines and what a resume goes on from: the best checkpoint is saved whenever it is found."""
    finished(members.submit(tiny(seed_list=[1])))
    other = {**TINY["training"], "save_steps": None, "logging_steps": 3}
    run = tiny(seed_list=[1], training=other)
    assert members.submit(run).tasks == {}
    fresh = run.model_copy(update={"results_dir": tmp_path / "afresh"})
    job = members.submit(fresh)
    finished(job)
    assert content(job.folders["default-s1"]) == undisturbed
    assert "step 3/12" in job.tasks["default-s1"].log.read_text()
    (member,) = config.members(tiny(seed_list=[1], training={**other, "eval_steps": 3}))
    assert members.stale(member, job.folders["default-s1"]) == "training.eval_steps 4 -> 3", (
        "it decides which is the best"
    )


@pytest.mark.parametrize(
    ("visible", "gpus", "kind"),
    [(["H100"], 1, "H100"), (["H100", "A100", "H100"], 1, "A100,H100"), (["H100"], 0, "cpu"), ([], 1, "cpu")],
)
def test_a_key_says_what_a_member_trains_on(tiny, monkeypatch, visible, gpus, kind):
    monkeypatch.setattr(keys, "visible_gpus", lambda: [types.SimpleNamespace(name=name) for name in visible])
    keys.device_kind.cache_clear()
    try:
        (member,) = config.members(tiny(seed_list=[1], compute={"gpus": gpus}))
        assert keys.member_key(member)["device"].startswith(kind)
        assert ("cpu" in keys.member_key(member)["device"]) == (kind == "cpu")
        assert (
            members.inputs_folder(member.run) != members.inputs_folder(tiny(compute={"gpus": 1 - gpus})) or not visible
        )
    finally:
        keys.device_kind.cache_clear()


def test_a_key_follows_code_without_docstrings(tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "ROOT", tmp_path)
    package = tmp_path / "lib"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text('"""Says one."""\nX = 1\n')
    (package / "outer.py").write_text("from lib import inner\n\ndef f():\n    '''doc'''\n    return inner.X\n")
    before = keys.modules("lib.outer")
    assert set(before) == {"lib.inner", "lib.outer"}
    (package / "inner.py").write_text('"""Says something else now."""\n\n# and a comment\nX = 1\n')
    assert keys.modules("lib.outer") == before
    (package / "inner.py").write_text('"""Says one."""\nX = 22\n')
    after = keys.modules("lib.outer")
    assert after["lib.inner"] != before["lib.inner"]
    assert after["lib.outer"] == before["lib.outer"]


def test_without_slots_members_run_in_this_process(tiny, monkeypatch):
    monkeypatch.setenv("STUDY_SLOTS", "0")
    run = tiny(seed_list=[1], training={**TINY["training"], "max_steps": 2})
    members.prepare_inputs(run)
    threads, train, before = [], work.train, torch.get_num_threads()
    monkeypatch.setattr(work, "train", lambda argument: (threads.append(torch.get_num_threads()), train(argument)))
    torch.set_num_threads(3)
    try:
        job = members.submit(run)
        assert (threads, torch.get_num_threads()) == ([run.compute.threads], 3)  # its sums depend on them: see its key
    finally:
        torch.set_num_threads(before)
    assert [t.state for t in job.tasks.values()] == ["succeeded"]
    assert members.collect(job)[0]["status"] == "completed"


def test_a_kernel_with_a_gpu_trains_no_member_that_asks_for_none(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_SLOTS", "0")
    monkeypatch.setattr(members, "CACHE", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run = tiny(seed_list=[1])
    record.write_json(members.inputs_folder(run) / "complete.json", {"study": run.study})
    with pytest.raises(StudyError, match="compute.gpus: 0, and this kernel"):
        members.submit(run)
    assert not (run.results_dir / "tiny" / "members" / "default-s1" / "metrics.json").exists()


def test_a_member_needs_a_pool_that_lives(tiny, monkeypatch):
    monkeypatch.setenv("STUDY_POOL", "/nowhere/s")
    with pytest.raises(pool.PoolLost):
        pool.connect("/nowhere/s")


def test_members_that_ran_two_states_of_a_function_are_not_compared(tmp_path):
    for method, loss in (("dpo", "1"), ("td_dpo", "2")):
        folder = tmp_path / method / "members" / "default-s1"
        spec = {"run_id": method, "study": "td_dpo", "cell": {}, "cell_name": "default", "seed": 1}
        record.write_json(folder / "member.json", spec | {"config": {"method": method}})
        record.write_json(folder / "done.json", {"status": "completed", "run_id": method})
        code = {"lib.td_dpo.losses": {method: loss, "summary": "s"}}
        record.write_json(folder / "code.json", code)
    assert len(tables.load(tmp_path).members) == 2, "each ran its own loss, and the same of what they share"
    record.write_json(folder / "code.json", {"lib.td_dpo.losses": {"summary": "edited"}})
    with pytest.raises(StudyError, match="lib.td_dpo.losses summary"):
        tables.load(tmp_path)


def test_what_pilots_share_is_made_along_with_what_those_after_them_do(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(members, "prepare_inputs", lambda *runs: asked.extend(runs))
    blocks = [{"cells": [{"beta": 0.1}, {"beta": 0.2}], "pilot": True}]
    run = tiny(seed_list=[1, 2], pilot_seeds=[3], grid=blocks)
    done = next(m for m in config.members(run) if m.cell == {"loss.beta": 0.1})
    monkeypatch.setattr(members, "stale", lambda member, folder: "" if member.id == done.id else "no record")
    members.prepare_all(run)
    assert members.inputs_folder(asked[0]) == members.inputs_folder(done.run), "of which the notebook shows more"
    assert {each.dataset.split_seed for each in asked[1:]} == {1, 2, 3}


def test_progress_says_that_others_follow_while_pilots_train_beside_cells_that_are_done(tiny, monkeypatch):
    run, said = tiny(pilot_seeds=[3], grid=[{"cells": [{"beta": 0.3}]}, {"cells": [{"beta": 0.1}], "pilot": True}]), []
    monkeypatch.setattr(members, "_progress", lambda run, state: said.append(state["pilots"]))
    monkeypatch.setattr(members.pool, "wait_for", lambda *_: None)
    every = config.members(run)
    for training in ([m for m in every if m.pilot], [m for m in every if not m.pilot]):
        members.watch(members.Job(run, every, {}, {m.id: None for m in training}))
    assert said == [True, False]


def test_a_record_is_made_without_git_too(tiny, monkeypatch):
    monkeypatch.setenv("PATH", "")
    made = runs.provenance(tiny())
    assert (made["git_commit"], made["git_dirty"]) == (None, None)
    assert made["versions"]["torch"]
