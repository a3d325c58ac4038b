"""W&B against a server on the loopback interface: live, dead, dying, slow, malformed, killed; and the way back."""

import getpass
import json
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest

from lib import claims, config, record, tables
from lib.errors import StudyError
from lib.run import cli, keys, members, plan, runner, runs, wandb as mirror
from lib.tables import aggregate_metrics
from lib.td_dpo import report
from tests import wandb_member
from tests.conftest import PATIENCE, ROOT, TINY, until
from tests.wandb_server import CORE_CRASH, ENTITY, KEY, serve

PROJECT = "studies"


@pytest.fixture
def server(monkeypatch, tmp_path):
    with serve() as made:
        use(monkeypatch, made.url, tmp_path)
        yield made
        shut_client()


def use(monkeypatch, url, tmp_path):
    """This process and those it starts talk to `url`, with a key, and know nothing of the user's own W&B settings."""
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "WANDB_BASE_URL": url,
        "WANDB_API_KEY": KEY,
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
        "WANDB_CONFIG_DIR": str(tmp_path / "c"),
        "WANDB_CACHE_DIR": str(tmp_path / "c"),
        "NETRC": str(tmp_path / "none"),
        "PYTHONPATH": str(ROOT),
    }.items():
        monkeypatch.setenv(name, value)


def shut_client():
    import wandb

    wandb.teardown()


@pytest.fixture
def run(tmp_path):
    """A run with two members whose records have begun; nothing is trained."""
    return begun(tmp_path)


def begun(tmp_path, run_id="tiny", **changes):
    made = config.load_run(
        write_yaml(tmp_path, run_id, **changes),
        study="td_dpo",
        scale="laptop",
        mode="full",
        results_dir=tmp_path / "outputs" / "laptop-full" / "td_dpo",
    )
    for member in config.members(made):
        folder = folder_of(made) / "members" / member.id
        folder.mkdir(parents=True)
        record.write_json(
            folder / "member.json",
            {
                "study": "td_dpo",
                "scale": "laptop",
                "mode": "full",
                "run_id": run_id,
                "member": member.id,
                "cell": member.cell,
                "cell_name": member.cell_name,
                "seed": member.seed,
                "config": config.dump(member.run),
                "key": keys.member_key(member),
            },
        )
    runs.begin(made)
    status(made, "running")
    return made


def write_yaml(tmp_path, run_id, **changes):
    path = tmp_path / "params" / f"{run_id}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = {**TINY, "run_id": run_id, "wandb": {"entity": ENTITY, "project": PROJECT, "mode": "online"}, **changes}
    path.write_text(json.dumps(raw))
    return path


def folder_of(run):
    return run.results_dir / run.run_id


def status(run, word):
    record.write_json(folder_of(run) / "status.json", {"run_id": run.run_id, "kind": "train", "status": word})


def finished(run, steps=60):
    """The members write their records, and the run its own: what a notebook leaves behind."""
    for member in config.members(run):
        wandb_member.train(folder_of(run) / "members" / member.id, steps)
    conclude(run)


def conclude(run):
    rows = [
        {
            "member": m.id,
            "cell": m.cell_name,
            "seed": m.seed,
            **record.read_json(folder_of(run) / "members" / m.id / "metrics.json"),
        }
        for m in config.members(run)
    ]
    runs.finish(folder_of(run), runs.summary(run, rows), "n")
    status(run, "succeeded")


def follow(run, mode="online"):
    mirrors = mirror.Mirrors()
    mirrors.follow(folder_of(run), mode)
    return mirrors


def id_of(run):
    """The W&B id of its first member."""
    return mirror.entries(folder_of(run))[0].init["id"]


def is_sent(mirrors):
    return all(process.returncode == 0 for process in mirrors.senders.values())


def words_of(process):
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended since
        return []


