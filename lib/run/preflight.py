"""Is what a run needs on this machine? GPU and its memory, hub access and licence, disk, W&B key, data base, judge.

Asked before anything starts; each finding says what to do. No value of a key or token is ever part of one.
"""

from __future__ import annotations

import importlib.util
import netrc
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

from lib.config import Finding, Run, is_hub_id, members, study_module, wandb_mode
from lib.errors import StudyError
from lib.record import read_json
from lib.run import footprint, storage
from lib.run.probe import SECONDS, Gpu, Machine, ask_hub, visible_gpus  # noqa: F401 (part of this module's interface)

GATED = ("meta-llama/",)  # owners whose models need an accepted licence, known even where the hub cannot be asked
NEEDED_GB = {"laptop": 0.2, "paper": 60}  # where no estimate can be made (lib/run/footprint.py)
DATA_GB = 1  # a preference data set, its cached tables and the prepared inputs
JUDGE_EXTRA = ".venv/bin/pip install -c constraints.txt -e '.[judge]'"
HUB_KEYS = (("model", "models", ""), ("dataset", "datasets", "datasets/"))  # section, API name, page prefix


def of_cluster(address: str) -> Machine:
    """This machine with the GPUs of a Ray cluster, of which only number and kind are known here."""
    from lib.run import cluster

    return Machine(gpus=lambda environ: [Gpu(kind, float("inf"), (99, 0)) for kind in cluster.gpus(address)])


def missing(run: Run, machine: Machine | None = None) -> list[Finding]:
    """What keeps `run` from being done here in full; a trial needs nothing (it uses stand-ins)."""
    return missing_for([run], machine)


def missing_for(runs: list[Run], machine: Machine | None = None) -> list[Finding]:
    """The same of several runs, which share the disk; each finding once."""
    machine, found = machine or Machine(), []
    wanted = [run for run in runs if run.mode != "trial"]
    for run in wanted:
        model = footprint.shape(settings(run, machine) or {})
        own = getattr(study_module(run.study), "needs", lambda run: [])  # what only this study knows of
        found += [
            *_gpus(run, machine, model),
            *_hub(run, machine),
            *_storage(run),
            *wandb(run, machine),
            *_judge(run, machine),
            *own(run),
        ]
    return list(dict.fromkeys([*found, *_disk(wanted, machine)]))


def _gpus(run: Run, machine: Machine, model: footprint.Shape | None) -> list[Finding]:
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
        return [
            Finding(
                "error",
                "compute.min_gpu_memory_gb",
                f"{needed} needed for each member, found {there}",
                elsewhere + f", or lower training.{footprint.batch_limit(run)} and then compute.min_gpu_memory_gb",
            )
        ]
    if model and hasattr(run.model, "peft"):
        largest = sorted((gpu.memory_gb for gpu in found), reverse=True)[run.compute.gpus - 1]
        needed = footprint.training_bytes(run, model) / 1e9
        if needed > largest:
            size = footprint.smaller_batch(run, model, largest * 1e9)
            key = f"training.{footprint.batch_limit(run)}"
            lower = (
                f"--set {key}={size}"
                if size
                else "a larger GPU, compute.strategy: fsdp over several, or a shorter dataset.preprocessing.max_length"
            )
            return [
                Finding(
                    "error",
                    key,
                    f"about {needed:.0f} GB of GPU memory for a batch of full length at {key}: "
                    f"{getattr(run.training, footprint.batch_limit(run))}, the GPU has {largest:.0f}",
                    lower,
                )
            ]
    if mixed := _mixed(run, machine, found):
        return [mixed]
    wanted = (run.compute.gpu_type or "").split("-")[0].lower()
    differing = [gpu.name for gpu in found if wanted not in gpu.name.lower()]
    other = [
        Finding(
            "warning",
            "compute.gpu_type",
            f"{name} instead of {run.compute.gpu_type}: times are not comparable and sums round differently",
            "compute.gpu_type: null says that any will do",
        )
        for name in differing[:1]
    ]
    if getattr(run.model, "torch_dtype", None) == "bfloat16" and any(gpu.capability < (8, 0) for gpu in found):
        old = next(gpu for gpu in found if gpu.capability < (8, 0))
        return [
            Finding(
                "error",
                "model.torch_dtype",
                f"bfloat16, which {old.name} (compute capability {'.'.join(map(str, old.capability))}) does not have",
                "an Ampere GPU or newer, or float32",
            ),
            *other,
        ]
    return other


