"""The Hugging Face hub: whether it is within reach, how to keep away from it, and its errors in words a person can act
on.

Light: huggingface_hub, datasets and transformers are touched only where they are already imported.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import urllib.error
import urllib.request
from functools import lru_cache
from pathlib import Path

from lib.errors import MissingError

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
UNREACHABLE = {
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
    "gaierror",
}


def go_offline() -> None:
    """From here on, in this process and those it starts, only the local cache is used (laptop scale: no network,
    ever)."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for module in ("huggingface_hub.constants", "datasets.config"):  # both read the variable once, when imported
        if module in sys.modules:
            sys.modules[module].HF_HUB_OFFLINE = True


def keep_downloads_here() -> None:
    """What this process and those it starts download lies in .cache/ (STUDY_CACHE), unless the environment says where.
    The token stays where `hf auth login` has put it."""
    if not {"HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"} & set(os.environ):
        cache = Path(os.environ.get("STUDY_CACHE") or Path(__file__).resolve().parents[2] / ".cache").absolute()
        os.environ["HF_HUB_CACHE"] = str(cache / "hub")
        os.environ.setdefault("HF_DATASETS_CACHE", str(cache / "datasets"))


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in {"1", "true", "yes", "on"}


@lru_cache(maxsize=8)
def _answers(endpoint: str, seconds: float) -> bool:
    answered: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=seconds).close()
            answered.append(True)
        except urllib.error.HTTPError as error:  # a proxy that refuses (407, 502, ...) is not the hub answering
            answered.append(error.code < 500 and error.code not in {403, 407})
        except (OSError, ValueError):
            answered.append(False)

    # In a thread, because the time-out of urlopen does not cover name resolution, which can take 20 s without a
    # network.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answered and answered[0])


def reachable(seconds: float = 3.0) -> bool:
    """Whether the hub answers within `seconds`. False, without trying, where HF_HUB_OFFLINE is set. Asked once per
    process."""
    return not is_offline() and _answers(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), seconds)


def out_of_reach(name: str) -> bool:
    """Whether `name` is a hub's id (and nothing that a study makes itself, nor a path) and the hub does not answer."""
    return (
        bool(HUB_ID.match(name)) and name not in ("made", "generated") and not Path(name).exists() and not reachable()
    )


def prepare() -> None:
    """Before loading a hub id: where the hub is out of reach use the cache at once (its client retries for 23 s
    otherwise)."""
    if not reachable():
        go_offline()


def load_dataset(name: str, config: str | None = None, *, revision: str | None = None, **options):
    """`datasets.load_dataset` of a hub id. Where the hub is out of reach: what was loaded before or, where it was not,
    the files that `hf download` left in the hub's cache. MissingError where it cannot be had."""
    prepare()
    from datasets import load_dataset as load
    from huggingface_hub import snapshot_download

    try:
        return load(name, config, revision=revision, **options)
    except Exception as error:  # its loaders raise anything from OSError to pyarrow's own
        told = explain(error, name, kind="dataset", key="dataset.name", revision=revision)
        if not is_offline():
            raise told from error
        try:
            folder = snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)
            return load(folder, config, **options)
        except Exception:
            raise told from error


def names_in_chain(error: BaseException | None) -> set[str]:
    """Class names of an exception, its bases, and everything it was raised from."""
    names: set[str] = set()
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        names |= {cls.__name__ for cls in type(error).__mro__}
        error = error.__cause__ or error.__context__
    return names


def explain(error: BaseException, name: str, *, kind: str, key: str, revision: str | None = None) -> MissingError:
    """The MissingError for a failed load of hub id `name`; `kind` is 'model' or 'dataset', `key` the configuration
    key."""
    names = names_in_chain(error)
    text = str(error)
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    where = f"{key} = {name}" + (f" at revision {revision}" if revision else "")
    flags = ("--repo-type dataset " if kind == "dataset" else "") + (f"--revision {revision} " if revision else "")
    fetch = f"where there is a network: hf download {name} {flags}--local-dir DIR; then --set {key}=DIR"
    if "GatedRepoError" in names or "gated" in text.lower():
        return MissingError(
            where,
            f"this {kind} is gated and access was refused",
            "an account that accepted its licence, and its token",
            f"accept the licence at {page}, then: .venv/bin/hf auth login (or set HF_TOKEN)",
        )
    if "RevisionNotFoundError" in names:
        return MissingError(
            where,
            "the hub has no such revision",
            f"a commit, branch or tag of {page}",
            "correct or remove the revision",
        )
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return MissingError(
            where,
            f"the hub has no such {kind} (or it is private), and there is no such local path",
            "a hub id or an existing path",
            f"correct {key}, or .venv/bin/hf auth login for a private one",
        )
    if names & UNREACHABLE or "connect" in text.lower() or "offline" in text.lower():
        why = "HF_HUB_OFFLINE is set" if is_offline() else "the hub is out of reach"
        return MissingError(
            where,
            f"{why}, it is not in the local cache, and there is no such local path",
            f"a cached {kind}, a local directory, or a network",
            fetch,
        )
    return MissingError(
        where, f"could not be loaded: {type(error).__name__}: {text[:300]}", f"a {kind} that can be loaded", fetch
    )


def local_path(name: str, *, root: Path | None = None) -> Path | None:
    """An existing file or directory called `name`: from the working directory first, then from `root`; else None."""
    path = Path(name).expanduser()
    for candidate in (path, root / path if root is not None else path):
        if candidate.exists():
            return candidate.resolve()
    return None