def differences(run):
    """{W&B run: in what it differs from its record}, asked of the server through the client."""
    sender = mirror.Sender("online")
    every = {entry.init["name"]: mirror.diff(entry, sender.find(entry)) for entry in mirror.entries(folder_of(run))}
    return {name: left for name, left in every.items() if left}


def sync(*arguments):
    """`./run_all.sh sync` in a process of its own: (exit code, what it said)."""
    command = [sys.executable, "-m", "lib", "sync", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)
    return done.returncode, done.stdout + done.stderr


def synced(*planned):
    """What `./run_all.sh sync` does, in this process: its exit code."""
    return mirror.send_all([folder_of(run) for run in planned])


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


def snapshot(folder):
    """Every file of the record, without W&B's own."""
    mine = [p for p in sorted(folder.rglob("*")) if p.is_file() and "wandb" not in p.relative_to(folder).parts[0]]
    return {p: p.read_bytes() for p in mine}


def offline_runs(run):
    return [path.name.split("-", 3)[3] for path in (folder_of(run) / "wandb").glob("offline-run-*/")]


# ---- healthy


def test_every_step_is_there_while_training_goes_on(server, run, outputs):
    one, two = [folder_of(run) / "members" / m.id for m in config.members(run)]
    mirrors = follow(run)
    process = subprocess.Popen([sys.executable, "-m", "tests.wandb_member", str(one), "200", "0.001", "120"], cwd=ROOT)
    try:
        until(lambda: server.received() >= 122, process=process)  # 120 steps, 2 evaluations
        assert not (one / "done.json").exists()
        lines = [line for p in psutil.Process().children(recursive=True) for line in words_of(p)]
        assert any("wandb-core" in line for line in lines)
        assert not any(KEY in line for line in lines)
    finally:
        process.kill()
        process.wait()
    wandb_member.train(one, 200)
    wandb_member.train(two, 30)
    conclude(run)
    mirrors.close(PATIENCE)
    assert is_sent(mirrors)
    assert differences(run) == {}
    entries = mirror.entries(folder_of(run))
    assert [e.init["name"] for e in entries] == ["tiny--default-s1", "tiny--default-s2", "tiny"]
    sent = server.runs[id_of(run)]
    assert sent["group"] == "tiny"
    assert set(sent["files"]) == {
        *entries[0].files,
        "config.yaml",
        "wandb-summary.json",
    }  # no metadata, requirements or console output
    assert len(server.bodies) > 10
    for secret in (socket.gethostname(), getpass.getuser() + "@", str(ROOT)):
        assert not [body for body in server.bodies if secret.encode() in body], f"{secret} left this machine"
    assert (
        len(server.rows(id_of(run))) == 204
    )  # none twice, though the record was cut back to a checkpoint and made again
    assert {"1": "global_step"}.items() <= {
        k: m["1"] for m in json.loads(sent["config"])["_wandb"]["value"]["m"] for k in ("1",) if "1" in m
    }.items()
    final = server.runs["tiny--laptop"]
    assert json.loads(final["summary"])["oracle_score"] == pytest.approx(6.6)
    assert final["state"] == "finished"
    server.requests.clear()
    assert sync() == (0, "W&B: 3 runs looked at, 0 brought up to date\n")
    assert server.sent() == []
    for path in outputs.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_sync_brings_up_what_was_never_sent_and_the_second_one_sends_nothing(server, run, outputs, capsys):
    finished(run)
    before = snapshot(folder_of(run))
    assert synced(run) == 0
    assert "3 brought up to date" in capsys.readouterr().out
    assert differences(run) == {}
    server.requests.clear()
    assert sync()[0] == 0
    assert server.sent() == []
    assert snapshot(folder_of(run)) == before
    entry, sender = mirror.entries(folder_of(run))[0], mirror.Sender("online")
    sent, predictions = server.runs[id_of(run)], "tiny/members/default-s1/predictions.jsonl"
    for part, damage in {
        "history": lambda: sent["history"].pop(20),
        "files": lambda: sent["files"].update({predictions: b"{}"}),
        "state": lambda: sent.update(state="crashed"),
        "record": lambda: sent.update(config="{}"),
    }.items():
        damage()
        assert sender.send(entry, True) == [part]
        assert sender.send(entry, True) == []
    code, said = sync("--run", "other")
    assert code == 0
    assert f"no finished member in {outputs / 'laptop-full'}" in said


