"""Members on a Ray cluster: a lost worker's is sent again, a lost node's moves, and what they made is gathered here."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from lib import config, record
from lib.errors import MissingError
from lib.run import check, cli, cluster, members, pool, preflight
from tests.conftest import TINY, gone, text_of, until

LONG = {**TINY["training"], "max_steps": 400, "eval_steps": 100, "save_steps": 10}
without_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `cluster` is not installed")


def test_without_ray_one_line_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingError, match=r"ray is not installed[\s\S]*\.\[cluster\]"):
        cluster.connect("auto")
    assert cli.main(["full", "--scale", "laptop", "--cluster", "10.9.8.7:6379"]) == 3
    fix = ".venv/bin/pip install -c constraints.txt -e '.[cluster]'"
    said = f"--cluster: ray is not installed\n  expected: the extra `cluster`\n  fix: {fix}\n"
    assert capsys.readouterr().err == said


@without_ray
@pytest.mark.parametrize("address", ["127.0.0.1:9", "nowhere", "localhost:99999", "auto"])
def test_a_cluster_that_is_not_there_is_said_at_once(monkeypatch, capsys, address):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    cluster._nodes.cache_clear()
    assert cli.main(["full", "--scale", "laptop", "--cluster", address]) == 3
    said = capsys.readouterr().err
    assert said.startswith("--cluster: nothing answers at")
    assert "ray start --head" in said


def test_the_clusters_gpus_are_the_slots_and_what_preflight_asks_for(monkeypatch):
    nodes = [{"CPU": 8.0, "GPU": 2.0, "accelerator_type:H100": 1.0}, {"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0}]
    monkeypatch.setattr(cluster, "_nodes", lambda address: nodes)
    assert cluster.gpus("a:1") == ["GPU", "H100", "H100"]
    assert cluster.slots("a:1") == 3
    run = config.load_run(config.ROOT / "params/td_dpo/paper/proposed-td_dpo.yaml", scale="paper", mode="full")
    found = {f.key for f in preflight.find_missing([run], check.gpus_of("a:1"))}
    assert not {"compute.gpus", "model.torch_dtype"} & found
    monkeypatch.setattr(cluster, "_nodes", lambda address: nodes[2:])
    assert cluster.slots("a:1") == 4, "without GPUs: a member per core"
    assert "compute.gpus" in {f.key for f in preflight.find_missing([run], check.gpus_of("a:1"))}


def test_a_folder_travels_whole_and_nothing_lands_outside_it(tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    for name in ("done.json", "history.jsonl", "checkpoints/checkpoint-4/complete.json", "checkpoints/checkpoint-4/a.bin",
                 ".half.tmp"):  # fmt: skip
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_text(name)
    names = list(cluster.list_files(there))
    assert names[-2:] == ["checkpoints/checkpoint-4/complete.json", "done.json"], (
        "what says that the rest is whole comes last"
    )
    assert ".half.tmp" not in names
    cluster.unpack(cluster.pack_files(there, [*names, "vanished"]), here)
    assert list(cluster.list_files(here)) == names
    assert all((here / name).read_text() == name for name in names)
    (tmp_path / "evil").write_text("x")
    cluster.unpack(cluster.pack_files(there, ["../evil"]), here / "deep")
    assert not (here / "evil").exists()


@pytest.mark.parametrize(("gpus", "seen"), [(0, ""), (1, "2,3")])
def test_a_node_shows_no_gpu_to_who_asks_for_none(tmp_path, monkeypatch, gpus, seen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")  # as Ray leaves it for a task that asks for none
    request = {
        "target": "tests.faults:note_environment",
        "argument": {"path": str(tmp_path / "seen")},
        "threads": 1,
        "gpus": gpus,
    }
    nothing = cluster.pack_files(tmp_path, [])
    *_, last = cluster.on_node(request, cluster.code(), nothing, nothing)
    assert last == {"code": 0}
    assert (tmp_path / "seen").read_text() == f"{seen} 2.0"


def test_the_code_that_travels_is_what_a_member_imports(tmp_path):
    cluster.unpack(cluster.code(), tmp_path)
    assert (tmp_path / "lib/td_dpo/member.py").read_bytes() == (config.ROOT / "lib/td_dpo/member.py").read_bytes()
    assert (tmp_path / "lib/run/assets/card.md.j2").exists(), "also what modules read"
    assert not list(tmp_path.rglob("*.pyc"))


@pytest.fixture
def two_nodes(monkeypatch):
    """A head without slots and two nodes with one GPU (by name) each, on this machine; and a pool whose slots they
    are."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 100 << 20}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
    for _ in range(2):
        made.add_node(num_cpus=1, num_gpus=1, **small)
    monkeypatch.setenv("STUDY_CLUSTER", made.address)
    cluster._nodes.cache_clear()
    own = pool.Pool(cluster.slots(made.address), bare=True)
    monkeypatch.setenv("STUDY_POOL", own.socket)
    yield made
    own.close()
    made.shutdown()


