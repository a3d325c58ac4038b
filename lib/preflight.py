"""Is what a run needs on this machine? GPU, hub access and licence, W&B key, disk, judge; each with what to do.

Asked before anything starts. A `Machine` answers the questions, so that tests can answer them too. No value of a key or
token is ever part of a finding.
"""
from __future__ import annotations

import netrc
import os
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlparse

from lib.run_values import is_hub_id
from lib.schema import Finding, Run

GATED = ("meta-llama/",)  # owners whose models need an accepted licence, known even where the hub cannot be asked
NEEDED_GB = {"laptop": 1, "paper": 60}  # paper: a 7B model (14), its data, and adapters with optimiser state per member
HUB_KEYS = (("model", "models", ""), ("dataset", "datasets", "datasets/"))  # section, API name, page prefix
SECONDS = 3.0


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_gb: float
    capability: tuple[int, int]


def visible_gpus(environ: Mapping[str, str]) -> list[Gpu]:
    """The GPUs that CUDA would show, by NVML (which does not initialise CUDA); [] without a driver."""
    import pynvml
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        named = environ.get("CUDA_VISIBLE_DEVICES")
        wanted = [str(i) for i in range(count)] if named is None else [d.strip() for d in named.split(",") if d.strip()]
        found = []
        for device in wanted:
            if device.lstrip("-").isdigit():
                if not 0 <= int(device) < count:
                    break  # as CUDA does: a bad index hides it and all that follow
                handle = pynvml.nvmlDeviceGetHandleByIndex(int(device))
            else:
                handle = pynvml.nvmlDeviceGetHandleByUUID(device)
            found.append(Gpu(pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetMemoryInfo(handle).total / 1e9,
                             tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))))
        return found
    except pynvml.NVMLError:
        return []


@lru_cache(maxsize=32)
def ask_hub(url: str, token: str | None) -> tuple[int | None, str]:
    """(HTTP status, the hub's error code) of a GET within SECONDS; (None, "") where nothing answers."""
    answer: list[tuple[int | None, str]] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url)
            if token:  # not sent on to where a redirect leads
                request.add_unredirected_header("Authorization", f"Bearer {token}")
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                answer.append((response.status, ""))
        except urllib.error.HTTPError as error:
            hub = error.headers.get("X-Request-Id") is not None or error.headers.get("X-Error-Code") is not None
            answer.append((error.code, error.headers.get("X-Error-Code") or "") if hub else (None, ""))  # else a proxy
        except (OSError, ValueError):
            answer.append((None, ""))

    # In a thread, because urlopen's time-out does not cover name resolution.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return answer[0] if answer else (None, "")


def _free_bytes(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@dataclass(frozen=True)
class Machine:
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    gpus: Callable[[Mapping[str, str]], list[Gpu]] = visible_gpus
    hub: Callable[[str, str | None], tuple[int | None, str]] = ask_hub
    free_bytes: Callable[[Path], int] = _free_bytes


def missing(run: Run, machine: Machine | None = None) -> list[Finding]:
    """What keeps `run` from being done here in full; a trial needs nothing (it uses stand-ins)."""
    if run.mode == "trial":
        return []
    machine = machine or Machine()
    return [*_gpus(run, machine), *_hub(run, machine), *wandb(run, machine), *_disk(run, machine), *_judge(run, machine)]


def _gpus(run: Run, machine: Machine) -> list[Finding]:
    if not run.compute.gpus:
        return []
    found, floor = machine.gpus(machine.environ), run.compute.min_gpu_memory_gb or 0
    elsewhere = "run it on a machine that has them (./run_all.sh full --scale laptop needs none)"
    size = f" with at least {floor:g} GB" if floor else ""
    needed = f"{run.compute.gpus} GPU{'s' * (run.compute.gpus > 1)}{size}"
    if not found:
        hidden = "; CUDA_VISIBLE_DEVICES hides some" if "CUDA_VISIBLE_DEVICES" in machine.environ else ""
        return [Finding("error", "compute.gpus", f"{needed} needed for each member, none found{hidden}", elsewhere)]
    # 2 % of tolerance: a card sold as 80 GB reports 79 to 85.
    if sum(gpu.memory_gb >= 0.98 * floor for gpu in found) < run.compute.gpus:
        there = ", ".join(f"{gpu.name} ({gpu.memory_gb:.0f} GB)" for gpu in found)
        return [Finding("error", "compute.min_gpu_memory_gb", f"{needed} needed for each member, found {there}",
                        elsewhere + ", or lower training.per_device_train_batch_size and then compute.min_gpu_memory_gb")]
    wanted = (run.compute.gpu_type or "").split("-")[0].lower()
    differing = [gpu.name for gpu in found if wanted not in gpu.name.lower()]
    other = [Finding("warning", "compute.gpu_type", f"{name} instead of {run.compute.gpu_type}: times are not comparable "
                     "and sums round differently", "compute.gpu_type: null says that any will do") for name in differing[:1]]
    if getattr(run.model, "torch_dtype", None) == "bfloat16" and any(gpu.capability < (8, 0) for gpu in found):
        old = next(gpu for gpu in found if gpu.capability < (8, 0))
        return [Finding("error", "model.torch_dtype", f"bfloat16, which {old.name} (compute capability "
                        f"{'.'.join(map(str, old.capability))}) does not have", "an Ampere GPU or newer, or float32"), *other]
    return other


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("HOME") or Path.home())


