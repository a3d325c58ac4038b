"""Is what a run needs on this machine? GPU and its memory, hub access and license, disk, W&B key, data base, judge.

Asked before anything starts; each finding says what to do. No value of a key or token is ever part of one. Memory and
disk are estimated by counting, from the model's config.json and the run's settings: this finds what cannot fit, and is
no promise that what it lets pass will.
"""

from __future__ import annotations

import contextlib
import json
import netrc
import os
import shutil
import threading
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

from lib.config import Finding, Run, is_hub_id, members, study_module, wandb_mode
from lib.errors import StudyError
from lib.record import read_json
from lib.run import storage

SECONDS = 3.0  # that the hub is waited for
GATED = ("meta-llama/",)  # owners whose models need an accepted license, known even where the hub cannot be asked
NEEDED_GB = {"laptop": 0.2, "paper": 60}  # of disk, where no estimate can be made
DATA_GB = 1  # a preference data set, its cached tables and the prepared inputs
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # per weight: 4 bits, an 8-bit scale per 64 weights, a float per 256 scales
BYTES = {"float32": 4, "bfloat16": 2}
ADAM_BYTES = 16  # per trained weight, all in float32: the weight, its gradient and two moments
CONTEXT_BYTES = 1.0e9  # the CUDA context, its libraries and the allocator's slack
KEPT_CHECKPOINTS = 3  # while a member trains: the best, the last, and the one that is being written


# ---- the machine


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
        count, shown = pynvml.nvmlDeviceGetCount(), environ.get("CUDA_VISIBLE_DEVICES")
        gpus = []
        for device in map(str, range(count)) if shown is None else _listed(shown):
            if not device.lstrip("-").isdigit():
                handle = pynvml.nvmlDeviceGetHandleByUUID(device)
            elif 0 <= int(device) < count:
                handle = pynvml.nvmlDeviceGetHandleByIndex(int(device))
            else:
                break  # as CUDA does: a bad index hides it and all that follow
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total / 1e9
            capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
            gpus.append(Gpu(pynvml.nvmlDeviceGetName(handle), memory, capability))
        return gpus
    except pynvml.NVMLError:
        return []


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def ask_hub(url: str, token: str | None) -> tuple[int | None, str]:
    """(HTTP status, the hub's error code) of a GET within SECONDS; (None, "") where nothing answers."""
    return _get(url, token)[:2]


def read_hub(url: str, token: str | None) -> object:
    """The JSON that the hub answers; None where it does not."""
    try:
        return json.loads(_get(url, token)[2] or b"null")
    except ValueError:
        return None


@lru_cache(maxsize=32)
def _get(url: str, token: str | None) -> tuple[int | None, str, bytes]:
    answers: list[tuple[int | None, str, bytes]] = []

    def ask() -> None:
        with contextlib.suppress(OSError, ValueError):
            request = urllib.request.Request(url)
            if token:  # not sent on to where a redirect leads
                request.add_unredirected_header("Authorization", f"Bearer {token}")
            try:
                with urllib.request.urlopen(request, timeout=SECONDS) as response:
                    answers.append((response.status, "", response.read(1 << 22)))
            except urllib.error.HTTPError as error:
                if "X-Error-Code" in error.headers or "X-Request-Id" in error.headers:  # else it is a proxy's
                    answers.append((error.code, error.headers.get("X-Error-Code", ""), b""))

    # In a thread, because urlopen's time-out does not cover name resolution.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return answers[0] if answers else (None, "", b"")


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = Path(path)
    return path if path.exists() else _existing(path.parent)


@dataclass(frozen=True)
class Machine:
    """What can be asked of a machine; tests give their own answers."""

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    gpus: Callable[[Mapping[str, str]], list[Gpu]] = visible_gpus
    hub: Callable[[str, str | None], tuple[int | None, str]] = ask_hub
    read: Callable[[str, str | None], object] = read_hub
    free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(_existing(path)).free


def cluster_machine(address: str) -> Machine:
    """This machine with the GPUs of a Ray cluster, of which only number and kind are known here."""
    from lib.run import cluster

    return Machine(gpus=lambda environ: [Gpu(kind, float("inf"), (99, 0)) for kind in cluster.gpus(address)])


# ---- what is missing


def find_missing(runs: list[Run], machine: Machine | None = None) -> list[Finding]:
    """What keeps these runs, which share the disk, from being done here in full; each finding once. A trial needs
    nothing (it uses stand-ins)."""
    machine, found = machine or Machine(), []
    wanted = [run for run in runs if run.mode != "trial"]
    for run in wanted:
        own = getattr(study_module(run.study), "needs", lambda run: [])  # what only this study knows of
        found += [*_gpus(run, machine), *_hub(run, machine), *_storage(run), *wandb(run, machine)]
        found += own(run)
    return list(dict.fromkeys([*found, *(_disk(wanted, machine) if wanted else ())]))


