"""The pool: a slot per member, no orphans, one retry of a lost process and none of an exception."""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path

import psutil
import pytest

from lib import record
from lib.run import pool
from lib.run.pool import next_in_turn
from tests.conftest import ROOT, gone, text_of, until


def task(tmp_path, name, target, check=lambda: True, **argument):
    return pool.Task(name=name, target=f"tests.faults:{target}", argument=argument, folder=tmp_path / name, check=check)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_as_many_slots_as_this_process_may_use_cores():
    mine = min(os.sched_getaffinity(0))
    one = f"import os; os.sched_setaffinity(0, [{mine}]); from lib.run import pool; print(pool.cores())"
    reported = subprocess.run([sys.executable, "-c", one], cwd=ROOT, capture_output=True, text=True, check=True)
    assert reported.stdout == "1\n"


def test_an_exception_is_not_retried_and_its_traceback_is_in_the_log(bare, tmp_path):
    job = task(tmp_path, "a", "fail", message="seven is not a prime of two")
    pool.start(job)
    pool.wait_for([job])
    assert (job.state, job.attempts) == ("failed", 1)
    assert "ValueError: seven is not a prime of two" in job.log.read_text()


def test_a_lost_process_is_started_once_more_and_then_given_up(bare, tmp_path):
    job = task(tmp_path, "a", "die", count=str(tmp_path / "count"))
    pool.start(job)
    pool.wait_for([job])
    assert (job.state, (tmp_path / "count").read_text()) == ("lost", "xx")


def test_exit_code_0_without_the_result_is_a_failure(bare, tmp_path):
    job = task(tmp_path, "a", "sleep", check=lambda: False, started=str(tmp_path / "pid"), seconds=0)
    pool.start(job)
    pool.wait_for([job])
    assert job.state == "failed"


def test_no_more_run_at_once_than_there_are_slots_and_none_of_one_name(bare, tmp_path):
    """By what the children say themselves: what the pool tells of two of them may be read in another order."""
    said, go = tmp_path / "said", tmp_path / "go"
    jobs = [task(tmp_path, n, "hold", who=n, said=str(said), go=str(go), seconds=0.2) for n in "abcaa"]
    for job in jobs:
        pool.start(job)
    pool.wait_for(jobs, on_tick=lambda: text_of(said).count("begun") >= 2 and go.touch())
    running, most = [], []
    for word, name in map(str.split, said.read_text().splitlines()):
        (running.append if word == "begun" else running.remove)(name)
        assert len(set(running)) == len(running), "two of one name"
        most.append(len(running))
    assert max(most) == 2
    assert [j.state for j in jobs] == ["succeeded"] * 5


def test_a_client_that_closes_takes_its_member_along(bare, tmp_path):
    job = task(tmp_path, "a", "sleep", started=str(tmp_path / "pid"), seconds=3600)
    pool.start(job)
    pid = int(until(lambda: text_of(tmp_path / "pid")))
    pool.stop([job])
    until(lambda: gone(pid))