# ---- the way back


def study(tmp_path, seeds=(42, 43, 44, 45, 46)):
    """Two runs of the TD-DPO study, of which its claims C3 and C5 can be judged, with made scores in their records."""
    made = []
    for run_id, loss, shift in (
        ("dpo", {"name": "dpo", "beta": 0.05}, 0.0),
        ("td_dpo", {"name": "td_dpo", "beta": 0.05, "tau": 1.0}, 0.02),
    ):
        run = begun(
            tmp_path,
            run_id,
            method=run_id,
            loss=loss,
            seed_list=list(seeds),
            role="proposed" if shift else "comparative",
        )
        for member in config.members(run):
            folder, random = folder_of(run) / "members" / member.id, np.random.default_rng(member.seed)
            for step in range(1, 6):
                record.append_jsonl(folder / "history.jsonl", wandb_member.row(member.seed, step))
            scores = 6 + shift + random.normal(0, 1, 80)
            answers = [
                {"kind": "answer", "question": q, "category": "c", "turn": t, "score": s + 0.1 * t, "text": "ü"}
                for q, s in enumerate(scores)
                for t in (1, 2)
            ]
            pairs = [
                {"kind": "pair", "split": "test", "pair": i, "rho": x} for i, x in enumerate(random.normal(0, 1, 20))
            ]
            record.write_json(folder / "adapters.json", {"rank": member.seed})
            wandb_member.finish(
                folder,
                record.read_json(folder / "member.json"),
                {"status": "completed", "oracle_score": scores.mean(), "validation_implicit_accuracy": 0.6},
                answers + pairs,
            )
        times = [{"process": i, "seconds": 0.1 + i % 3 / 1e4, "seconds_baseline": 0.1} for i in range(8)]
        record.write_jsonl(folder_of(run) / "step_cost.jsonl", times if shift else [])
        conclude(run)
        made.append(run)
    return made


def judged(results, planned):
    """What the study's analysis makes of a folder of records: its tables, verdicts and aggregated metrics."""
    loaded = tables.load(results, [m for run in planned for m in config.members(run)])
    published = claims.load(config.ROOT / "params" / "td_dpo" / "claims.yaml")
    rows = report.question_scores(loaded, report.judged(planned, loaded))
    verdict = claims.evaluate(published, rows, scale="laptop", mode="full", members=loaded.everyone, costs=loaded.costs)
    frames = {
        name: getattr(loaded, name).drop(columns="folder", errors="ignore")
        for name in ("members", "history", "answers", "pairs", "costs", "everyone")
    }
    return frames, claims.to_json(verdict), aggregate_metrics(planned)


def test_a_study_judged_from_wandb_is_the_same_study(server, tmp_path, outputs):
    planned = study(tmp_path)
    assert synced(*planned) == 0
    source = {"entity": ENTITY, "project": PROJECT, "run_ids": ["dpo", "td_dpo"]}
    back = mirror.results("td_dpo", "laptop", "full", tmp_path / "back" / "td_dpo", source)
    here, there = judged(planned[0].results_dir, planned), judged(back, runs.planned(back))
    for name, frame in here[0].items():
        pd.testing.assert_frame_equal(frame, there[0][name], check_exact=True)
        assert len(frame), name
    assert here[1:] == there[1:]
    words = {v["id"]: v["verdict"] for v in here[1]}
    assert {words["C3"], words["C5"]} <= {"supported", "refuted", "inconclusive"}
    assert record.read_json(back / "dpo" / "members" / "default-s42" / "adapters.json") == {"rank": 42}
    asked = len([r for r in server.requests if r[0] == "GET"])
    mirror.fetch(tmp_path / "back", "laptop-full/td_dpo", **source)
    assert len([r for r in server.requests if r[0] == "GET"]) == asked  # what is there with the right checksum stays

    (back / "dpo" / "metrics.json").unlink()
    server.runs["dpo--laptop"]["files"]["dpo/metrics.json"] = b"{}"
    with pytest.raises(StudyError, match="not what its checksum says"):
        mirror.fetch(tmp_path / "back", "laptop-full/td_dpo", **source)
    assert not (back / "dpo" / "metrics.json").exists()
    with pytest.raises(StudyError, match="no finished run other"):
        mirror.fetch(tmp_path / "back", "laptop-full/td_dpo", **{**source, "run_ids": ["other"]})


