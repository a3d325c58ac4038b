"""Shared by the tests: a tiny study on disk and a pool of forked workers."""

import gc
import os
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
os.environ["STUDY_CACHE"] = str(ROOT / ".cache" / "tests")  # what members share is made once for all tests
os.environ.setdefault("OMP_NUM_THREADS", "1")
PATIENCE = (
    600.0  # seconds: a deadline is there so that what hangs ends, and says nothing of how fast a machine has to be
)

gc.disable()  # until all that the tests import is there: the collector need not look at it


def pytest_collection_finish():
    gc.collect()
    gc.freeze()
    gc.enable()


TINY = {
    "run_id": "tiny", "method": "td_dpo", "role": "proposed",
    "model": {"name": "made", "recipe": {"vocab_size": 320, "hidden_size": 32, "layers": 2, "heads": 2, "sft_steps": 8,
                                         "sft_batch_size": 8, "sft_learning_rate": 3e-3, "seed": 0}},
    "dataset": {"name": "generated", "train_pairs": 64, "validation_pairs": 16, "test_pairs": 16},
    "training": {
        "max_steps": 12, "global_batch_size": 8, "per_device_train_batch_size": 8, "learning_rate": 1e-3,
        "warmup_ratio": 0.1, "eval_steps": 4, "save_steps": 4,
    },
    "loss": {"name": "td_dpo", "beta": 0.05, "tau": 1.0},
    "evaluation": {"questions": 2, "max_new_tokens": 8, "kl_prompts": 2, "judge": "oracle"},
    "optuna": {"n_trials": 0}, "seed_list": [1, 2], "grid": None, "wandb": {"mode": "disabled"},
}  # fmt: skip


def until(truth, what="it did not come about", process=None):
    """Wait until `truth()`, which is returned; not forever, and not for a `process` that has ended without it."""
    deadline = time.monotonic() + PATIENCE
    while not (found := truth()):
        ended = process is not None and process.poll() is not None
        if ended and (found := truth()):  # the last that it did
            break
        assert not ended, f"the process ended with {process.returncode}: {what() if callable(what) else what}"
        assert time.monotonic() < deadline, f"not within {PATIENCE:g} s: {what() if callable(what) else what}"
        time.sleep(0.02)
    return found


def text_of(path):
    """What stands in a file that another process writes; "" where it is not there yet."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def gone(pid):
    """Whether this process has ended, reaped or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="session")
def pool_socket():
    """One pool for the session, with everything imported, as the runner has it."""
    from lib.run import pool

    own = pool.Pool(2)
    os.environ["STUDY_POOL"] = own.socket
    yield own
    own.close()
    os.environ.pop("STUDY_POOL", None)


@pytest.fixture(autouse=True)
def outputs_put_back(monkeypatch):
    """--results-dir moves the outputs of a whole process and is repeated in its messages, and so in the tests after one
    that gives it; a command whose runs want no GPU hides those there are."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if cli := sys.modules.get("lib.run.cli"):
        monkeypatch.setattr(cli, "OUTPUTS", cli.OUTPUTS)
        monkeypatch.setattr(cli.plan, "PLACE", "")
    yield
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if shown is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = shown


@pytest.fixture
def bare(monkeypatch):
    """A pool that preloads nothing: starts in a moment."""
    from lib.run import pool

    own = pool.Pool(2, bare=True)
    monkeypatch.setenv("STUDY_POOL", own.socket)
    yield own
    own.close()


@pytest.fixture
def tiny(tmp_path):
    """A run of one cell and two seeds that trains in about a second, in a results folder of its own."""
    from lib import config

    def make(**changes):
        path = tmp_path / "params" / "td_dpo" / "laptop" / "tiny.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump({**TINY, **changes}))
        return config.load_run(path, study="td_dpo", scale="laptop", mode="full", results_dir=tmp_path / "results")

    return make
