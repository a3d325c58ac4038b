"""The runner: what counts as done, what a person is reported, and that kills, locks and full disks lose nothing."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import types

import nbformat
import pytest
import yaml
from filelock import FileLock

from lib import config, record
from lib.errors import MissingError, StudyError
from lib.run import cli, plan, progress, runner
from lib.run.cli import parser
from tests.conftest import PATIENCE, ROOT, TINY, text_of, until
from tests.faults import SITECUSTOMIZE

SENTINEL = "from lib.run import runs; runs.finish(folder, {'ok': 1}, nonce)"


def step_of(tmp_path, *cells):
    """A notebook with these code cells as a step of its own."""
    nb = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    )
    nb.cells = [
        nbformat.v4.new_code_cell(
            "folder, nonce, mode, scale = None, None, None, None", metadata={"tags": ["parameters"]}
        ),
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
    outcome(step)
    assert step.state == "succeeded"
    assert step.output.exists()
    assert step.output.with_suffix(".html").exists()
    assert record.read_json(step.folder / "status.json")["status"] == "succeeded"
    assert not runner.partial(step).exists()


@pytest.mark.parametrize(("cells", "reported"), [
    (["raise ValueError('no such thing')", SENTINEL], "no such thing"),
    (["import sys; sys.exit(0)", SENTINEL], "never ran"),
    (["import os; os._exit(0)", SENTINEL], "died"),
    (["import os, signal; os.kill(os.getpid(), signal.SIGKILL)", SENTINEL], "died"),
    (["raise KeyboardInterrupt", SENTINEL], "KeyboardInterrupt"),
    (["1"], "no sentinel"),
    (["from lib.run import runs; runs.finish(folder, {}, 'another nonce')"], "no sentinel"),
    ([SENTINEL, "open(folder + '/metrics.json', 'w').write('{')"], "metrics.json"),
])  # fmt: skip
def test_what_papermill_lets_pass_is_never_a_success(bare, tmp_path, cells, reported):
    step = step_of(tmp_path, *cells)
    outcome(step)
    assert step.state == "failed"
    assert reported.lower() in json.dumps(step.error).lower()
    assert record.read_json(step.folder / "status.json")["status"] == "failed"
    assert not step.output.exists()
    assert not step.output.with_suffix(".html").exists()
    assert runner.partial(step).exists(), "what it did is kept to be looked at"
    assert step.error["again"] == "./run_all.sh full --scale laptop --study td_dpo"


def test_an_interrupt_signal_in_mid_cell_is_no_success(bare, tmp_path):
    step = step_of(
        tmp_path,
        f"from pathlib import Path; import os, time; Path('{tmp_path}/pid').write_text(str(os.getpid())); time.sleep(3600)",
        SENTINEL,
    )

    def interrupt():
        os.kill(int(until(lambda: text_of(tmp_path / "pid"))), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    outcome(step)
    assert step.state == "failed"
    assert not step.output.exists()


def test_a_kernel_listens_on_no_port(bare, tmp_path):
    """Nothing else can take it, and no attempt to connect can come from it."""
    asked = "from ipykernel.kernelapp import IPKernelApp; assert IPKernelApp.instance().transport == 'ipc'"
    step = step_of(tmp_path, asked, SENTINEL)
    outcome(step)
    assert step.state == "succeeded"


def test_a_killed_kernel_gets_one_more_try(bare, tmp_path):
    flag = f"import os, pathlib\nflag = pathlib.Path('{tmp_path}/killed')\n"
    once = flag + "if not flag.exists(): flag.touch(); os.kill(os.getpid(), 9)"
    step = step_of(tmp_path, once, SENTINEL)
    outcome(step)
    assert step.state == "succeeded"


def test_no_secret_in_a_notebook(bare, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "abcd-efgh-1234")
    step = step_of(
        tmp_path, "print('key', 'abcd-' + 'efgh-1234'); raise ValueError('with abcd-' + 'efgh-1234')", SENTINEL
    )
    outcome(step)
    assert "abcd-efgh-1234" not in json.dumps(step.error)
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
    with progress.lock(tmp_path / "outputs"):
        code = "import sys; from pathlib import Path; from lib.run.progress import lock\nwith lock(Path(sys.argv[1])): pass"
        second = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "outputs")], capture_output=True, text=True, cwd=ROOT
        )
        assert second.returncode == 1
        assert "another runner works here" in second.stderr
    with progress.lock(tmp_path / "outputs"):
        pass


def test_who_only_looks_for_a_runner_keeps_none_out(tmp_path):
    """`status` holds the lock for a moment to see whether it can."""
    looking = FileLock(tmp_path / ".lock", thread_local=False)
    looking.acquire()
    threading.Timer(0.5, looking.release).start()
    with progress.lock(tmp_path):
        assert progress.is_running(tmp_path)
    assert not progress.is_running(tmp_path)


@pytest.mark.parametrize(("error", "code", "reported", "not_told"), [
    (OSError(errno.ENOSPC, "No space left on device"), 3, "writing a file: No space left on device", "None"),
    (OSError(errno.EROFS, "Read-only file system", "/o/x"), 3, "/o/x: Read-only file system", "None"),
    (OSError(errno.EMFILE, "Too many open files"), 1, "Too many open files", "space left"),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), 1, "ConnectionResetError", "permissions"),
    (OSError("no number at all"), 1, "no number at all", "None"),
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_an_error_of_the_system_says_what_it_is(monkeypatch, capsys, error, code, reported, not_told):
    def fails(*_):
        raise error

    monkeypatch.setattr(cli, "run", fails)
    assert cli.main(["plan"]) == code
    said = capsys.readouterr().err
    assert reported in said
    assert not_told not in said


def test_a_reader_that_goes_away_gets_no_traceback(tmp_path):
    environment = {**os.environ, "STUDY_OUTPUTS": str(tmp_path)}
    reader, writer = os.pipe()
    os.close(reader)  # as `head` closes it, before a line has come
    done = subprocess.run(
        [sys.executable, "-m", "lib", "status"],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_what_was_still_waiting_when_the_run_was_interrupted_keeps_its_record(tmp_path, monkeypatch):
    step = types.SimpleNamespace(folder=tmp_path, kind="train")
    mine = types.SimpleNamespace(stopping=True, force=True)
    monkeypatch.setattr(runner.members, "archive", lambda step: pytest.fail("archived"))
    runner.Runner.execute(mine, step)
    assert step.state == "interrupted"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("gone", ["done.json", "metrics.json", None])
def test_a_record_with_a_hole_does_not_stand(tmp_path, gone):
    for name in ("run.ipynb", "status.json", "done.json", "metrics.json"):
        record.write_json(tmp_path / name, {"status": "succeeded", "key": "k"})
    if gone:
        (tmp_path / gone).write_text("")
    why = plan._why(plan.Step("train", "td_dpo", "tiny", tmp_path, tmp_path, {}, "k", ""), ())
    assert why == ("its record is incomplete" if gone else "")


def test_outputs_of_other_params_and_other_paths_have_their_own_folders(tmp_path, monkeypatch):
    monkeypatch.delenv("STUDY_OUTPUTS", raising=False)

    def root(*arguments):
        return cli.root_of(parser().parse_args(["full", "--scale", "laptop", "--mode", "full", *arguments])).name

    assert root() == "laptop-full"
    assert root("--params", str(tmp_path)).startswith("laptop-full,params=")
    many = [f"--set=dataset.preprocessing.key_{i}={'ü' * 20}" for i in range(20)]
    assert root(*many) != root(*many[:-1])
    assert len(root(*many).encode()) < 255
    assert root("--set", "dataset.name=/a/pairs.jsonl") != root("--set", "dataset.name=/b/pairs.jsonl")


def test_results_dir_takes_the_place_of_outputs_and_keeps_its_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "run", lambda options: print(cli.select_runs(options)[0][1].results_dir) or 0)
    asked = ["full", "--scale", "laptop", "--study", "td_dpo"]
    for more, folder in ([], "laptop-full"), (["--set", "loss.beta=1"], "laptop-full,loss.beta=1"):
        assert cli.main([*asked, *more, "--results-dir", str(tmp_path / "mine")]) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / "mine" / folder / "td_dpo")
    given = ["--params", str(config.ROOT / "params" / "td_dpo" / "laptop"), "--results-dir", str(tmp_path / "mine")]
    assert cli.main([*asked, *given]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "mine" / "laptop-full" / "td_dpo")


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
    with pytest.raises(MissingError, match="cannot write there"), progress.lock(tmp_path / "outputs" / "laptop-full"):
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
    reported = capsys.readouterr().err
    assert "GPU" in reported
    assert "nothing was started" in reported
    assert not (tmp_path / "outputs").exists()


def test_fewer_jobs_than_one_members_gpus_is_said_before_anything_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "OUTPUTS", tmp_path / "outputs")
    asked = ["--scale", "paper", "--study", "td_dpo", "--run", "*-dpo", "--jobs", "1"]
    spread = ["--set", "compute.gpus=4", "--set", "compute.strategy=fsdp"]
    assert cli.main(["full", *asked, *spread]) == 3
    assert "--jobs: 1: a member of comparative-1-dpo trains on 4 GPUs" in capsys.readouterr().err
    assert cli.main(["plan", *asked, *spread]) == 0
    assert "--jobs 4, or leave --jobs out" in capsys.readouterr().out
    assert cli.main(["plan", *asked]) == 0, "one GPU for each member: one at a time"
    assert "--jobs" not in capsys.readouterr().out
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("study", "name"), [("td_dpo", "dpo"), ("iw_lora", "lora"), ("graff", "graff")])
@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_an_analysis_of_runs_that_left_no_record_says_so(pool_socket, tmp_path, study, name, scale):
    """Where every run has failed: nothing is judged, and nothing breaks."""
    path = sorted((ROOT / "params" / study / scale).glob(f"*{name}*.yaml"))[0]
    run = config.load_run(path, study=study, scale=scale, mode="full", results_dir=tmp_path)
    record.write_json(
        tmp_path / "comparison" / "runs.json", [{**config.dump(run), "study": study, "scale": scale, "mode": "full"}]
    )
    runner.execute_notebook(plan.analysis(study, tmp_path, scale, "full"), "nonce")
    assert record.read_json(tmp_path / "comparison" / "done.json") == {"nonce": "nonce"}
    assert {claim["verdict"] for claim in record.read_json(tmp_path / "comparison" / "claims.json")} == {
        "not evaluated"
    }


EXECUTE = """
import sys
from pathlib import Path
from lib.run import plan, runner
def execute(self, step):
    print(f"there: {sys.modules.keys() >= {'papermill', 'nbconvert', 'jupyter_client.multikernelmanager'}}")
    step.state = "succeeded"
