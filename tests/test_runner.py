"""The runner: what counts as done, what a person is told, and that kills, locks and full disks lose nothing."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml

from lib import cli, plan, record, runner, show
from lib.errors import MissingError, StudyError
from tests.conftest import ROOT, TINY

SENTINEL = "from lib import runs; runs.finish(folder, {'ok': 1}, nonce)"


def step_of(tmp_path, *cells):
    """A notebook with these code cells as a step of its own."""
    nb = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    )
    nb.cells = [
        nbformat.v4.new_code_cell("folder, nonce, mode, scale = None, None, None, None", metadata={"tags": ["parameters"]}),
        *map(nbformat.v4.new_code_cell, cells),
    ]
    path, folder = tmp_path / "notebook.ipynb", tmp_path / "run"
    nbformat.write(nb, path)
    return plan.Step(
        "analysis",
        "td_dpo",
        "comparison",
        path,
        folder,
        {"folder": str(folder), "mode": "full", "scale": "laptop"},
        "key",
        "never run",
    )


def outcome(step, **options):
    """Run the step through Runner.execute with the pool in STUDY_POOL."""
    mine = runner.Runner([step], 1, **options)
    mine.ensure_pool = lambda: None
    mine.execute(step)
    return mine


def test_a_notebook_that_does_all_is_recorded(bare, tmp_path):
    step = step_of(tmp_path, SENTINEL)
    assert outcome(step).state[id(step)] == "succeeded"
    assert step.output.exists()
    assert step.output.with_suffix(".html").exists()
    assert record.read_json(step.folder / "status.json")["status"] == "succeeded"
    assert not runner.partial(step).exists()


@pytest.mark.parametrize(("cells", "told"), [
    (["raise ValueError('no such thing')", SENTINEL], "no such thing"),
    (["import sys; sys.exit(0)", SENTINEL], "never ran"),
    (["import os; os._exit(0)", SENTINEL], "died"),
    (["import os, signal; os.kill(os.getpid(), signal.SIGKILL)", SENTINEL], "died"),
    (["import time; time.sleep(30)", SENTINEL], "timed out"),
    (["raise KeyboardInterrupt", SENTINEL], "KeyboardInterrupt"),
    (["1"], "no sentinel"),
    (["from lib import runs; runs.finish(folder, {}, 'another nonce')"], "no sentinel"),
    ([SENTINEL, "open(folder + '/metrics.json', 'w').write('{')"], "metrics.json"),
])  # fmt: skip
def test_what_papermill_lets_pass_is_never_a_success(bare, tmp_path, cells, told):
    step = step_of(tmp_path, *cells)
    mine = outcome(step, cell_timeout=2)
    assert mine.state[id(step)] == "failed"
    assert told.lower() in json.dumps(mine.errors[id(step)]).lower()
    assert record.read_json(step.folder / "status.json")["status"] == "failed"
    assert not step.output.exists()
    assert not step.output.with_suffix(".html").exists()
    assert runner.partial(step).exists(), "what it did is kept to be looked at"
    assert mine.errors[id(step)]["again"] == "./run_all.sh full --scale laptop --study td_dpo"


def test_an_interrupt_signal_in_mid_cell_is_no_success(bare, tmp_path):
    step = step_of(
        tmp_path,
        f"from pathlib import Path; import os, time; Path('{tmp_path}/pid').write_text(str(os.getpid())); time.sleep(20)",
        SENTINEL,
    )

    def interrupt():
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.02)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert outcome(step).state[id(step)] == "failed"
    assert not step.output.exists()


def test_a_killed_kernel_gets_one_more_try(bare, tmp_path):
    flag = f"import os, pathlib\nflag = pathlib.Path('{tmp_path}/killed')\n"
    once = flag + "if not flag.exists(): flag.touch(); os.kill(os.getpid(), 9)"
    step = step_of(tmp_path, once, SENTINEL)
    assert outcome(step).state[id(step)] == "succeeded"


def test_no_secret_in_a_notebook(bare, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "abcd-efgh-1234")
    step = step_of(tmp_path, "print('key', 'abcd-' + 'efgh-1234'); raise ValueError('with abcd-' + 'efgh-1234')", SENTINEL)
    mine = outcome(step)
    assert "abcd-efgh-1234" not in json.dumps(mine.errors[id(step)])
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name != "notebook.ipynb":
            assert "abcd-efgh-1234" not in path.read_text(errors="replace"), path
    assert "[SOME_API_KEY]" in runner.partial(step).read_text()


# ------------------------------------------------------------------------------------------------ durable writes


@pytest.mark.parametrize(
    "write",
    [
        lambda p: record.write_json(p, {"new": 1}),
        lambda p: record.write_jsonl(p, [{"new": 1}]),
        lambda p: record.write_text(p, "new"),
    ],
    ids=["json", "jsonl", "text"],
)
@pytest.mark.parametrize("fault", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_part_of_the_new(tmp_path, monkeypatch, write, fault):
    path = tmp_path / "file"
    path.write_text("old")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if fault == "write":
        monkeypatch.setattr(os, "fdopen", full)
    else:
        monkeypatch.setattr(os, fault, full)
    with pytest.raises(OSError, match="No space"):
        write(path)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_torn_last_line_is_dropped_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [r["step"] for r in record.read_jsonl(path)] == [1, 2]
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(StudyError, match="line 2"):
        record.read_jsonl(path)


def test_json_never_holds_nan(tmp_path):
    record.write_json(tmp_path / "a.json", {"x": float("nan"), "y": [float("inf"), 1.5]})
    assert (tmp_path / "a.json").read_text().count("null") == 2
    assert record.read_json(tmp_path / "a.json") == {"x": None, "y": [None, 1.5]}


def test_two_runners_at_once(tmp_path):
    with runner.locked(tmp_path / "outputs"):
        code = "import sys; from pathlib import Path; from lib import runner\nwith runner.locked(Path(sys.argv[1])): pass"
        second = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "outputs")], capture_output=True, text=True, cwd=ROOT
        )
        assert second.returncode == 1
        assert f"another runner works here (process {os.getpid()})" in second.stderr
    with runner.locked(tmp_path / "outputs"):
        pass


def test_status_of_a_runner_that_is_gone_is_interrupted(tmp_path, capsys):
    root = tmp_path / "outputs"
    record.write_json(root / "td_dpo" / "tiny" / "status.json", {"run_id": "tiny", "study": "td_dpo", "status": "running"})
    show.status(root)
    assert "interrupted" in capsys.readouterr().out
    with runner.locked(root):
        show.status(root)
        assert "running" in capsys.readouterr().out
    show.status(root)
    assert "its runner is gone" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "code", "told", "not_told"), [
    (OSError(errno.ENOSPC, "No space left on device"), 3, "writing a file: No space left on device", "None"),
    (OSError(errno.EROFS, "Read-only file system", "/o/x"), 3, "/o/x: Read-only file system", "None"),
    (OSError(errno.EMFILE, "Too many open files"), 1, "Too many open files", "space left"),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), 1, "ConnectionResetError", "permissions"),
    (OSError("no number at all"), 1, "no number at all", "None"),
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_an_error_of_the_system_says_what_it_is(monkeypatch, capsys, error, code, told, not_told):
    def fails(*_):
        raise error

    monkeypatch.setattr(cli, "run", fails)
    assert cli.main(["plan"]) == code
    said = capsys.readouterr().err
    assert told in said
    assert not_told not in said


def test_a_number_is_not_given_twice(tmp_path):
    for number in (1, 2, 10):
        (tmp_path / f"run.{number}.failed.ipynb").touch()
    (tmp_path / "run.partial.ipynb").touch()
    (tmp_path / "run.1.failed.ipynb").unlink()
    assert record.next_number(tmp_path, "run.*.failed.ipynb") == 11
    assert record.next_number(tmp_path, "sweep.*.failed.ipynb") == 1
    assert record.next_number(tmp_path / "none", "run.*") == 1


def test_outputs_that_cannot_be_written(tmp_path):
    (tmp_path / "outputs").write_text("a file where the folder should be")
    with pytest.raises(MissingError, match="cannot write there"), runner.locked(tmp_path / "outputs" / "laptop-full"):
        pass


def test_exit_codes_before_anything_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "OUTPUTS", tmp_path / "outputs")
    folder = tmp_path / "params"
    folder.mkdir()
    (folder / "bad.yaml").write_text(yaml.safe_dump({**TINY, "trainng": {}}))
    assert cli.main(["full", "--scale", "laptop", "--params", str(folder)]) == 2
    assert "did you mean training" in capsys.readouterr().err
    assert cli.main(["full", "--scale", "laptop", "--set", "trainng.x=1"]) == 2
    assert cli.main(["full", "--scale", "laptop", "--study", "td_dop"]) == 2
    assert cli.main(["full", "--study", "td_dpo"]) == 3, "this machine has no GPU, no hub and no W&B key"
    told = capsys.readouterr().err
    assert "GPU" in told
    assert "nothing was started" in told
    assert not (tmp_path / "outputs").exists()


# ------------------------------------------------------------------------------- the whole command, killed in every part


def started(tmp_path, *arguments):
    environment = {**os.environ, "STUDY_OUTPUTS": str(tmp_path / "outputs")}
    environment.pop("STUDY_POOL", None)
    command = ["full", "--scale", "laptop", "--params", str(tmp_path / "params"), "--jobs", "1", *arguments]
    with open(tmp_path / "out.txt", "a") as out:
        return subprocess.Popen([sys.executable, "-m", "lib", *command], env=environment, cwd=ROOT, stdout=out,
                                stderr=subprocess.STDOUT, start_new_session=True)


def wait_for(condition, process, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the runner ended early"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def steps_done(member: Path) -> int:
    return len([r for r in record.read_jsonl(member / "history.jsonl") if "loss" in r])


def test_runner_kernel_and_forkserver_killed_then_resumed_to_the_same_record(tmp_path):
    """One study, four lives: its fork server is killed, its kernel, its runner; each time the command goes on from the
    last checkpoint, and the record in the end is that of a run that nothing happened to."""
    for name in ("killed", "calm"):
        path = tmp_path / name / "params" / "td_dpo" / "laptop" / "tiny.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(
            yaml.safe_dump({**TINY, "training": {**TINY["training"], "max_steps": 400, "eval_steps": 100, "save_steps": 10}})
        )
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    undisturbed = started(calm)
    run = killed / "outputs" / "laptop-full" / "td_dpo" / "tiny"
    member = run / "members" / "default-s1"
    first = started(killed)
    wait_for(lambda: steps_done(member) >= 15, first)
    (server,) = [p for p in psutil.Process(first.pid).children() if "forkserver" in " ".join(p.cmdline())]
    family = psutil.Process(first.pid).children(recursive=True)
    server.kill()  # the runner starts another pool and the notebook once more
    wait_for(lambda: steps_done(member) >= 120, first)
    os.kill(record.read_json(run / "progress.json")["kernel"], 9)  # the second loss: this run fails
    assert first.wait(60) == 1
    assert record.read_json(run / "status.json")["status"] == "failed"
    second = started(killed)
    wait_for(lambda: steps_done(member) >= 220 or (member / "done.json").exists(), second)
    family += psutil.Process(second.pid).children(recursive=True)
    second.kill()
    second.wait()
    deadline = time.monotonic() + 5
    while [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)
    last = started(killed)
    assert last.wait(120) == 0, (killed / "out.txt").read_text()
    assert undisturbed.wait(120) == 0, (calm / "out.txt").read_text()
    for name in ("default-s1", "default-s2"):
        mine, theirs = member.parent / name, calm / "outputs" / "laptop-full" / "td_dpo" / "tiny" / "members" / name
        for file in ("history.jsonl", "predictions.jsonl"):
            assert (mine / file).read_bytes() == (theirs / file).read_bytes()
        for weights in (theirs / "checkpoints").rglob("model.safetensors"):
            assert (mine / weights.relative_to(theirs)).read_bytes() == weights.read_bytes()
    assert not list(killed.rglob(".*.tmp"))
