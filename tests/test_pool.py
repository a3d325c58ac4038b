"""The pool: a slot per member, no orphans, one retry of a lost process and none of an exception."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from lib import pool, record


def task(tmp_path, name, target, check=lambda: True, **argument):
    return pool.Task(name=name, target=f"tests.faults:{target}", argument=argument, folder=tmp_path / name, check=check)


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_an_exception_is_not_retried_and_its_traceback_is_in_the_log(bare, tmp_path):
    job = task(tmp_path, "a", "fail", message="seven is not a prime of two")
    pool.start(job)
    pool.drive([job])
    assert (job.state, job.attempts) == ("failed", 1)
    assert "ValueError: seven is not a prime of two" in job.log.read_text()


def test_a_lost_process_is_started_once_more_and_then_given_up(bare, tmp_path):
    job = task(tmp_path, "a", "die", count=str(tmp_path / "count"))
    pool.start(job)
    pool.drive([job])
    assert (job.state, (tmp_path / "count").read_text()) == ("lost", "xx")


def test_exit_code_0_without_the_result_is_a_failure(bare, tmp_path):
    job = task(tmp_path, "a", "sleep", check=lambda: False, started=str(tmp_path / "pid"), seconds=0)
    pool.start(job)
    pool.drive([job])
    assert job.state == "failed"


def test_no_more_run_at_once_than_there_are_slots_and_none_of_one_name(bare, tmp_path):
    jobs = [task(tmp_path, n, "sleep", started=str(tmp_path / f"{n}{i}"), seconds=0.4) for i, n in enumerate("abcaa")]
    for job in jobs:
        pool.start(job)
    most, names = [], []

    def look():
        running = [j for j in jobs if j.state == "running"]
        most.append(len(running))
        names.append(sorted(j.name for j in running))

    pool.drive(jobs, on_change=lambda _: look())
    assert max(most) == 2
    assert all(len(set(n)) == len(n) for n in names)
    assert [j.state for j in jobs] == ["succeeded"] * 5


def test_a_client_that_closes_takes_its_member_along(bare, tmp_path):
    job = task(tmp_path, "a", "sleep", started=str(tmp_path / "pid"), seconds=60)
    pool.start(job)
    wait_for((tmp_path / "pid").exists)
    wait_for(lambda: (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    pool.stop([job])
    wait_for(lambda: gone(pid), 5)


@pytest.mark.parametrize("how", ["kill the server", "kill the owner"])
def test_no_orphan_outlives_server_or_owner(tmp_path, how):
    script = (
        "import sys; from lib import pool; from tests.test_pool import task; import os, pathlib, time\n"
        "p = pool.Pool(1, bare=True); os.environ['STUDY_POOL'] = p.socket; t = pathlib.Path(sys.argv[1])\n"
        "j = task(t, 'a', 'sleep', started=str(t / 'pid'), seconds=60); pool.start(j)\n"
        "(t / 'server').write_text(str(p.process.pid)); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    try:
        wait_for(
            lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() and (tmp_path / "server").read_text(), 20
        )
        member, server = int((tmp_path / "pid").read_text()), int((tmp_path / "server").read_text())
        os.kill(server if how == "kill the server" else owner.pid, 9)
        wait_for(lambda: gone(member), 5)
        if how == "kill the owner":
            wait_for(lambda: gone(server), 5)
    finally:
        owner.kill()
        owner.wait()


def test_with_gpus_members_are_spawned_each_on_its_slots_own(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "gpus", lambda: ["3", "5"])
    own = pool.Pool(bare=True)
    monkeypatch.setenv("STUDY_POOL", own.socket)
    try:
        assert own.slots == 2
        first = task(tmp_path, "a", "sleep", started=str(tmp_path / "pid"), seconds=1.5)
        pool.start(first)
        wait_for((tmp_path / "pid").exists)
        second = task(tmp_path, "b", "note_environment", path=str(tmp_path / "seen"))
        pool.start(second)
        pool.drive([first, second])
        assert [first.state, second.state] == ["succeeded", "succeeded"]
        assert (tmp_path / "seen").read_text() == "5 2.0"
    finally:
        own.close()


def test_what_needs_several_gpus_gets_them_all_and_is_not_starved(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "gpus", lambda: ["0", "4", "7"])
    own = pool.Pool(bare=True)
    monkeypatch.setenv("STUDY_POOL", own.socket)
    try:
        first = task(tmp_path, "a", "sleep", started=str(tmp_path / "pid"), seconds=1)
        pool.start(first)
        wait_for((tmp_path / "pid").exists)
        wide, narrow = (task(tmp_path, n, "note_environment", path=str(tmp_path / f"{n}.txt")) for n in ("wide", "narrow"))
        wide.slots = 3
        order = []
        for job in (wide, narrow):
            pool.start(job)
        pool.drive([first, wide, narrow], on_change=lambda t: order.append((t.name, t.state)))
        assert (tmp_path / "wide.txt").read_text() == "0,4,7 2.0"
        assert order.index(("wide", "running")) < order.index(("narrow", "running"))
        too_wide = task(tmp_path, "huge", "note_environment", path=str(tmp_path / "huge.txt"))
        too_wide.slots = 8  # more than there are: it runs with what there is, and says so itself (lib/distributed.py)
        pool.start(too_wide)
        pool.drive([too_wide])
        assert too_wide.state == "succeeded"
    finally:
        own.close()


def test_the_pool_gets_no_secret_unless_it_is_told_to_keep_them(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "abcdefgh12345678")
    for keep in (False, True):
        own = pool.Pool(1, bare=True, keep_secrets=keep)
        assert ("WANDB_API_KEY" in psutil.Process(own.process.pid).environ()) is keep
        own.close()


def test_secrets_are_replaced_by_their_names(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "s3cr3t-value-1")
    assert record.redact("Bearer s3cr3t-value-1!") == "Bearer [MY_SERVICE_TOKEN]!"
