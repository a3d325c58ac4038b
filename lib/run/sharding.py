"""One member over several devices: processes started by torchrun, weights and adapters sharded over them with FSDP2.

    launch("lib.run.sharding:train", argument, count=4)     in place of a study's own training: streams, waits, raises

Every process loads the same model, `shard` leaves it a part of each decoder layer, and the batch of a step is shared
out by rows. Checkpoints are gathered to the full adapters and optimizer state, so any number of processes resumes them.
`accelerate.notebook_launcher` cannot do this: it refuses once bitsandbytes has been imported.
"""

# Sharded stands in front of a trainer that has the attributes.
# pyright: reportAttributeAccessIssue=false

import contextlib
import json
import os
import pickle
import pkgutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader

from lib import config, models, record, training
from lib.errors import MissingError
from lib.run import work
from lib.run.pool import end_with_parent

# ---- starting a job ----


def launch(target: str, argument: dict, count: int, threads: int = 1) -> Any:
    """Call `module:function`(argument) in `count` processes; what rank 0 returned.

    Output is streamed to stdout. An exception in a process ends the others and is raised here; where a process was lost
    the job is started once more (its member resumes). Whatever ends this function ends the job.
    """
    if torch.cuda.is_available() and torch.cuda.device_count() < count:
        found = f"{torch.cuda.device_count()} GPUs given to this member"
        fix = f"a machine with {count} GPUs, with --jobs left out; or --set compute.strategy=none"
        raise MissingError("compute.gpus", found, f"{count}", fix)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=0"]
    torchrun += [f"--nproc-per-node={count}", "--module", "lib.run.sharding"]
    for then in ("once more, from the last checkpoint", "given up"):
        with tempfile.TemporaryDirectory(prefix="study-job-") as folder:
            request = Path(folder) / "request.json"
            request.write_text(json.dumps({"target": target, "argument": argument, "folder": folder}))
            # In this process group, so that whoever ends a member by its group ends torchrun too; the workers watch
            # torchrun, which does not outlive an exception here.
            job = subprocess.run([*torchrun, str(request)], stderr=subprocess.STDOUT, env=environment, cwd=config.ROOT)
            for error in Path(folder).glob("*.error"):  # our own workers'
                raise pickle.loads(error.read_bytes())
            if job.returncode == 0:
                return pickle.loads((Path(folder) / "result").read_bytes())
        lost = f"a process of {target} was lost (torchrun ended with {job.returncode}, as logged above); {then}"
        print(lost, flush=True)
    raise RuntimeError(lost)


def worker(request: dict) -> None:
    """One process of a job, started by torchrun: joins the others, calls the target, leaves its result or its
    exception."""
    folder = Path(request["folder"])
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        result = pkgutil.resolve_name(request["target"])(request["argument"])
        if training.rank() == 0:
            (folder / "result").write_bytes(pickle.dumps(result))
        dist.barrier()
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        if isinstance(error, RuntimeError) and "/torch/distributed/" in where:
            raise  # a collective that another process left: not the cause
        try:
            content = pickle.dumps(error)
        except Exception:  # an exception that cannot be pickled still says what it was
            content = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
        record.write_bytes(folder / f"{training.rank()}.error", content)
        raise
    finally:
        dist.destroy_process_group()


def train(argument: dict) -> training.Outcome:
    """One process's share in training the member that `argument` (of lib.run.work.train) names, whose study has
    `fit(member, folder, shared, kind)`; its checkpoints are left for one process to score."""
    member = work.member_of(argument["spec"])
    study = config.study_module(member.run.study)
    return study.fit(member, Path(argument["folder"]), Path(argument["inputs"]), sharded_class)


# ---- inside a job ----


def backbone(model: nn.Module) -> nn.Module:
    """The decoder stack under adapters and head."""
    return models.unwrapped(model).base_model