def test_a_name_on_wandb_cannot_write_outside_the_results(tmp_path):
    class Found:
        id, config = "x", {"record": {"files": {"../../escaped.json": "0"}}}

        def files(self):
            return []

    with pytest.raises(StudyError, match="escaped"):
        mirror.download(Found(), tmp_path / "results")


# ---- what makes a W&B run another one


@pytest.mark.slow
def test_a_forced_attempt_is_another_run_and_the_first_stays(server, run, outputs):
    finished(run, 5)
    assert synced(run) == 0
    first = {e.init["name"]: e.init["id"] for e in mirror.entries(folder_of(run))}
    published = {name: (list(r["history"]), r["summary"]) for name, r in server.runs.items()}
    specs = {m.id: record.read_json(folder_of(run) / "members" / m.id / "member.json") for m in config.members(run)}
    for member in config.members(run):
        members.archive(folder_of(run) / "members" / member.id)
        record.write_json(folder_of(run) / "members" / member.id / "member.json", specs[member.id])
    finished(run, 7)
    assert synced(run) == 0
    assert not set(first.values()) - {"tiny--laptop"} & {e.init["id"] for e in mirror.entries(folder_of(run))}
    assert {
        name: (list(r["history"]), r["summary"]) for name, r in server.runs.items() if name in published
    } == published
    assert len(server.runs) == 6
    back = mirror.fetch(outputs / "back", "laptop-full/td_dpo", entity=ENTITY, project=PROJECT, run_ids=["tiny"])
    assert {len(record.read_jsonl(p)) for p in back.glob("tiny/members/*/history.jsonl")} == {7}


def test_places_do_not_share_ids(tmp_path):
    """The same run at another scale, or varied with --set, is not the same W&B run."""
    seen = set()
    for folder in ("laptop-full", "paper-full", "laptop-full,beta=1"):
        made = begun(tmp_path / folder)
        if folder != "laptop-full":
            (tmp_path / folder / "outputs" / "laptop-full").rename(tmp_path / folder / "outputs" / folder)
        where = tmp_path / folder / "outputs" / folder / "td_dpo" / "tiny"
        made = made.model_copy(update={"results_dir": where.parent})
        finished(made, 2)
        seen |= {e.init["id"] for e in mirror.entries(where)}
    assert len(seen) == 9


# ---- what is not mirrored, and what is said


def test_trials_and_disabled_runs_start_no_sender(run):
    mirrors = mirror.Mirrors()
    mirrors.follow(folder_of(run), config.wandb_mode(config.trial(run)))
    assert not mirrors.senders
    assert config.wandb_mode(config.trial(run)) == "disabled"


def test_a_missing_key_is_named_with_its_fix(server, run, outputs, monkeypatch):
    finished(run, 2)
    monkeypatch.delenv("WANDB_API_KEY")
    code, said = sync()
    assert code == 3
    assert "wandb login" in said
    assert server.requests == []


def test_no_key_stops_an_online_run_before_it_starts(tmp_path, monkeypatch, capsys):
    use(monkeypatch, "http://127.0.0.1:9", tmp_path)
    monkeypatch.delenv("WANDB_API_KEY")
    assert (
        cli.main(["full", "--scale", "laptop", "--study", "td_dpo", "--run", "dpo", "--set", "wandb.mode=online"]) == 3
    )
    said = capsys.readouterr().err
    assert "wandb login" in said
    assert "nothing was started" in said


