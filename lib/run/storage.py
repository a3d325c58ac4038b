"""Where a search's trials are kept: a journal file of the run's own, or a data base that several machines share.

`optuna.storage` in a YAML is an SQLAlchemy URL; what is secret in it is named, never written: `${env.DB_PASSWORD}`.
Only the reference reaches records, logs and pages. Light: optuna and SQLAlchemy are imported where a study is opened.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from urllib.parse import quote

from lib import record
from lib.errors import MissingError, StudyError

REFERENCE = re.compile(r"\$\{env\.([A-Za-z_]\w*)\}")
DRIVERS = {"postgresql": "psycopg", "postgresql+psycopg": "psycopg", "sqlite": "sqlite3"}  # scheme -> module
FIX = "storage: postgresql://user:${env.DB_PASSWORD}@host:5432/database"
KEY = "optuna.storage"


def check_url(text: str) -> tuple[str, str]:
    """Scheme and rest of a URL as the YAML has it. Raises StudyError, without the URL, for one that holds a secret."""
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in DRIVERS:
        found = f"a URL of {scheme!r}" if separator else "no URL"
        raise StudyError(KEY, found, f"a URL of {', '.join(DRIVERS)}", FIX)
    account = rest.rpartition("@")[0] if "@" in rest.split("/", 1)[0] else ""
    if REFERENCE.sub("", account.partition(":")[2]):
        raise StudyError(KEY, "a password written in the YAML", "a reference to an environment variable", FIX)
    for name in REFERENCE.findall(text):
        if not record.is_secret(name):  # else its value would not be taken out of logs and pages
            expected = "a variable whose name says that it is secret, such as DB_PASSWORD"
            raise StudyError(KEY, f"${{env.{name}}}", expected, FIX)
    return scheme, rest


def url_of(run) -> str | None:
    """The run's data base URL with its secrets in place (never show it); None for a journal file.

    Raises StudyError for a secret that is written out, MissingError for a variable or a driver that is not there.
    """
    text = run.optuna.storage
    if text is None:
        return None
    scheme, rest = check_url(text)
    for name in REFERENCE.findall(text):
        if not os.environ.get(name):
            raise MissingError(KEY, f"{name} is not set", "the variable that the URL names", f"export {name}=…")
    if importlib.util.find_spec(driver := DRIVERS[scheme]) is None:
        install = ".venv/bin/pip install -c constraints.txt -e '.[postgresql]'"
        raise MissingError(KEY, f"{driver} is not installed", f"the driver of {scheme}", install)
    scheme = "postgresql+psycopg" if scheme == "postgresql" else scheme
    return f"{scheme}://" + REFERENCE.sub(lambda found: quote(os.environ[found[1]], safe=""), rest)


def study_name(run) -> str:
    """The study's name: in a shared data base, unique among scales, studies and variations."""
    return run.run_id if run.optuna.storage is None else f"{Path(run.results_dir).parent.name}/{run.study}/{run.run_id}"


def open_storage(run, folder: Path):
    """Optuna's storage for the run. Raises MissingError, in one line without secrets, where the data base does not
    answer."""
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    url = url_of(run)
    if url is None:
        folder.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    from sqlalchemy.exc import SQLAlchemyError

    options = {"connect_timeout": 10, "client_encoding": "utf8"} if url.startswith("postgresql") else {"timeout": 60}
    try:
        return RDBStorage(url, engine_kwargs={"connect_args": options, "pool_pre_ping": True})
    except SQLAlchemyError as error:
        reason = record.redact(str(getattr(error, "orig", None) or error)).strip().splitlines()[0]
        fix = "start it, or correct the URL, user or password"
        found = f"{run.optuna.storage}: {reason[:160]}"
        raise MissingError(KEY, found, "a data base that answers", fix) from None
