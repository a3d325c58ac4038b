"""The Hugging Face hub: whether it can be reached, working without it, and its errors in words a person can act on.

Imports neither huggingface_hub nor torch before they are needed, so the command line can use it at once.
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

ROOT = Path(__file__).resolve().parents[1]
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
UNREACHABLE = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectTimeout", "ReadTimeout"}
UNREACHABLE |= {"gaierror"}  # no name resolution


def go_offline() -> None:
    """Use only the local cache from here on, in this process and those it starts."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for module in ("huggingface_hub.constants", "datasets.config"):  # both read the variable once, when imported
        if module in sys.modules:
            vars(sys.modules[module])["HF_HUB_OFFLINE"] = True


def keep_downloads_here() -> None:
    """Put downloads of this process and its children into .cache/ (or STUDY_CACHE), unless the environment names a
    place. The token stays where `hf auth login` has put it."""
    if not {"HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"} & set(os.environ):
        cache = Path(os.environ.get("STUDY_CACHE") or ROOT / ".cache").absolute()
        os.environ["HF_HUB_CACHE"] = str(cache / "hub")
        os.environ.setdefault("HF_DATASETS_CACHE", str(cache / "datasets"))


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in {"1", "true", "yes", "on"}


@lru_cache(maxsize=8)
def _answers(endpoint: str, seconds: float) -> bool:
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=seconds).close()
            answers.append(True)
        except urllib.error.HTTPError as error:  # a proxy that refuses (407, 502, ...) is not the hub answering
            answers.append(error.code < 500 and error.code not in {403, 407})
        except (OSError, ValueError):
            answers.append(False)

    # In a thread: urlopen's timeout does not cover name resolution, which can take 20 s without a network.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers and answers[0])


def reachable(seconds: float = 3.0) -> bool:
    """Whether the hub answers within `seconds`: asked once per process, and not at all where HF_HUB_OFFLINE is set."""
    return not is_offline() and _answers(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), seconds)


def out_of_reach(name: str) -> bool:
    """Whether `name` is a hub id (not 'made', 'generated' or an existing path) and the hub does not answer."""
    is_id = bool(HUB_ID.match(name)) and name not in ("made", "generated") and not Path(name).exists()
    return is_id and not reachable()


def prepare() -> None:
    """Go offline where the hub cannot be reached: its client would retry for 23 s before it uses the cache."""
    if not reachable():
        go_offline()


def local_path(name: str) -> Path | None:
    """The existing file or directory called `name`, from the working directory or from the repository's root."""
    path = Path(name).expanduser()
    return next((place.resolve() for place in (path, ROOT / path) if place.exists()), None)


def load_dataset(name: str, config: str | None = None, *, revision: str | None = None, **options):
    """`datasets.load_dataset` of a hub id. Where the hub cannot be reached: what was loaded before, or the files that
    `hf download` left in the hub's cache. MissingError where it cannot be had."""
    prepare()
    from datasets import load_dataset as load
    from huggingface_hub import snapshot_download

    try:
        return load(name, config, revision=revision, **options)
    except Exception as error:  # its loaders raise anything from OSError to pyarrow's own
        missing = explain(error, name, kind="dataset", revision=revision)
        if not is_offline():
            raise missing from error
        try:
            folder = snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)
            return load(folder, config, **options)
        except Exception:
            raise missing from error


def _class_names(error: BaseException | None) -> set[str]:
    """Class names of an exception, of its bases, and of everything it was raised from."""
    names: set[str] = set()
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        names |= {cls.__name__ for cls in type(error).__mro__}
        error = error.__cause__ or error.__context__
    return names


def explain(error: BaseException, name: str, *, kind: str, revision: str | None = None) -> MissingError:
    """The MissingError for a failed load of hub id `name`; `kind` is 'model' or 'dataset'."""
    classes, text, key = _class_names(error), str(error), f"{kind}.name"
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    options = " --repo-type dataset" * (kind == "dataset") + (f" --revision {revision}" if revision else "")
    fix = f"where there is a network: hf download {name}{options} --local-dir DIR; then --set {key}=DIR"
    found, expected = f"could not be loaded: {type(error).__name__}: {text[:300]}", f"a {kind} that loads"
    if "GatedRepoError" in classes or "gated" in text.lower():
        found, expected = f"this {kind} is gated and access was refused", "an account that accepted its license"
        fix = f"accept the license at {page}, then: .venv/bin/hf auth login (or set HF_TOKEN)"
    elif "RevisionNotFoundError" in classes:
        found, expected = "the hub has no such revision", f"a commit, branch or tag of {page}"
        fix = "correct or remove the revision"
    elif classes & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        found = f"the hub has no such {kind} (or it is private), and there is no such local path"
        expected, fix = "a hub id or an existing path", f"correct {key}, or .venv/bin/hf auth login for a private one"
    elif classes & UNREACHABLE or "connect" in text.lower() or "offline" in text.lower():
        why = "HF_HUB_OFFLINE is set" if is_offline() else "the hub is out of reach"
        found = f"{why}, it is not in the local cache, and there is no such local path"
        expected = f"a cached {kind}, a local directory, or a network"
    return MissingError(f"{key} = {name}" + (f" at revision {revision}" if revision else ""), found, expected, fix)