def _mixed(run: Run, machine: Machine, found: list[Gpu]) -> Finding | None:
    """Members go to whichever GPU is free: on GPUs of several kinds nobody could say which of them made a record."""
    kinds = list(dict.fromkeys(gpu.name for gpu in found))
    if len(kinds) < 2:
        return None
    asked = (run.compute.gpu_type or "").split("-")[0].lower()
    kind = next((name for name in kinds if asked and asked in name.lower()), kinds[0])
    shown = [d.strip() for d in machine.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d.strip()]
    shown = shown or [str(i) for i in range(len(found))]
    mend = f"CUDA_VISIBLE_DEVICES={','.join(d for d, gpu in zip(shown, found, strict=False) if gpu.name == kind)}"
    if machine.environ.get("STUDY_CLUSTER"):
        mend = f".venv/bin/ray start --num-gpus=0 on the nodes whose GPUs are not {kind}"
    return Finding(
        "error",
        "compute.gpu_type",
        f"GPUs of different kinds ({', '.join(kinds)}): a member would train on any of "
        "them, and sums round differently",
        f"show the runs one kind: {mend}",
    )


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


def hub_cache(environ: Mapping[str, str]) -> Path:
    """Where the hub's client keeps what it downloads."""
    return Path(environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or _hf_home(environ) / "hub")


def cached(environ: Mapping[str, str], api: str, name: str, revision: str | None) -> Path | None:
    """The snapshot of this revision (of any, where none is pinned) in the hub's cache."""
    repository = hub_cache(environ) / f"{api}--{name.replace('/', '--')}"
    if revision and (repository / "refs" / revision).is_file():
        revision = (repository / "refs" / revision).read_text().strip()
    snapshots = repository / "snapshots"
    folders = [snapshots / revision] if revision else list(snapshots.glob("*"))
    return next((folder for folder in folders if folder.is_dir() and any(folder.iterdir())), None)


def _endpoint(environ: Mapping[str, str]) -> str:
    return environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _offline(environ: Mapping[str, str]) -> bool:
    return environ.get("HF_HUB_OFFLINE", "").strip().lower() in {"1", "true", "yes", "on"}


def _hub(run: Run, machine: Machine) -> list[Finding]:
    found, environ = [], machine.environ
    endpoint, offline = _endpoint(environ), _offline(environ)
    have_token = token(environ)
    for section, api, prefix in HUB_KEYS:
        part = getattr(run, section)
        name, revision = ("nyu-mll/glue" if part.name == "glue" else part.name), getattr(part, "revision", None)
        if not is_hub_id(name) or cached(environ, api, name, revision):
            continue
        key, page = f"{section}.name", f"{endpoint}/{prefix}{name}"
        fetch = (
            f"hf download {name}"
            + (" --repo-type dataset" if prefix else "")
            + (f" --revision {revision}" if revision else "")
        )
        by_hand = f"{fetch} --local-dir DIR where there is a network, then --set {key}=DIR"
        licence = f"accept the licence at {page}, then: .venv/bin/hf auth login (or set HF_TOKEN)"
        if not have_token and name.startswith(GATED):
            found.append(Finding("error", key, f"{name} is gated and no hub token is set", licence))
        if offline:
            found.append(
                Finding(
                    "error",
                    key,
                    f"{name} is not in the cache, and HF_HUB_OFFLINE is set",
                    f"unset HF_HUB_OFFLINE, or {by_hand}",
                )
            )
            continue
        status, code = machine.hub(f"{endpoint}/api/{api}/{name}/auth-check", have_token)
        if status is None:
            found.append(
                Finding(
                    "error",
                    key,
                    f"{name} is not in the cache, and {urlparse(endpoint).netloc} does not answer within {SECONDS:g} s",
                    by_hand,
                )
            )
        elif code == "GatedRepo" or status == 403:
            if have_token or not name.startswith(GATED):
                found.append(Finding("error", key, f"{name} is gated and access was refused", licence))
        elif status in (401, 404) and not (name.startswith(GATED) and not have_token):
            found.append(
                Finding(
                    "error",
                    key,
                    f"{name}: the hub has no such {section}, or it is private",
                    f"correct {key}, or .venv/bin/hf auth login for a private one",
                )
            )
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
    machine = machine or Machine()
    if wandb_mode(run) != "online" or wandb_key(machine.environ):
        return []
    return [
        Finding(
            "error",
            "wandb.mode",
            f"online, and there is no W&B key for {wandb_host(machine.environ)}",
            ".venv/bin/wandb login (or set WANDB_API_KEY), or --set wandb.mode=offline",
        )
    ]