def _gpus(run: Run, machine: Machine) -> Iterator[Finding]:
    if not run.compute.gpus:
        return
    found, floor = machine.gpus(machine.environ), run.compute.min_gpu_memory_gb or 0
    elsewhere = "run it on a machine that has them (./run_all.sh full --scale laptop needs none)"
    size = f" with at least {floor:g} GB" if floor else ""
    needed = f"{run.compute.gpus} GPU{'s' * (run.compute.gpus > 1)}{size} needed for each member"
    if not found:
        hidden = "; CUDA_VISIBLE_DEVICES hides some" if "CUDA_VISIBLE_DEVICES" in machine.environ else ""
        yield Finding("error", "compute.gpus", f"{needed}, none found{hidden}", elsewhere)
        return
    limit = "token_budget" if getattr(run.training, "token_budget", None) else "per_device_train_batch_size"
    # 2 % of tolerance: a card sold as 80 GB reports 79 to 85.
    if sum(gpu.memory_gb >= 0.98 * floor for gpu in found) < run.compute.gpus:
        there = ", ".join(f"{gpu.name} ({gpu.memory_gb:.0f} GB)" for gpu in found)
        fix = f"{elsewhere}, or lower training.{limit} and then compute.min_gpu_memory_gb"
        yield Finding("error", "compute.min_gpu_memory_gb", f"{needed}, found {there}", fix)
        return
    model = shape(settings(run, machine) or {}) if hasattr(run.model, "peft") else None
    largest = sorted((gpu.memory_gb for gpu in found), reverse=True)[run.compute.gpus - 1]
    if model and (gigabytes := training_bytes(run, model) / 1e9) > largest:
        value = getattr(run.training, limit)
        what = f"about {gigabytes:.0f} GB of GPU memory for a full-length batch ({limit} {value}), the GPU has {largest:.0f}"
        fix = f"--set training.{limit}={value // 2}, a larger GPU, compute.strategy: fsdp over several, or a shorter max_length"
        yield Finding("error", f"training.{limit}", what, fix)
        return
    kinds = list(dict.fromkeys(gpu.name for gpu in found))
    wanted = (run.compute.gpu_type or "").split("-")[0].lower()
    if len(kinds) > 1:  # members go to whichever GPU is free: nobody could say which of them made a record
        kind = next((name for name in kinds if wanted and wanted in name.lower()), kinds[0])
        what = f"GPUs of different kinds ({', '.join(kinds)}): a member would train on any of them, and sums round differently"
        fix = f"show the runs one kind: {_show_only(kind, found, machine.environ)}"
        yield Finding("error", "compute.gpu_type", what, fix)
        return
    old = next((gpu for gpu in found if gpu.capability < (8, 0)), None)
    if old and getattr(run.model, "torch_dtype", None) == "bfloat16":
        what = f"bfloat16, which {old.name} (compute capability {'.'.join(map(str, old.capability))}) does not have"
        yield Finding("error", "model.torch_dtype", what, "an Ampere GPU or newer, or float32")
    if wanted not in kinds[0].lower():
        what = f"{kinds[0]} instead of {run.compute.gpu_type}: times are not comparable and sums round differently"
        yield Finding("warning", "compute.gpu_type", what, "compute.gpu_type: null says that any will do")


def _show_only(kind: str, found: list[Gpu], environ: Mapping[str, str]) -> str:
    """The command that leaves GPUs of one kind."""
    if environ.get("STUDY_CLUSTER"):
        return f".venv/bin/ray start --num-gpus=0 on the nodes whose GPUs are not {kind}"
    devices = _listed(environ.get("CUDA_VISIBLE_DEVICES", "")) or map(str, range(len(found)))
    return "CUDA_VISIBLE_DEVICES=" + ",".join(d for d, gpu in zip(devices, found, strict=False) if gpu.name == kind)


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
    try:
        return Path(environ.get("HF_TOKEN_PATH") or _hf_home(environ) / "token").read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def hub_cache(environ: Mapping[str, str]) -> Path:
    """Where the hub's client keeps what it downloads."""
    return Path(environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or _hf_home(environ) / "hub")


def cached_snapshot(environ: Mapping[str, str], kind: str, name: str, revision: str | None) -> Path | None:
    """The snapshot of this revision (of any, where none is pinned) in the hub's cache; `kind`: models or datasets."""
    repository = hub_cache(environ) / f"{kind}--{name.replace('/', '--')}"
    if revision and (repository / "refs" / revision).is_file():
        revision = (repository / "refs" / revision).read_text().strip()
    folders = (repository / "snapshots").glob(revision or "*")
    return next((folder for folder in folders if folder.is_dir() and any(folder.iterdir())), None)


