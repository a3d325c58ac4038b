"""One run over two processes: a tiny NF4 Llama sharded with FSDP2 on gloo gives the unsharded losses and resumes
anywhere."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from lib import config, models
from lib.errors import MissingError
from lib.made import write_stand_in
from lib.run import members, sharding
from lib.td_dpo import data
from tests import sharded
from tests.conftest import ROOT, gone, until
from tests.test_engine import make_pairs

LLAMA = "meta-llama/Llama-2-7b-chat-hf"
TRAINING = {"max_steps": 6, "global_batch_size": 8, "per_device_train_batch_size": 2, "learning_rate": 5e-3,
            "eval_steps": 3, "save_steps": 2, "max_grad_norm": 1.0, "warmup_ratio": 0.1}  # fmt: skip


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def assert_same(rows: list[dict], expected: list[dict], slack: float) -> None:
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name in ("loss", "grad_norm", "margin", "validation_loss"):
            if name in row:
                assert row[name] == pytest.approx(other[name], rel=slack, abs=slack), (row["step"], name)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The argument of a training of 21 pairs (no multiple of the batch) and its undisturbed record in one process."""
    folder = tmp_path_factory.mktemp("sharded")
    pairs = make_pairs(21)
    write_stand_in(LLAMA, folder / "model", [pair["chosen"][0]["content"] for pair in pairs], vocab_size=384)
    tokenizer = models.load_tokenizer(str(folder / "model"))
    rows = {"train": data.encode_pairs(tokenizer, pairs)[0],
            "validation": data.encode_pairs(tokenizer, make_pairs(8, seed=9))[0]}  # fmt: skip
    argument = {"model": str(folder / "model"), "dtype": "float32", "quantization": "nf4", "training": TRAINING,
                "rows": str(folder / "rows.json")}  # fmt: skip
    model = sharded.model_of(argument, sharded=False)
    rows["reference"] = {split: sharded.scores(model, rows[split]) for split in ("train", "validation")}
    (folder / "rows.json").write_text(json.dumps(rows))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sharded.train({**argument, "folder": str(folder / "one")})
    torch.set_num_threads(threads)
    return argument, folder


def test_two_processes_train_as_one_fail_aloud_and_resume_in_two_and_in_one(job, tmp_path, capfd):
    argument, folder = job
    expected = history(folder / "one")
    argument = {
        **argument,
        "training": {**TRAINING, "token_budget": 60},
    }  # also cut by length here, which `one` was not
    broken = {**argument, "folder": str(tmp_path / "two"), "fail_at": 5}
    with pytest.raises(ValueError, match="seven is not a prime of two"):
        sharding.launch("tests.sharded:train", broken, 2)
    assert "ValueError: seven is not a prime of two" in capfd.readouterr().out, "its output was streamed"
    assert_same(history(tmp_path / "two"), expected[: len(history(tmp_path / "two"))], 1e-5)
    assert history(tmp_path / "two")[-1]["step"] == 5

    checkpoint = tmp_path / "two" / "checkpoints" / "checkpoint-4"
    assert (checkpoint / "complete.json").exists()
    assert {"adapter_model.safetensors", "optimizer.pt"} <= {p.name for p in checkpoint.iterdir()}
    shutil.copytree(tmp_path / "two", tmp_path / "resumed")
    sharded.train({**argument, "folder": str(tmp_path / "resumed")})
    assert_same(history(tmp_path / "resumed"), expected, 1e-5)

    reported = sharding.launch("tests.sharded:train", broken, 2)
    assert (reported["status"], reported["step"]) == ("completed", 6)
    assert_same(history(tmp_path / "two"), expected, 1e-5)
    layers = [name for name in reported["whole"] if ".layers." in name]
    assert any("base_layer" in name for name in layers)
    for name in layers:  # NF4 weights, adapters, norms: each process held its half
        assert [held[name] for held in reported["held"]] == [reported["whole"][name] / 2] * 2, name


def test_fewer_gpus_than_processes_is_one_line_that_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(MissingError, match="1 GPUs given to this member"):
        sharding.launch("tests.sharded:train", {}, 2)


@pytest.mark.slow
def test_bfloat16_with_checkpointed_activations_is_within_its_rounding(job, tmp_path):
    argument, _ = job
    argument = {**argument, "dtype": "bfloat16", "training": {**TRAINING, "bf16": True, "gradient_checkpointing": True}}
    rows = json.loads(Path(argument["rows"]).read_text())
    model = sharded.model_of(argument, sharded=False)
    rows["reference"] = {split: sharded.scores(model, rows[split]) for split in ("train", "validation")}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    argument["rows"] = str(tmp_path / "rows.json")
    sharded.train({**argument, "folder": str(tmp_path / "one")})
    sharding.launch("tests.sharded:train", {**argument, "folder": str(tmp_path / "two")}, 2)
    assert_same(history(tmp_path / "two"), history(tmp_path / "one"), 0.05)


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_process_behind(job, tmp_path):
    argument = {**job[0], "folder": str(tmp_path / "long"), "training": {**TRAINING, "max_steps": 100_000}}
    code = f"from lib.run import sharding; sharding.launch('tests.sharded:train', {argument!r}, 2)"
    launcher = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL
    )
    until((tmp_path / "long" / "history.jsonl").exists, process=launcher)
    family = psutil.Process(launcher.pid).children(recursive=True)
    assert len(family) >= 3, "torchrun and two workers"
    os.killpg(launcher.pid, signal.SIGKILL)  # what the pool does; the workers have sessions of their own
    launcher.wait()
    until(lambda: all(gone(child.pid) for child in family))


@pytest.mark.slow
def test_a_lost_process_is_started_once_more(job, tmp_path):
    argument = {**job[0], "folder": str(tmp_path / "lost"), "die_at": 5}
    reported = sharding.launch("tests.sharded:train", argument, 2)
    assert reported["step"] == 6
    assert_same(history(tmp_path / "lost"), history(job[1] / "one"), 1e-5)


@pytest.mark.slow
def test_a_member_whose_yaml_says_so_trains_over_two_processes(job, tiny, pool_socket):
    """The whole way: YAML, pool, torchrun, sampled KL while sharded, one process that scores the best checkpoint."""
    changes = {"model": {"name": str(job[1] / "model"), "quantization": "nf4", "peft": {"lora_r": 4}},
               "seed_list": [1], "training": {**TRAINING, "learning_rate": 1e-3}}  # fmt: skip
    records = {}
    for strategy in ("none", "fsdp"):
        run = tiny(
            run_id=strategy, **changes, compute={"strategy": strategy, "processes": 2 if strategy == "fsdp" else None}
        )
        members.prepare_inputs(run)
        work = members.submit(run)
        members.watch(work)
        (records[strategy],) = members.collect(work)
    assert [m.id for m in config.members(run)] == [records["fsdp"]["member"]]
    for name in ("validation_loss", "margin", "sampled_kl", "implicit_accuracy"):
        assert records["fsdp"][name] == pytest.approx(records["none"][name], rel=1e-2, abs=1e-4), name
