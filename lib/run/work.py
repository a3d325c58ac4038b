"""What the pool's processes do for a run: train one member, prepare what members share, measure. See lib/run/members.py."""

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

from filelock import FileLock

from lib import config, record
from lib.errors import StudyError, failure_status
from lib.run import ideas, model_card

# The optimizer's moments are twice the trained weights, which made a finished laptop study 615 MB.
ONLY_FOR_RESUME = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth")


def run_of(spec: dict):
    """The run that an argument of a process describes."""
    return config.restore(spec["config"], study=spec["study"], scale=spec["scale"], mode=spec["mode"])


def member_of(spec: dict) -> config.Member:
    """The member that a member.json describes."""
    return config.Member(run=run_of(spec), cell=spec["cell"], cell_name=spec["cell_name"], seed=spec["seed"])


def member(argument: dict) -> None:
    """`train` in a process of its own: asked to stop (Ctrl-C), it saves a checkpoint after the step it is in and
    ends."""
    record.catch_stop_requests()
    train(argument)


@contextlib.contextmanager
def record_errors(folder: Path):
    """What ends the block goes into the log and into error.json."""
    try:
        yield
    except BaseException as error:
        traceback.print_exc()
        said = {"exception": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        said = {name: record.redact(text) for name, text in said.items()}
        record.write_json(folder / "error.json", {"status": failure_status(error), **said})
        raise


def train(argument: dict) -> None:
    """Train one member; the last thing written is the sentinel with this attempt's nonce."""
    folder, spec = Path(argument["folder"]), argument["spec"]
    with record_errors(folder):
        member, options, started = member_of(spec), {}, time.monotonic()
        compute = member.run.compute
        ideas.adopt(member.run)
        if compute.devices > 1:  # by name: sharding imports this module
            sharding = importlib.import_module("lib.run.sharding")
            options["outcome"] = sharding.launch("lib.run.sharding:train", argument, compute.devices, compute.threads)
        metrics = config.study_module(spec["study"]).train(member, folder, Path(argument["inputs"]), **options)
        metrics = record.finite({**metrics, "seconds": round(time.monotonic() - started, 3)})
        if metrics.get("status") not in record.FINISHED:
            raise StudyError(str(folder), f"status {metrics.get('status')!r}", "completed or diverged")
        record.write_json(folder / "metrics.json", metrics)
        model_card.write(folder)
        done = {"run_id": spec["run_id"], "member": spec["member"], "status": metrics["status"]}
        record.write_json(folder / "done.json", {**done, "key": argument["key"], "nonce": argument["nonce"]})
        drop_training_state(folder)


def drop_training_state(folder: Path) -> None:
    """Remove from a finished member's checkpoints what only a resume would read; weights, adapters and markers stay, but
    those of a search's trials, which nobody loads: 50 of each method would be hundreds of GB at paper scale."""
    if folder.parent.name == "trials":
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for checkpoint in (folder / "checkpoints").glob("checkpoint-*"):
        for path in (path for pattern in ONLY_FOR_RESUME for path in checkpoint.glob(pattern)):
            with contextlib.suppress(OSError):  # the member is finished whether or not this can be removed
                path.unlink()


def prepare(argument: dict) -> None:
    """Make what a seed's members share, in a folder of its own that takes its final name when it is whole."""
    run, final, partial = run_of(argument), Path(argument["final"]), Path(argument["folder"])
    with FileLock(f"{partial}.lock"):  # of a runner that was killed a moment ago, it may still be at work
        if (final / "complete.json").exists():
            return
        (partial / "error.json").unlink(missing_ok=True)
        record.remove_temporary(partial)
        with record_errors(partial):
            started = time.monotonic()
            config.study_module(run.study).prepare(run, partial)
            about = {"study": run.study, "scale": run.scale, "mode": run.mode, "said": run.compute.prepare_seconds}
            record.write_json(partial / "complete.json", {**about, "seconds": round(time.monotonic() - started, 3)})
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)


def measure(argument: dict) -> None:
    """A measurement of the study's own, in a slot and in an interpreter of its own: what is forked shares how memory lies,
    on which times depend."""
    if argument["mode"] == "trial":
        measure_here(argument)
        return
    code = "import json, sys; from lib.run import work; work.measure_here(json.load(sys.stdin))"
    command, environment = [sys.executable, "-P", "-c", code], {**os.environ, "PYTHONPATH": str(config.ROOT)}
    subprocess.run(command, input=json.dumps(argument), text=True, check=True, env=environment)


def measure_here(argument: dict) -> None:
    """Its `function`(run, folder, shared), whose rows go into the folder."""
    function, run = getattr(config.study_module(argument["study"]), argument["function"]), run_of(argument)
    folder = Path(argument["folder"])
    with in_process(run.compute.threads, not run.compute.gpus):
        rows = function(run, folder, Path(argument["inputs"]))
    record.write_jsonl(folder / f"{argument['function']}.jsonl", rows)


@contextlib.contextmanager
def in_process(count: int, cpu: bool):
    """In this kernel what a process of the pool would have: as many threads, on which sums of floats depend, and no GPU
    where none is asked for."""
    import torch

    if cpu and torch.cuda.is_available():
        found = "0, and this kernel, in which members run (STUDY_SLOTS is 0), sees a GPU"
        fix = "CUDA_VISIBLE_DEVICES= before JupyterLab starts, or compute.gpus: 1"
        raise StudyError("compute.gpus", found, "a kernel that sees none", fix)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