def test_a_disabled_run_is_left_out_of_sync(server, tmp_path, outputs):
    finished(begun(tmp_path, wandb={"mode": "disabled"}), 2)
    code, said = sync()
    assert code == 0
    assert "wandb.mode: disabled in its YAML" in said
    assert server.sent() == []


@pytest.mark.slow
def test_killed_at_step_700_of_1500(server, run, outputs):
    first = folder_of(run) / "members" / config.members(run)[0].id
    mirrors = follow(run)
    writer = subprocess.Popen(
        [sys.executable, "-m", "tests.wandb_member", str(first), "1500", "0", "700", "0.001"], cwd=ROOT
    )
    until(lambda: server.received() >= 714, process=writer)  # 700 steps, 14 evaluations
    writer.kill()
    assert writer.wait() == -signal.SIGKILL
    finished(run, 1500)  # goes on from the checkpoint at step 600, and steps 601 to 700 come out otherwise
    mirrors.close(PATIENCE)
    name = id_of(run)
    history = mirror.entries(folder_of(run))[0].rows()
    steps = [row["global_step"] for row in server.rows(name) if "loss" in row]
    assert sorted(set(steps)) == list(range(1, 1501))
    assert 1 <= len(steps) - 1500 <= 100  # what was sent of the first attempt is there still, and does not count
    for _ in range(2):
        server.requests.clear()
        assert sync()[0] == 0
        assert server.sent() == []
        assert differences(run) == {}
        assert mirror.rows_of(mirror.api().run(f"{ENTITY}/{PROJECT}/{name}")) > set(history)


@pytest.mark.slow
def test_a_run_half_sent_is_completed(server, run, outputs):
    first = folder_of(run) / "members" / config.members(run)[0].id
    mirrors = follow(run)
    writer = subprocess.Popen([sys.executable, "-m", "tests.wandb_member", str(first), "90", "0", "50"], cwd=ROOT)
    until(lambda: server.received() >= 51, process=writer)  # 50 steps, an evaluation
    writer.kill()
    writer.wait()
    os.killpg(mirrors.senders[folder_of(run)].pid, signal.SIGKILL)
    finished(run, 90)
    run_id = id_of(run)
    assert server.runs[run_id]["files"] == {}
    assert sync()[0] == 0
    assert differences(run) == {}
    assert len(server.rows(run_id)) == len(mirror.entries(folder_of(run))[0].rows()) == 91


def test_the_runner_starts_the_mirror_when_a_notebook_begins_and_ends(run, monkeypatch):
    seen, folder = [], folder_of(run)
    step = plan.Step(
        "train", "td_dpo", "tiny", folder, folder, {"mode": "full", "scale": "laptop"}, "key", "never run", run
    )

    def execute(*_):
        seen.append("executed")
        record.write_text(runner.partial(step), "{}")

    mine = runner.Runner([step], 1)
    mine.ensure_pool = lambda: None
    mine.mirrors = SimpleNamespace(follow=lambda *given: seen.append((*given, mirror.is_over(folder))))
    monkeypatch.setattr(runner, "execute_notebook", execute)
    monkeypatch.setattr(runner, "check_success", lambda *_: None)
    monkeypatch.setattr(runner.pages, "notebook_html", lambda *_, **__: None)
    mine.attempt(step, time.time())
    assert seen == [(folder, "online", False), "executed", (folder, "online", True)]


@pytest.mark.parametrize(("mode", "does", "late"), [("offline", "sleep 1", False), ("online", "sleep 3600", True)])
def test_a_commands_end_waits_for_files_written_here_and_not_for_the_network(
    tmp_path, monkeypatch, capsys, mode, does, late
):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nexec {does}\n")
    program.chmod(0o755)
    monkeypatch.setattr(mirror.sys, "executable", str(program))
    mirrors = mirror.Mirrors()
    mirrors.follow(tmp_path, mode)
    mirrors.close(0.01)
    assert ("not complete" in capsys.readouterr().err) == late
    assert mirrors.senders[tmp_path].wait() == (-signal.SIGKILL if late else 0)