def _endpoint(environ: Mapping[str, str]) -> str:
    return environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _offline(environ: Mapping[str, str]) -> bool:
    return environ.get("HF_HUB_OFFLINE", "").strip().lower() in {"1", "true", "yes", "on"}


def _hub(run: Run, machine: Machine) -> Iterator[Finding]:
    """The model and the data are cached, or the hub gives them to this user."""
    endpoint, have_token = _endpoint(machine.environ), token(machine.environ)
    for section, kind, prefix in (("model", "models", ""), ("dataset", "datasets", "datasets/")):
        part, key = getattr(run, section), f"{section}.name"
        name, revision = part.name, getattr(part, "revision", None)
        if not is_hub_id(name) or cached_snapshot(machine.environ, kind, name, revision):
            continue
        options = " --repo-type dataset" * bool(prefix) + (f" --revision {revision}" if revision else "")
        by_hand = f"hf download {name}{options} --local-dir DIR where there is a network, then --set {key}=DIR"
        license = f"accept the license at {endpoint}/{prefix}{name}, then: .venv/bin/hf auth login (or set HF_TOKEN)"
        untold = not have_token and name.startswith(GATED)
        if untold:
            yield Finding("error", key, f"{name} is gated and no hub token is set", license)
        if _offline(machine.environ):
            what = f"{name} is not in the cache, and HF_HUB_OFFLINE is set"
            yield Finding("error", key, what, f"unset HF_HUB_OFFLINE, or {by_hand}")
            continue
        status, code = machine.hub(f"{endpoint}/api/{kind}/{name}/auth-check", have_token)
        if status is None:
            what = f"{name} is not in the cache, and {urlparse(endpoint).netloc} does not answer within {SECONDS:g} s"
            yield Finding("error", key, what, by_hand)
        elif (code == "GatedRepo" or status == 403) and not untold:
            yield Finding("error", key, f"{name} is gated and access was refused", license)
        elif status in (401, 404) and not untold:
            what, fix = f"{name}: the hub has no such {section}, or it is private", "hf auth login for a private one"
            yield Finding("error", key, what, f"correct {key}, or .venv/bin/{fix}")


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


def wandb(run: Run, machine: Machine | None = None) -> Iterator[Finding]:
    """A key for W&B where the run is to be mirrored there while it runs."""
    environ = (machine or Machine()).environ
    if wandb_mode(run) == "online" and not wandb_key(environ):
        fix = ".venv/bin/wandb login (or set WANDB_API_KEY), or --set wandb.mode=offline"
        yield Finding("error", "wandb.mode", f"online, and there is no W&B key for {wandb_host(environ)}", fix)


def _storage(run: Run) -> Iterator[Finding]:
    """A search's data base: its URL, the variables it names, its driver."""
    try:
        storage.url_of(run)
    except StudyError as error:
        yield Finding("error", error.where, f"{error.found}; expected {error.expected}", error.fix)


def _disk(runs: list[Run], machine: Machine) -> Iterator[Finding]:
    """Download, data and the checkpoints of the members that are still to train, against what is free where they go."""
    cache, needed, downloads = hub_cache(machine.environ), defaultdict(float), {}
    for run in runs:
        model = shape(settings(run, machine) or {}) if run.scale == "paper" else None
        if model is None:
            continue
        folder = Path(run.results_dir) / run.run_id / "members"
        left = sum(not (folder / member.id / "done.json").exists() for member in members(run))
        at_once = min(left, max(1, len(machine.gpus(machine.environ))))
        weights = 4 * trained_weights(run, model)  # of the best and the last checkpoint; while it trains, with moments
        needed[run.results_dir] += left * 2 * weights + at_once * KEPT_CHECKPOINTS * 3 * weights
        name, revision = run.model.name, getattr(run.model, "revision", None)
        if is_hub_id(name) and not cached_snapshot(machine.environ, "models", name, revision):
            downloads[name] = model_bytes(model, "none", "bfloat16")
    if needed:
        needed[cache] += sum(downloads.values()) + DATA_GB * 1e9
    else:
        needed[runs[0].results_dir] = max(NEEDED_GB[run.scale] for run in runs) * 1e9
    places, total = {}, defaultdict(float)  # folders of one file system share what is free
    for path, wanted in needed.items():
        total[places.setdefault(_existing(path).stat().st_dev, _existing(path))] += wanted
    for place, wanted in total.items():
        if (free := machine.free_bytes(place)) < wanted:
            parts = f" (downloads {sum(downloads.values()) / 1e9:.0f} GB, the rest checkpoints)" if downloads else ""
            what = f"{free / 1e9:.1f} GB free at {place}, about {wanted / 1e9:.3g} GB needed{parts}"
            fix = "free space there, STUDY_OUTPUTS=DIR and STUDY_CACHE=DIR on a larger disk, or fewer runs at a time (--run)"
            yield Finding("error", "results_dir", what, fix)


