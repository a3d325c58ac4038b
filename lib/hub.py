"""The Hugging Face hub: whether it can be reached, working without it, and its errors in words a person can act on.

Imports neither huggingface_hub nor torch before they are needed: the client reads most of its environment once, as it
is imported, and the command line has settings of its own to make first.
"""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from lib.errors import MissingError

ROOT = Path(__file__).resolve().parents[1]
SAMPLED = ("verifiable",)  # data sets of the base model's own answers
MADE = ("made", "generated", *SAMPLED)  # models and data sets
SECONDS = 3.0  # that the hub is waited for
GIVEN_UP = "ON"  # HF_HUB_OFFLINE as `prepare` sets it, to be told from what the user has set
UNREACHABLE = {"LocalEntryNotFoundError", "ConnectionError", "TransportError", "TimeoutError", "gaierror"}


def cache_folder() -> Path:
    """Where downloads and shared inputs are kept: .cache/, or STUDY_CACHE."""
    return Path(os.environ.get("STUDY_CACHE") or ROOT / ".cache").absolute()


def keep_downloads_here() -> None:
    """Put downloads of this process and its children into `cache_folder`, unless the environment names a
    place. The token stays where `hf auth login` has put it."""
    if not {"HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"} & set(os.environ):
        os.environ["HF_HUB_CACHE"] = str(cache_folder() / "hub")
        os.environ.setdefault("HF_DATASETS_CACHE", str(cache_folder() / "datasets"))


# ---- can it be reached


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in {"1", "true", "yes", "on"}


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def ask(question: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """What `question()` returns or raises, as a value; a TimeoutError after `seconds`. In a thread: the client's own
    time-outs do not cover name resolution, which can take 20 s without a network."""
    answer: list[Any] = [TimeoutError(f"no answer within {seconds:g} s")]

    def work() -> None:
        try:
            answer[0] = question()
        except Exception as error:
            answer[0] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0]


def status(answer: Any) -> int | None:
    """The HTTP status of a response, or of the one that raised an error; None where none came."""
    return getattr(getattr(answer, "response", answer), "status_code", None)


@lru_cache(maxsize=8)
def _answers(endpoint: str, seconds: float) -> bool:
    from huggingface_hub.utils import get_session

    code = status(ask(lambda: get_session().head(endpoint, timeout=seconds), seconds))
    return code is not None and code < 500 and code not in (403, 407)  # these are what a proxy says


def reachable(seconds: float = SECONDS) -> bool:
    """Whether the hub answers within `seconds`: asked once per process, and not at all where HF_HUB_OFFLINE is set."""
    return not is_offline() and _answers(endpoint(), seconds)


def is_hub_id(name: str | None) -> bool:
    return name not in MADE and re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name or "") is not None


def out_of_reach(name: str) -> bool:
    """Whether `name` is a hub id, and no existing path, and the hub does not answer."""
    return is_hub_id(name) and local_path(name) is None and not reachable()


def prepare() -> None:
    """Where the hub cannot be reached, use only the local cache from here on, in this process and those it starts: the
    client would retry for 23 s before it does."""
    if reachable():
        return
    if not is_offline():
        os.environ["HF_HUB_OFFLINE"] = GIVEN_UP
    for module in {"huggingface_hub.constants", "datasets.config"} & sys.modules.keys():
        vars(sys.modules[module])["HF_HUB_OFFLINE"] = True  # both read the variable once, when imported


# ---- load


def fetched(name: str) -> Path | None:
    """Where `./run_all.sh fetch` keeps model `name` (lib/run/fetch.py); None where it does not."""
    folder = cache_folder() / "models" / name
    return folder if is_hub_id(name) and (folder / "provenance.json").exists() else None


def local_path(name: str) -> Path | None:
    """The existing file or directory called `name`, from the working directory or from the repository's root, or the
    fetched model of that name."""
    path = Path(os.path.expanduser(name))  # as it is, where there is no such user
    return next((place.resolve() for place in (path, ROOT / path) if place.exists()), fetched(name))


def is_cached(name: str, kind: str, revision: str | None) -> bool:
    """Whether the hub's cache holds this revision of a hub id (any, where none is given); `kind`: model or dataset."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}")
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision or "*"
    # of a model a tokenizer alone may be here, or what a download that broke off left
    parts = ("*.safetensors *.bin", "config.json", "*token* *vocab*") if kind == "model" else ("*",)

    def holds(place: Path, names: str) -> bool:
        return any(path for name in names.split() for path in place.glob(name))

    return any(all(holds(place, part) for part in parts) for place in folder.glob(f"snapshots/{commit}"))


def load_dataset(name: str, config: str | None = None, *, revision: str | None = None, **options):
    """`datasets.load_dataset` of a hub id. Where the hub cannot be reached: what was loaded before, or the files that
    `hf download` left in the hub's cache. MissingError where it cannot be had."""
    prepare()
    from datasets import load_dataset as load
    from huggingface_hub import snapshot_download

    try:
        return load(name, config, revision=revision, **options)
    except Exception as error:  # its loaders raise anything from OSError to pyarrow's own
        failed = error
    with contextlib.suppress(Exception):
        if is_offline():
            folder = snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)
            return load(folder, config, **options)
    raise explain(failed, name, kind="dataset", revision=revision) from failed


# ---- errors in words


def explain(error: BaseException, name: str, *, kind: str, revision: str | None = None) -> MissingError:
    """The MissingError for a failed load of hub id `name`; `kind` is 'model' or 'dataset'."""
    text, code, key = str(error), status(error), f"{kind}.name"
    raised = (error, error.__cause__, error.__context__)  # libraries wrap what the hub's client raises
    classes = {cls.__name__ for one in raised for cls in type(one).__mro__}
    options = " --repo-type dataset" * (kind == "dataset") + (f" --revision {revision}" if revision else "")
    found = f"could not be loaded: {type(error).__name__}: {text[:300]}"
    download = f"where there is a network: hf download {name}{options} --local-dir DIR; then --set {key}=DIR"
    fix = "./run_all.sh fetch --scale small, which compares its checksums" if fetched(name) else download
    if "GatedRepoError" in classes or code == 403 or "gated" in text.lower():
        page = f"{endpoint()}/{'datasets/' * (kind == 'dataset')}{name}"
        found = f"this {kind} is gated and access was refused"
        fix = f"accept the license at {page}, then: .venv/bin/hf auth login (or set HF_TOKEN)"
    elif classes & {"RepositoryNotFoundError", "RevisionNotFoundError", "DatasetNotFoundError"} or code in (401, 404):
        found = f"no local path, and the hub has no such {kind} or revision (or it is private)"
        fix = f"correct {key} or its revision, or .venv/bin/hf auth login for a private one"
    elif classes & UNREACHABLE or "connect" in text.lower() or "offline" in text.lower():
        by_user = " (HF_HUB_OFFLINE is set)" * (is_offline() and os.environ["HF_HUB_OFFLINE"] != GIVEN_UP)
        reach = f"{endpoint()} is out of reach{by_user}"
        found = f"no local path, not in the cache, and {reach}"
    where = f"{key} = {name}" + (f" at revision {revision}" if revision else "")
    return MissingError(where, found, f"a local {kind}, or one of the hub that this account may read", fix)
