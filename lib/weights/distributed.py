"""One run over several devices: processes started by torchrun, weights and adapters sharded over them with FSDP2.

    launch("lib.td_dpo.member:train_share", argument, count=4)     from a cell or a member: streams, waits, raises

Every process loads the same model, `shard` leaves it a part of each decoder layer, and the batch of a step is shared
out by rows. Checkpoints are gathered to the full adapters and optimiser state, so any number of processes resumes them.
`accelerate.notebook_launcher` cannot do this: it refuses once bitsandbytes has been imported.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lib.errors import MissingError
from lib.run.importing import importing
from lib.run.parent import end_with_parent

ROOT = Path(__file__).resolve().parents[2]
TAIL = 40  # lines of its output that an error shows


class WorkerLost(RuntimeError):
    """A process of the job went away (killed, out of host memory) without an exception of its own."""


def world() -> int:
    """Processes of this job; 1 outside one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


# ---- starting a job ----


def launch(target: str, argument: dict, count: int, *, threads: int = 1) -> Any:
    """Call `module:function`(argument) in `count` processes; what rank 0 returned (plain data).

    Output is streamed to stdout. An exception in a process ends the others and is raised here; where a process was lost
    the job is started once more (its member resumes). Whatever ends this function ends the job.
    """
    if torch.cuda.is_available() and torch.cuda.device_count() < count:
        raise MissingError(
            "compute.gpus",
            f"{torch.cuda.device_count()} GPUs given to this member",
            f"{count}",
            f"./run_all.sh with --jobs unset on a machine with {count} GPUs, or compute.strategy: none",
        )
    for attempt in (1, 2):
        try:
            return _job(target, argument, count, threads)
        except WorkerLost as error:
            if attempt == 2:
                raise
            print(f"{error}; once more, from the last checkpoint", flush=True)


def _job(target: str, argument: dict, count: int, threads: int) -> Any:
    with tempfile.TemporaryDirectory(prefix="study-job-") as folder:
        request = Path(folder) / "request.json"
        request.write_text(json.dumps({"target": target, "argument": argument, "folder": folder}))
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        # In this process group, so that whoever ends a member by its group ends torchrun too; the workers watch
        # torchrun.
        job = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nnodes=1",
                f"--nproc-per-node={count}",
                "--max-restarts=0",
                "--module",
                "lib.weights.distributed",
                str(request),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            cwd=ROOT,
        )
        tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        try:
            for line in job.stdout:
                tail.append(line)
                print(line, end="", flush=True)
            code = job.wait()
        finally:
            _end(job)
        errors = [pickle.loads(path.read_bytes()) for path in Path(folder).glob("*.error")]  # our own workers'
        if errors:
            raise errors[0]
        if code:
            raise WorkerLost(
                f"a process of {target} was lost (torchrun ended with {code}); its last lines:\n{''.join(tail)}"
            )
        return json.loads((Path(folder) / "result.json").read_text())


def _end(job: subprocess.Popen) -> None:
    """End a job that still runs; torchrun passes SIGTERM on to its workers."""
    if job.poll() is None:
        job.terminate()
        try:
            job.wait(10)
        except subprocess.TimeoutExpired:
            job.kill()
            job.wait()
    job.stdout.close()


def worker(request: dict) -> None:
    """One process of a job, started by torchrun: joins the others, calls the target, leaves its result or its
    exception."""
    folder = Path(request["folder"])
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        module, function = request["target"].split(":")
        with importing():
            target = getattr(importlib.import_module(module), function)
        result = target(request["argument"])
        if rank() == 0:
            (folder / "result.json").write_text(json.dumps(result))
        dist.barrier()
    except BaseException as error:
        if (
            isinstance(error, RuntimeError)
            and "/torch/distributed/" in traceback.extract_tb(error.__traceback__)[-1].filename
        ):
            raise  # a collective that another process left: not the cause
        path = folder / f"{rank()}.error"
        try:
            path.with_suffix(".partial").write_bytes(pickle.dumps(error))
        except Exception:  # an exception that cannot be pickled still says what it was
            path.with_suffix(".partial").write_bytes(pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}")))
        path.with_suffix(".partial").rename(path)
        raise
    finally:
        dist.destroy_process_group()