def settings(run: Run, machine: Machine) -> dict | None:
    """The config.json of the run's model: of a local folder, of the cache, or asked of the hub; None where it is not
    had."""
    name, revision = run.model.name, getattr(run.model, "revision", None)
    if not is_hub_id(name):
        return read_json(Path(name) / "config.json")
    if snapshot := cached(machine.environ, "models", name, revision):
        return read_json(snapshot / "config.json")
    if _offline(machine.environ):
        return None
    found = machine.read(
        f"{_endpoint(machine.environ)}/{name}/resolve/{revision or 'main'}/config.json", token(machine.environ)
    )
    return found if isinstance(found, dict) else None


def _download(run: Run, machine: Machine, model: footprint.Shape | None) -> float:
    """Bytes that fetching the run's model takes (only safetensors and small files are fetched); 0 where it is here."""
    name, revision = run.model.name, getattr(run.model, "revision", None)
    if not is_hub_id(name) or cached(machine.environ, "models", name, revision):
        return 0.0
    listed = (
        None
        if _offline(machine.environ)
        else machine.read(
            f"{_endpoint(machine.environ)}/api/models/{name}/tree/{revision or 'main'}?recursive=true",
            token(machine.environ),
        )
    )
    if isinstance(listed, list):
        return sum(
            f.get("size", 0) for f in listed if str(f.get("path", "")).endswith((".safetensors", ".json", ".model"))
        )
    return footprint.model_bytes(model, "none", "bfloat16") if model else 0.0


def _disk(runs: list[Run], machine: Machine) -> list[Finding]:
    """Download, data and the checkpoints of the members that are still to train, against what is free where they go."""
    needed, floor = defaultdict(float), 0.0
    downloads = {}
    for run in runs:
        floor = max(floor, NEEDED_GB[run.scale] * 1e9)
        model = footprint.shape(settings(run, machine) or {})
        if model is None or run.scale == "laptop":
            continue
        folder = Path(run.results_dir) / run.run_id / "members"
        left = sum(not (folder / member.id / "done.json").exists() for member in members(run))
        at_once = min(left, max(1, len(machine.gpus(machine.environ))))
        needed[_place(run.results_dir)] += left * footprint.member_bytes(
            run, model, finished=True
        ) + at_once * footprint.member_bytes(run, model, finished=False)
        downloads[run.model.name] = _download(run, machine, model)
    if not runs:
        return []
    if not needed:
        needed[_place(runs[0].results_dir)] = floor
    else:
        needed[_place(hub_cache(machine.environ))] += sum(downloads.values()) + DATA_GB * 1e9
    found = []
    for place, wanted in needed.items():
        free = machine.free_bytes(place)
        if free < wanted:
            parts = f" (downloads {sum(downloads.values()) / 1e9:.0f} GB, the rest checkpoints)" if downloads else ""
            found.append(
                Finding(
                    "error",
                    "results_dir",
                    f"{free / 1e9:.1f} GB free at {place}, about {wanted / 1e9:.3g} GB needed{parts}",
                    "free space there, STUDY_OUTPUTS=DIR and STUDY_CACHE=DIR on a larger disk, "
                    "or fewer runs at a time (--run)",
                )
            )
    return found


def _place(path: Path) -> Path:
    """One path for all folders of one file system: the nearest existing parent of the first that was asked for."""
    path = Path(path)
    while not path.exists():
        path = path.parent
    return _devices.setdefault(path.stat().st_dev, path)


_devices: dict[int, Path] = {}


def _storage(run: Run) -> list[Finding]:
    """A search's data base: its URL, the variables it names, its driver."""
    try:
        storage.url_of(run)
    except StudyError as error:
        return [Finding("error", error.where, f"{error.found}; expected {error.expected}", error.fix)]
    return []


def _judge(run: Run, machine: Machine) -> list[Finding]:
    if getattr(run.evaluation, "judge", None) != "mt_bench":
        return []
    found, key = [], "evaluation.judge"
    if importlib.util.find_spec("openai") is None:
        found.append(
            Finding(
                "warning",
                key,
                "openai is not installed: training goes on and judging stays pending",
                f"{JUDGE_EXTRA}, then ./run_all.sh judge",
            )
        )
    if not any(machine.environ.get(name, "").strip() for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL")):
        found.append(
            Finding(
                "warning",
                key,
                "no judge endpoint: training goes on and judging stays pending",
                "set OPENAI_API_KEY, or OPENAI_BASE_URL of any compatible server, then ./run_all.sh judge",
            )
        )
    return found