def at_work() -> dict[int, psutil.Process]:
    """{seed: the process that trains it on a node}"""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "lib.run.cluster" in command:
            try:
                found[json.loads(Path(command[-1]).read_text())["argument"]["spec"]["seed"]] = process
            except (OSError, KeyError):
                continue
    return found


@pytest.mark.slow
@without_ray
def test_a_lost_worker_and_a_lost_node_cost_no_member(two_nodes, tiny, tmp_path, pool_socket, monkeypatch):
    assert cluster.slots(two_nodes.address) == 2
    changes = {
        "training": LONG,
        "seed_list": [1, 2, 3],
        "compute": {"gpus": 1, "threads": 1},
        # fmt: skip
        "model": {**TINY["model"], "recipe": {**TINY["model"]["recipe"], "seed": time.time_ns() % 2**31}},
    }
    run = tiny(**changes)
    made = members.prepare_inputs(run)  # on a node, and gathered
    assert (made / "complete.json").exists()
    job = members.submit(run)
    events = []

    def steps(seed):
        return len(record.read_jsonl(job.folders[f"default-s{seed}"] / "history.jsonl"))

    def disturb():
        if not events and steps(1) >= 30:
            worker = at_work()[1].parent()
            worker.kill()
            events.append("worker")
        if events == ["worker"] and steps(2) >= 60:
            raylet = at_work()[2].parent().ppid()
            (node,) = [
                n for n in two_nodes.worker_nodes if raylet in [p.process.pid for p in n.all_processes["raylet"]]
            ]
            two_nodes.remove_node(node, allow_graceful=False)
            events.append("node")

    began = time.monotonic()
    pool.wait_for(list(job.tasks.values()), on_tick=disturb)
    print(f"{time.monotonic() - began:.0f} s")
    assert events == ["worker", "node"]
    records = members.collect(job)
    assert [r["status"] for r in records] == ["completed"] * 3
    for seed in (1, 2):
        assert "sent again, from the last checkpoint" in job.tasks[f"default-s{seed}"].log.read_text()

    monkeypatch.delenv("STUDY_CLUSTER")
    monkeypatch.setenv("STUDY_POOL", pool_socket.socket)
    calm = tiny(**changes).model_copy(update={"results_dir": tmp_path / "calm"})
    work = members.submit(calm)
    members.watch(work)
    members.collect(work)
    for name, folder in job.folders.items():
        for file in ("history.jsonl", "predictions.jsonl"):
            assert (folder / file).read_bytes() == (work.folders[name] / file).read_bytes(), (name, file)
        mine, theirs = (sorted(p.name for p in (f / "checkpoints").iterdir()) for f in (folder, work.folders[name]))
        assert mine == theirs, "checkpoints that were removed there are removed here"
    until(lambda: not at_work(), "something is left on the nodes")


@pytest.mark.slow
@without_ray
def test_an_exception_on_a_node_is_told_here_and_not_tried_again(two_nodes, tmp_path):
    task = pool.Task("a", "tests.faults:fail", {"message": "seven is not a prime of two", "folder": str(tmp_path / "a"),
                                                "config": {"compute": {"gpus": 0}}}, tmp_path / "a")  # fmt: skip
    pool.start(task)
    pool.wait_for([task])
    assert (task.state, task.attempts) == ("failed", 1)
    assert "ValueError: seven is not a prime of two" in task.log.read_text()
    assert os.environ["STUDY_CLUSTER"] == two_nodes.address


@pytest.mark.slow
@without_ray
def test_a_client_that_goes_away_takes_its_work_on_the_node_along(two_nodes, tmp_path):
    started = tmp_path / "pid"
    task = pool.Task("a", "tests.faults:sleep", {"started": str(started), "seconds": 3600, "folder": str(tmp_path / "a"),
                                                 "config": {"compute": {"gpus": 0}}}, tmp_path / "a")  # fmt: skip
    pool.start(task)
    pid = int(until(lambda: text_of(started)))
    pool.stop([task])
    until(lambda: gone(pid))