# ---- W&B is not there, or not well


@pytest.mark.parametrize(
    "how",
    [
        "refuse",
        "not_json",
        *(pytest.param(how, marks=pytest.mark.slow) for how in ("wrong_types", "error", "empty", "cut_off")),
    ],
)
def test_dead_or_answering_nonsense(server, run, how, outputs, capsys):
    server.fault = how
    mirrors = follow(run)
    finished(run)
    status(run, "running")  # as a runner leaves it that is ended from outside
    before = snapshot(folder_of(run))
    mirrors.close(PATIENCE)
    said = capsys.readouterr().err
    assert "not complete" in said
    assert said.count("\n") == 1
    assert snapshot(folder_of(run)) == before
    code, said = sync()
    assert code == 3
    assert "fix:" in said
    server.fault = None
    assert synced(run) == 0
    assert differences(run) == {}


@pytest.mark.slow
def test_dying_in_mid_run(server, run, outputs):
    first = folder_of(run) / "members" / config.members(run)[0].id
    server.fault, server.fault_from = "refuse", 20
    mirrors = follow(run)
    writer = subprocess.Popen([sys.executable, "-m", "tests.wandb_member", str(first), "60", "0", "30"], cwd=ROOT)
    until(lambda: server.received() >= 20, process=writer)
    writer.kill()
    writer.wait()
    finished(run)
    began = time.monotonic()
    mirrors.close(5)
    assert time.monotonic() - began < 7
    assert not is_sent(mirrors)
    server.fault = None
    assert sync()[0] == 0
    assert differences(run) == {}


def test_a_reply_that_crashes_the_clients_core(server, run, outputs, capsys):
    server.answers = CORE_CRASH
    mirrors = follow(run)
    finished(run, 10)
    before = snapshot(folder_of(run))
    mirrors.close(PATIENCE)
    assert "not complete" in capsys.readouterr().err
    assert "SIGSEGV" in (folder_of(run) / "wandb.log").read_text()
    assert snapshot(folder_of(run)) == before
    assert sync()[0] == 1
    server.answers = {}
    assert synced(run) == 0
    assert differences(run) == {}


def test_a_sender_that_was_lost_is_started_anew_at_the_notebooks_end(server, run, outputs):
    mirrors = follow(run)
    lost = mirrors.senders[folder_of(run)]
    os.killpg(lost.pid, signal.SIGKILL)
    lost.wait()
    finished(run, 5)
    mirrors.follow(folder_of(run), "online")
    mirrors.close(PATIENCE)
    assert mirrors.senders[folder_of(run)] is not lost
    assert is_sent(mirrors)
    assert differences(run) == {}


def test_a_call_that_never_returns_is_ended():
    code = "import threading; from lib.run import wandb\nwith wandb.alarm(1): threading.Event().wait()"
    assert subprocess.run([sys.executable, "-c", code], timeout=PATIENCE).returncode == -signal.SIGALRM


def test_offline_the_clients_files_are_written_at_the_end(run):
    mirrors = follow(run, "offline")
    assert not mirrors.senders
    finished(run, 5)
    mirrors.follow(folder_of(run), "offline")
    mirrors.close(0.01)
    assert is_sent(mirrors)
    assert sorted(offline_runs(run)) == sorted(e.init["id"] for e in mirror.entries(folder_of(run)))


@pytest.mark.slow
def test_slow(server, run, outputs):
    server.fault, server.delay = "slow", 0.5
    mirrors = follow(run)
    finished(run, 20)
    mirrors.close(PATIENCE)
    server.fault = None
    assert sync()[0] == 0
    assert differences(run) == {}