# ---- what a large model needs, by counting


class Shape(NamedTuple):
    """Of a decoder (Llama, Mistral, Qwen) or, as an upper bound, an encoder (DeBERTa): what its size follows from."""

    layers: int
    hidden: int
    inner: int
    linear: list[tuple[int, int]]  # (inputs, outputs) of one layer's seven projections
    embeddings: int  # weights

    @property
    def weights(self) -> int:
        """Weights of the layers' projections, which quantization and adapters touch."""
        return self.layers * sum(i * o for i, o in self.linear)


def settings(run: Run, machine: Machine) -> dict | None:
    """The config.json of the run's model: of a local folder, of the cache, or asked of the hub; None without it."""
    name, revision = run.model.name, getattr(run.model, "revision", None)
    if not is_hub_id(name):
        return read_json(Path(name) / "config.json")
    if snapshot := cached_snapshot(machine.environ, "models", name, revision):
        return read_json(snapshot / "config.json")
    if _offline(machine.environ):
        return None
    url = f"{_endpoint(machine.environ)}/{name}/resolve/{revision or 'main'}/config.json"
    found = machine.read(url, token(machine.environ))
    return found if isinstance(found, dict) else None


def shape(settings: dict) -> Shape | None:
    """The shape that a model's config.json describes; None where it is not of this kind."""
    try:
        heads, hidden, inner = (settings[k] for k in ("num_attention_heads", "hidden_size", "intermediate_size"))
        size = settings.get("head_dim") or hidden // heads
        query, key = heads * size, (settings.get("num_key_value_heads") or heads) * size
        linear = [(hidden, query), (hidden, key), (hidden, key), (query, hidden)]
        linear += [(hidden, inner), (hidden, inner), (inner, hidden)]
        embeddings = settings["vocab_size"] * hidden * (1 if settings.get("tie_word_embeddings") else 2)
        return Shape(settings["num_hidden_layers"], hidden, inner, linear, embeddings)
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def model_bytes(model: Shape, quantization: str, dtype: str) -> float:
    """The loaded model: quantized projections, the rest in its computing type."""
    wide = BYTES[dtype]
    return model.weights * (NF4_BYTES if quantization == "nf4" else wide) + model.embeddings * wide


def adapter_weights(model: Shape, rank: int) -> int:
    """LoRA's A and B on every projection (all-linear)."""
    return model.layers * rank * sum(i + o for i, o in model.linear)


def trained_weights(run: Run, model: Shape) -> int:
    """At most: adapters are counted as if they were on every projection, an encoder as if its blocks were gated. The
    rank is what the study's section calls it."""
    part = getattr(run.model, "peft", None) or getattr(run.model, "lora", None) or getattr(run.model, "adapter", None)
    if part is None or getattr(part, "type", None) == "none":
        return model.weights + model.embeddings
    ranks = (getattr(part, name, None) or 0 for name in ("lora_r", "r", "rank", "init_r"))
    return adapter_weights(model, max(ranks))


def training_bytes(run: Run, model: Shape) -> float:
    """Peak memory of one GPU that trains a member of `run`: weights, optimizer, activations of a full-length
    micro-batch.

    A pair is at most two answers of max_length with their prompt. With checkpointing a layer's input is kept for each
    layer, and one layer's inner values at a time; adapters see their inputs in float32.
    """
    training, wide = run.training, BYTES[run.model.torch_dtype]
    longest = 2 * run.dataset.preprocessing.max_length
    tokens = training.per_device_train_batch_size * longest
    if getattr(training, "token_budget", None):
        tokens = min(tokens, max(training.token_budget, longest))
    inside = wide * (8 * model.hidden + 4 * model.inner)
    if getattr(run.model, "peft", None):
        inside += 4 * sum(i for i, _ in model.linear)
    kept = wide * model.hidden * model.layers
    activations = tokens * (kept + inside if training.gradient_checkpointing else model.layers * inside)
    state = model_bytes(model, run.model.quantization, run.model.torch_dtype) + ADAM_BYTES * trained_weights(run, model)
    return state / run.compute.devices + activations + CONTEXT_BYTES