# ---- inside a job ----


def share(rows: list) -> list:
    """This process's rows of a batch; the union over the processes is the batch."""
    return rows[rank() :: world()]


def total(value: int) -> int:
    """Sum over the processes."""
    return sum(gathered(value)) if world() > 1 else value


def gathered(value: Any) -> list:
    """The processes' values, by rank."""
    if world() == 1:
        return [value]
    values: list = [None] * world()
    dist.all_gather_object(values, value)
    return values


def agreed(value: Any) -> Any:
    """Rank 0's value, on every rank: what all must do alike although it was computed by each (sampled answers)."""
    if world() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def first(function: Callable[[], Any]) -> Any:
    """What `function` returns on rank 0, which alone calls it: for what changes files."""
    return agreed(function() if rank() == 0 else None)


def backbone(model: nn.Module) -> nn.Module:
    """The decoder stack under adapters and head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.base_model


def shard(model: nn.Module) -> nn.Module:
    """Shard every decoder layer, and what is around them in the backbone, over the processes (FSDP2), in place.

    The head stays whole on each process: it is scored in chunks outside of its own forward. NF4 weights need a floating
    storage type (model loaded with quant_storage = its dtype): FSDP does not shard integers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            module.quant_state = state  # the sharded parameter loses it; bitsandbytes looks for it here
    stack = backbone(model)
    mesh = init_device_mesh("cuda" if next(model.parameters()).is_cuda else "cpu", (world(),))
    head = base.get_output_embeddings()
    whole = set(head.parameters()) if head is not None else set()  # tied embeddings included
    for layer in stack.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(stack, mesh=mesh, ignored_params=whole)
    base._is_fsdp_managed_module = True  # generate() then keeps the processes in step
    base._is_distributed_loading_by_transformers = True  # Trainer: neither DDP around it nor another sharding
    return model


@contextlib.contextmanager
def deferred(model: nn.Module):
    """Without the reduction of gradients, which only the last micro-batch of a step needs."""
    stack = backbone(model)
    stack.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        stack.set_requires_gradient_sync(True)


def full(value: Any) -> Any:
    """`value` with every sharded tensor gathered, on the CPU; all processes must call it together."""
    from torch.distributed.tensor import DTensor

    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return {key: full(inner) for key, inner in value.items()}
    return [full(inner) for inner in value] if isinstance(value, list) else value


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters by name, gathered, on the CPU."""
    backbone(model).reshard()
    return {name: full(p.detach()).cpu() for name, p in model.named_parameters() if p.requires_grad}


def load_trained_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put gathered values of trained parameters (any subset) into a sharded model."""
    backbone(model).reshard()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(like(value, parameters[name]))


def like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor laid out as `parameter` is: this process's part of it, where that is sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value.to(parameter.device)
    # every process has read the same file: nothing is sent
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def optimizer_state(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """A gathered optimiser state_dict laid out for an optimiser of sharded parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    places = [index for group in state["param_groups"] for index in group["params"]]
    laid = {
        index: {
            key: like(value, parameter) if torch.is_tensor(value) else value
            for key, value in state["state"].get(index, {}).items()
        }
        for index, parameter in zip(places, parameters, strict=True)
    }
    return {**state, "state": {index: values for index, values in laid.items() if values}}


if __name__ == "__main__":
    end_with_parent()  # torchrun gives each worker a session of its own, where nobody's group kill reaches it
    # by its own name: the functions above must be those that the study's modules import
    importlib.import_module("lib.weights.distributed").worker(json.loads(Path(sys.argv[1]).read_text()))