def shard(model: nn.Module) -> nn.Module:
    """Shard every decoder layer, and what is around them in the backbone, over the processes (FSDP2), in place.

    The head stays whole on each process: it is scored in chunks outside of its own forward. NF4 weights need a floating
    storage type (model loaded with quant_storage = its dtype): FSDP does not shard integers.
    """
    base = models.unwrapped(model)
    for module in model.modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            module.quant_state = state  # the sharded parameter loses it; bitsandbytes looks for it here
    stack = backbone(model)
    mesh = init_device_mesh("cuda" if next(model.parameters()).is_cuda else "cpu", (training.world(),))
    whole = set(base.get_output_embeddings().parameters())  # tied embeddings included
    for layer in stack.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(stack, mesh=mesh, ignored_params=whole)
    base._is_fsdp_managed_module = True  # generate() then keeps the processes in step
    base._is_distributed_loading_by_transformers = True  # Trainer: neither DDP around it nor another sharding
    return model


def full(value: Any) -> Any:
    """A sharded tensor gathered, on the CPU, anything else as it is; all processes must call it together."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor laid out as `parameter` is: this process's part of it, where that is sharded."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value.to(parameter.device)
    mesh, placements = parameter.device_mesh, parameter.placements
    # every process has read the same file: nothing is sent
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)


class Sharded:
    """In front of a StudyTrainer: what it does otherwise where its model is sharded. Every process draws the same
    batches, of which the study's collator takes its share; losses are scaled by the number of processes, because FSDP
    averages gradients. Checkpoints are those of one process, written by rank 0."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        shard(self.model)  # after whatever adds, removes or casts parameters
        self.is_distributed_loading_by_transformers = True

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        # accelerate would deal out whole batches, repeat rows to fill up the last round, and lose the epoch on a resume
        batches = loader.batch_sampler.batch_sampler
        plain = DataLoader(loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn)
        return prepare_data_loader(plain, self.accelerator.device, num_processes=1, process_index=0, put_on_device=True)

    @contextlib.contextmanager
    def deferred_reduction(self):
        """Without the reduction of gradients, which only the last micro-batch of a step needs."""
        stack = backbone(self.model)
        stack.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            stack.set_requires_gradient_sync(True)

    _defer_fsdp_gradient_reduction = deferred_reduction  # transformers' name, for accumulation

    def _get_grad_norm(self, model, grad_norm=None):
        return full(super()._get_grad_norm(model, grad_norm))

    def _save(self, output_dir=None, state_dict=None):
        backbone(self.model).reshard()
        state = {name: full(p.detach()).cpu() for name, p in self.model.named_parameters() if p.requires_grad}
        if self.args.should_save:
            super()._save(output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir):
        state = self.optimizer.state_dict()
        each = state["state"].items()
        state["state"] = {index: {key: full(value) for key, value in values.items()} for index, values in each}
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        is_adapter = hasattr(self.model, "peft_config")  # in whose file the adapter's name is left out
        saved = load_file(Path(resume_from_checkpoint) / f"{'adapter_' * is_adapter}model.safetensors")
        adapter = f".{self.model.active_adapter}." if is_adapter else "."
        backbone(self.model).reshard()
        trained = {name.replace(adapter, "."): p for name, p in self.model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, value in saved.items():
                trained[name].copy_(like(value, trained[name]))

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            return
        state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]  # as `state` numbers them
        for index, values in state["state"].items():
            values |= {key: like(x, parameters[index]) for key, x in values.items() if torch.is_tensor(x)}
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))


def sharded_class(trainer: type) -> type:
    """The trainer class for a sharded model."""
    return type(f"Sharded{trainer.__name__}", (Sharded, trainer), {})


if __name__ == "__main__":
    end_with_parent()  # torchrun gives each worker a session of its own, where nobody's group kill reaches it
    # by its own name: the functions above must be those that the study's modules import
    pkgutil.resolve_name("lib.run.sharding:worker")(json.loads(Path(sys.argv[1]).read_text()))
    os._exit(0)  # all is written; now and then one aborted as it unloaded its libraries, and its job began once more