runner.Runner.ensure_pool, runner.Runner.execute = lambda self: None, execute
nowhere = Path("nowhere")
assert runner.Runner([plan.Step("analysis", "td_dpo", "x", nowhere, nowhere, {"mode": "trial"}, "key", "never run")], 1).run()
"""


def test_threads_find_jupyter_imported():
    """One that imports papermill while another one imports nbconvert can find jupyter_client half made (seen in CI)."""
    done = subprocess.run([sys.executable, "-c", EXECUTE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "there: True" in done.stdout


def started(tmp_path, *arguments, **more):
    environment = {**os.environ, "STUDY_OUTPUTS": str(tmp_path / "outputs"), **more}
    environment.pop("STUDY_POOL", None)
    command = ["full", "--scale", "laptop", "--params", str(tmp_path / "params"), "--jobs", "1", *arguments]
    with open(tmp_path / "out.txt", "a") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "lib", *command],
            env=environment,
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@pytest.mark.slow
def test_a_run_without_memory_is_told_everywhere_and_the_others_go_on(tmp_path):
    """Two runs of which one member has no memory: exit code 1, `out_of_memory` in the table, `status` and the page."""
    for name, seeds in (("fits", [1]), ("large", [1, 2])):
        path = tmp_path / "params" / "td_dpo" / "laptop" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump({**TINY, "run_id": name, "seed_list": seeds}))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    process = started(tmp_path, PYTHONPATH=f"{tmp_path / 'site'}:{ROOT}")
    assert process.wait(PATIENCE) == 1, (tmp_path / "out.txt").read_text()
    table = (tmp_path / "out.txt").read_text()
    assert "td_dpo/large                       out_of_memory" in table
    assert "td_dpo/fits                        succeeded" in table
    assert "no memory for a batch of 8 pairs with" in table
    results = tmp_path / "outputs" / "laptop-full" / "td_dpo"
    assert record.read_json(results / "large" / "status.json")["status"] == "out_of_memory"
    assert (results / "large" / "members" / "default-s1" / "done.json").exists()
    status = subprocess.run(
        [sys.executable, "-m", "lib", "status"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "STUDY_OUTPUTS": str(tmp_path / "outputs")},
    ).stdout
    assert "td_dpo/large                       out_of_memory" in status
    page = (tmp_path / "outputs" / "index.html").read_text()
    assert "out_of_memory" in page
    assert "1 completed, 1 out of memory" in page