@pytest.mark.parametrize("how", ["kill the server", "kill the owner"])
def test_no_orphan_outlives_server_or_owner(tmp_path, how):
    script = (
        "import sys; from lib.run import pool; from tests.test_pool import task; import os, pathlib, time\n"
        "p = pool.Pool(1, bare=True); os.environ['STUDY_POOL'] = p.socket; t = pathlib.Path(sys.argv[1])\n"
        "j = task(t, 'a', 'sleep', started=str(t / 'pid'), seconds=3600); pool.start(j)\n"
        "(t / 'server').write_text(str(p.process.pid)); time.sleep(3600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    try:
        member, server = (int(until(lambda n=n: text_of(tmp_path / n), process=owner)) for n in ("pid", "server"))
        os.kill(server if how == "kill the server" else owner.pid, 9)
        until(lambda: gone(member))
        if how == "kill the owner":
            until(lambda: gone(server))
    finally:
        owner.kill()
        owner.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_a_child_that_holds_the_interpreters_lock_goes_with_its_server(tmp_path, monkeypatch):
    own = pool.Pool(1, bare=True)
    monkeypatch.setenv("STUDY_POOL", own.socket)
    job = task(tmp_path, "a", "hold_the_lock", started=str(tmp_path / "pid"))
    pool.start(job)
    pid = int(until(lambda: text_of(tmp_path / "pid")))
    time.sleep(0.3)  # it is in the call by now; where it is not yet, it must go as well
    own.process.kill()
    until(lambda: gone(pid))
    own.close()


def test_with_gpus_members_are_spawned_each_on_its_slots_own(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "gpus", lambda: ["3", "5"])
    own = pool.Pool(bare=True)
    monkeypatch.setenv("STUDY_POOL", own.socket)
    try:
        assert own.slots == 2
        said, go = tmp_path / "said", tmp_path / "go"
        first = task(tmp_path, "a", "hold", who="a", said=str(said), go=str(go))
        pool.start(first)
        until(said.exists)
        second = task(tmp_path, "b", "note_environment", path=str(tmp_path / "seen"))
        pool.start(second)
        pool.wait_for(
            [first, second], on_change=lambda t: t is second and t.ended and go.touch()
        )  # the first has its slot still
        assert [first.state, second.state] == ["succeeded", "succeeded"]
        assert (tmp_path / "seen").read_text() == "5 2.0"
    finally:
        own.close()


def test_who_asks_for_no_gpu_is_shown_none(tmp_path, monkeypatch):
    """compute.gpus: 0 means the CPU, also where a GPU is there: its numbers and its key are a CPU's."""
    monkeypatch.setattr(pool, "gpus", lambda: ["3", "5"])
    own = pool.Pool(bare=True)
    monkeypatch.setenv("STUDY_POOL", own.socket)
    try:
        job = task(tmp_path, "a", "note_environment", path=str(tmp_path / "seen"))
        job.cpu = True
        pool.start(job)
        pool.wait_for([job])
        assert (tmp_path / "seen").read_text() == " 2.0"
    finally:
        own.close()


def test_turns_are_taken_in_order_and_by_one_of_a_name():
    def request(name, slots=1):
        return {"name": name, "slots": slots}

    a, again, b, wide = request("a"), request("a"), request("b"), request("wide", 2)
    assert next_in_turn([a, again, b], 3, 3, set()) is a
    assert next_in_turn([again, b], 2, 3, {"a"}) is b, "one of its name is at work"
    assert next_in_turn([wide, b], 1, 3, {"a"}) is None, "what needs two waits at the head, and holds up what follows"
    assert next_in_turn([wide, b], 2, 3, {"a"}) is wide
    assert next_in_turn([request("huge", 8)], 3, 3, set())["name"] == "huge", "more than there are: all there are"
    assert next_in_turn([a, b], 0, 3, set()) is None


def test_what_needs_several_gpus_gets_them_all_and_is_not_starved(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "gpus", lambda: ["0", "4", "7"])
    own = pool.Pool(bare=True)
    monkeypatch.setenv("STUDY_POOL", own.socket)
    try:
        first = task(tmp_path, "a", "sleep", started=str(tmp_path / "pid"), seconds=1)
        pool.start(first)
        until((tmp_path / "pid").exists)
        wide, narrow = (
            task(tmp_path, n, "note_environment", path=str(tmp_path / f"{n}.txt")) for n in ("wide", "narrow")
        )
        wide.slots = 3
        order = []
        for job in (wide, narrow):
            pool.start(job)
        pool.wait_for([first, wide, narrow], on_change=lambda t: order.append((t.name, t.state)))
        assert (tmp_path / "wide.txt").read_text() == "0,4,7 2.0"
        assert order.index(("wide", "running")) < order.index(("narrow", "running"))
        too_wide = task(tmp_path, "huge", "note_environment", path=str(tmp_path / "huge.txt"))
        too_wide.slots = 8  # more than there are: it runs with what there is, and says so itself (lib/run/sharding.py)
        pool.start(too_wide)
        pool.wait_for([too_wide])
        assert too_wide.state == "succeeded"
    finally:
        own.close()


def test_the_pool_gets_no_secret_unless_it_is_told_to_keep_them(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "abcdefgh12345678")
    for keep in (False, True):
        own = pool.Pool(1, bare=True, keep_secrets=keep)
        assert ("WANDB_API_KEY" in psutil.Process(own.process.pid).environ()) is keep
        own.close()


def test_a_temporary_directory_too_deep_for_a_socket_is_not_used(tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    own = pool.Pool(1, bare=True)
    assert own.alive()
    assert own.folder.startswith("/tmp/study-pool-")
    own.close()
    assert not folders(deep)


@pytest.fixture
def short():
    """A temporary directory whose name leaves room for a socket's, wherever pytest has its own."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        yield Path(folder)


def folders(where):
    return sorted(where.glob("study-pool-*"))


def test_a_server_that_ends_before_it_listens_is_not_waited_for(short, monkeypatch):
    (short / "sitecustomize.py").write_text("import os; os._exit(3)")
    monkeypatch.setattr(pool, "ROOT", short)
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    with pytest.raises(pool.PoolLost, match="did not start"):
        pool.Pool(1, bare=True)
    assert not folders(short)


@pytest.mark.parametrize("how", ["the owner", "the owner, then the server"])
def test_a_killed_owner_leaves_no_folder_in_the_temporary_directory(short, monkeypatch, how):
    """The server removes its folder when its owner goes; where it is killed too, the next pool that starts does."""
    monkeypatch.setenv("TMPDIR", str(short))
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    script = (
        "from lib.run import pool; import os, time\n"
        "p = pool.Pool(1, bare=True); open('server', 'w').write(str(p.process.pid)); time.sleep(3600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], cwd=short, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        server = int(until(lambda: text_of(short / "server"), process=owner))
        assert len(folders(short)) == 1
        if "server" in how:
            os.kill(server, 19)  # stopped: it cannot clean up before it is killed
        owner.kill()
        owner.wait()
        if "server" in how:
            os.kill(server, 9)
            until(lambda: gone(server))
            assert len(folders(short)) == 1
            until(lambda: pool.remove_stale_folders() or not folders(short))
            own = pool.Pool(1, bare=True)
            assert folders(short) == [Path(own.folder)]
            another = pool.Pool(1, bare=True)
            assert len(folders(short)) == 2, "a pool that lives is not swept"
            own.close()
            another.close()
        until(lambda: not folders(short))
    finally:
        owner.kill()
        owner.wait()


def test_a_server_that_still_imports_goes_with_its_owner(short):
    """Its first import never ends: when it goes, it goes in the middle of it."""
    (short / "first").mkdir()
    (short / "first" / "numpy.py").write_text(
        "import os, time\nopen(os.environ['IMPORTING'], 'w').close(); time.sleep(3600)"
    )
    script = (
        "from lib.run import pool; import time\n"
        "p = pool.Pool(1); open('server', 'w').write(str(p.process.pid)); time.sleep(3600)"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": f"{short / 'first'}{os.pathsep}{ROOT}",
        "TMPDIR": str(short),
        "IMPORTING": str(short / "importing"),
        "CUDA_VISIBLE_DEVICES": "",
    }  # with GPUs nothing is imported
    owner = subprocess.Popen([sys.executable, "-c", script], cwd=short, env=environment)
    try:
        server = int(until(lambda: text_of(short / "server"), process=owner))
        until((short / "importing").exists, process=owner)
    finally:
        owner.kill()
        owner.wait()
    until(lambda: gone(server))
    assert not folders(short)


# ---------------------------------------------------------------------------------------------- secrets and terminals

SECRET = """
PGPASSWORD APIKEY TOKEN SECRET PASSWORD KEY GITHUB_PAT WANDB_API_KEY_2 WANDB_API_KEY HF_TOKEN AWS_CREDENTIALS
GOOGLE_APPLICATION_CREDENTIALS SLACK_WEBHOOK SLACK_WEBHOOK_URL MYSQL_PWD DB_PASS openai_api_key AWS_SECRET_ACCESS_KEY
AWS_ACCESS_KEY_ID SECRET_KEY_BASE SSH_PASSPHRASE NPM_AUTHTOKEN PRIVATE_KEY SESSION_COOKIE AZURE_CLIENT_SECRET
"""
NO_SECRET = """
KEYBOARD_LAYOUT TOKENIZERS_PARALLELISM SSH_AUTH_SOCK KEYMAP PATH PWD OLDPWD HOME MONKEY KEYRING_BACKEND
COMPATIBLE PASSENGERS SSL_KEY_FILE KEY_BINDINGS DBUS_SESSION_BUS_ADDRESS XDG_SESSION_ID STUDY_POOL TOKEN_LIMIT
"""


def test_which_variables_are_secrets():
    assert [name for name in SECRET.split() if not record.is_secret(name, "plain-value")] == []
    assert [name for name in NO_SECRET.split() if record.is_secret(name, "plain-value")] == []
    for value in (
        "postgres://me:hunter22hunter@db/x",
        "http://user:pa55word@proxy:3128",
        "https://ghp_abcdefgh@github.com/x",
    ):
        assert record.is_secret("DATABASE_URL", value)
        assert record.is_secret("HTTPS_PROXY", value)
    for value in ("http://proxy:3128", "https://host/path@2", "user@host", "file:///a@b"):
        assert not record.is_secret("HTTPS_PROXY", value)


@pytest.mark.parametrize(("name", "value", "text"), [
    ("MY_SERVICE_TOKEN", "s3cr3t-value-1", "Bearer s3cr3t-value-1!"),
    ("DATABASE_URL", "postgres://me:hunt%40r22x@db/x", "could not log in with hunt@r22x!"),
    ("DATABASE_URL", "postgres://me:hunt%40r22x@db/x", "connecting to postgres://me:hunt%40r22x@db/x!"),
    ("PASSWORD", 'with "quotes" \\', json.dumps({"a": 'with "quotes" \\'})),
    ("PASSWORD", "a/b c+d=e~f", "https://h/?p=" + urllib.parse.quote_plus("a/b c+d=e~f")),
    ("DEPLOY_KEY", "-----BEGIN KEY-----\nAAAAbbbbCCCC\n-----END KEY-----", "line AAAAbbbbCCCC of it"),
])  # fmt: skip
def test_secrets_are_replaced_by_their_names_however_they_are_written(monkeypatch, name, value, text):
    monkeypatch.setenv(name, value)
    assert f"[{name}]" in record.redact(text)
    assert all(
        part not in record.redact(text) for part in (value, "hunt@r22x", "hunt%40r22x", "AAAAbbbb", "quotes", "c%2Bd")
    )


@pytest.mark.parametrize("devices", [[], ["0"]], ids=["forked", "spawned"])
def test_what_a_child_writes_to_its_log_holds_no_secret_and_nothing_that_acts_on_a_terminal(
    tmp_path, monkeypatch, devices
):
    """Through Python, past Python, in two pieces, from a grandchild, and right before a kill. The secret is one of the
    pool's owner, whose environment the child does not even have."""
    secret = "abcd-efgh-1234"
    monkeypatch.setenv("OWNERS_TOKEN", secret)
    monkeypatch.setattr(pool, "gpus", lambda: devices)
    own = pool.Pool(1, bare=True)
    monkeypatch.setenv("STUDY_POOL", own.socket)
    for target in ("say", "say_and_die"):
        job = task(tmp_path, target, target, secret=secret)
        pool.start(job)
        pool.wait_for([job])
        reported = job.log.read_text()
        assert secret not in reported
        assert reported.count("[OWNERS_TOKEN]") == 4 * job.attempts
        assert "\x1b" not in reported
        assert "\\x1b[2Jgone" in reported
        assert "the last words" in reported
    own.close()


def test_a_log_that_cannot_be_written_does_not_stop_a_member(bare, tmp_path):
    (tmp_path / "a").write_text("a file where the member's folder should be")
    job = task(tmp_path, "a", "sleep", started=str(tmp_path / "pid"), seconds=0)
    pool.start(job)
    pool.wait_for([job])
    assert job.state == "succeeded"


def test_members_start_in_the_order_in_which_they_were_submitted(bare, tmp_path):
    said = tmp_path / "said"
    jobs = [task(tmp_path, f"{i:02}", "hold", who=f"{i:02}", said=str(said), go=str(tmp_path)) for i in range(20)]
    for job in jobs:
        pool.start(job)
    pool.wait_for(jobs)
    begun = [name for word, name in map(str.split, said.read_text().splitlines()) if word == "begun"]
    # one that hangs in its slot lets the others pass; none begins long before its turn
    assert sorted(begun) == [f"{i:02}" for i in range(20)]
    assert all(int(name) - place < 5 for place, name in enumerate(begun)), "but for two slots"