def _hf_home(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_CACHE_HOME") or _home(environ) / ".cache"
    return Path(environ.get("HF_HOME") or Path(base) / "huggingface").expanduser()


def token(environ: Mapping[str, str]) -> str | None:
    """The hub token as huggingface_hub finds it. Never log it."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if environ.get(name, "").strip():
            return environ[name].strip()
    path = Path(environ.get("HF_TOKEN_PATH") or _hf_home(environ) / "token")
    try:
        return path.read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def is_cached(environ: Mapping[str, str], api: str, name: str, revision: str | None) -> bool:
    """Whether a snapshot of this revision (of any, where none is pinned) is in the hub's cache."""
    cache = Path(environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or _hf_home(environ) / "hub")
    repository = cache / f"{api}--{name.replace('/', '--')}"
    if revision and (repository / "refs" / revision).is_file():
        revision = (repository / "refs" / revision).read_text().strip()
    snapshots = repository / "snapshots"
    folders = [snapshots / revision] if revision else list(snapshots.glob("*"))
    return any(folder.is_dir() and any(folder.iterdir()) for folder in folders)


def _hub(run: Run, machine: Machine) -> list[Finding]:
    found, environ = [], machine.environ
    endpoint = environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    offline = environ.get("HF_HUB_OFFLINE", "").strip().lower() in {"1", "true", "yes", "on"}
    have_token = token(environ)
    for section, api, prefix in HUB_KEYS:
        part = getattr(run, section)
        name, revision = ("nyu-mll/glue" if part.name == "glue" else part.name), getattr(part, "revision", None)
        if not is_hub_id(name) or is_cached(environ, api, name, revision):
            continue
        key, page = f"{section}.name", f"{endpoint}/{prefix}{name}"
        fetch = f"hf download {name}" + (" --repo-type dataset" if prefix else "") + (f" --revision {revision}" if revision
                                                                                     else "")
        by_hand = f"{fetch} --local-dir DIR where there is a network, then --set {key}=DIR"
        licence = f"accept the licence at {page}, then: hf auth login (or set HF_TOKEN)"
        if not have_token and name.startswith(GATED):
            found.append(Finding("error", key, f"{name} is gated and no hub token is set", licence))
        if offline:
            found.append(Finding("error", key, f"{name} is not in the cache, and HF_HUB_OFFLINE is set",
                                 f"unset HF_HUB_OFFLINE, or {by_hand}"))
            continue
        status, code = machine.hub(f"{endpoint}/api/{api}/{name}/auth-check", have_token)
        if status is None:
            found.append(Finding("error", key, f"{name} is not in the cache, and {urlparse(endpoint).netloc} does not "
                                 f"answer within {SECONDS:g} s", by_hand))
        elif code == "GatedRepo" or status == 403:
            if have_token or not name.startswith(GATED):
                found.append(Finding("error", key, f"{name} is gated and access was refused", licence))
        elif status in (401, 404) and not (name.startswith(GATED) and not have_token):
            found.append(Finding("error", key, f"{name}: the hub has no such {section}, or it is private",
                                 f"correct {key}, or hf auth login for a private one"))
    return found


def wandb_host(environ: Mapping[str, str]) -> str:
    return urlparse(environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""


def wandb_key(environ: Mapping[str, str]) -> bool:
    """Whether the W&B client will find a key for its server; the key itself is not looked at."""
    if environ.get("WANDB_API_KEY", "").strip():
        return True
    path = Path(environ.get("NETRC") or _home(environ) / ".netrc")
    try:
        return bool(netrc.netrc(str(path)).authenticators(wandb_host(environ)))
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return False


def wandb(run: Run, machine: Machine | None = None) -> list[Finding]:
    """A key for W&B where the run is to be mirrored there while it runs."""
    from lib.config import wandb_mode
    machine = machine or Machine()
    if wandb_mode(run) != "online" or wandb_key(machine.environ):
        return []
    return [Finding("error", "wandb.mode", f"online, and there is no W&B key for {wandb_host(machine.environ)}",
                    "wandb login (or set WANDB_API_KEY), or --set wandb.mode=offline")]


def _disk(run: Run, machine: Machine) -> list[Finding]:
    free, needed = machine.free_bytes(run.results_dir) / 1e9, NEEDED_GB[run.scale]
    if free >= needed:
        return []
    return [Finding("error", "results_dir", f"{free:.1f} GB free at {run.results_dir}, about {needed} GB needed",
                    "free space there, or move the repository to a larger disk")]


def _judge(run: Run, machine: Machine) -> list[Finding]:
    if getattr(run.evaluation, "judge", None) != "mt_bench":
        return []
    if any(machine.environ.get(name, "").strip() for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL")):
        return []
    return [Finding("warning", "evaluation.judge", "no judge endpoint: training goes on and judging stays pending",
                    "set OPENAI_API_KEY, or OPENAI_BASE_URL of any compatible server, and run the same command again")]
