"""Where a search's trials are kept: a journal file of the run's own, or a database that several machines share.

`optuna.storage` in a YAML is an SQLAlchemy URL. Its password is named, never written: `${env.DB_PASSWORD}`; only the
reference reaches records, logs and pages. Optuna and SQLAlchemy are imported where they are needed.
"""

import importlib.util
import os
import re
from pathlib import Path

from lib import record
from lib.errors import MissingError, StudyError

KEY = "optuna.storage"
EXAMPLE = "storage: postgresql://user:${env.DB_PASSWORD}@host:5432/database"


def check_url(text: str):
    """(SQLAlchemy's URL, the variable that its password is in or None) of a URL as the YAML has it. StudyError, without
    the URL, for a password that is written out."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    expected = "a URL of postgresql or sqlite, its password in a variable with a secret's name, such as DB_PASSWORD"
    try:
        url = make_url(text)
    except ArgumentError:
        raise StudyError(KEY, "no URL", expected, EXAMPLE) from None
    if url.drivername not in ("postgresql", "postgresql+psycopg", "sqlite"):
        raise StudyError(KEY, f"a URL of {url.drivername!r}", expected, EXAMPLE)
    reference = re.fullmatch(r"\$\{env\.([A-Za-z_]\w*)\}", url.password or "")
    if url.password and not reference or "password" in url.query:
        raise StudyError(KEY, "a password written in the YAML", expected, EXAMPLE)
    if reference and not record.is_secret(reference[1]):  # else its value would not be taken out of logs and pages
        raise StudyError(KEY, f"{reference[1]}, which is not a secret's name", expected, EXAMPLE)
    return url, reference and reference[1]


def url_of(run) -> str | None:
    """The URL of the run's database with its password in place (never show it); None for a journal file. MissingError
    for a variable or a driver that is not there."""
    if run.optuna.storage is None:
        return None
    url, name = check_url(run.optuna.storage)
    if name and not os.environ.get(name):
        raise MissingError(KEY, f"{name} is not set", "the variable that the URL names", f"export {name}=…")
    if url.drivername != "sqlite":
        if importlib.util.find_spec("psycopg") is None:
            install = ".venv/bin/pip install -c constraints.txt -e '.[postgresql]'"
            raise MissingError(KEY, "psycopg is not installed", "the driver of postgresql", install)
        url = url.set(drivername="postgresql+psycopg")
    return url.set(password=os.environ[name] if name else None).render_as_string(hide_password=False)


def open_storage(run, folder: Path):
    """Optuna's storage for the run. MissingError, in one line without secrets, where the database does not answer."""
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend
    from sqlalchemy.exc import SQLAlchemyError

    if (url := url_of(run)) is None:
        folder.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    options = {"timeout": 60} if url.startswith("sqlite") else {"connect_timeout": 10, "client_encoding": "utf8"}
    try:
        return RDBStorage(url, engine_kwargs={"connect_args": options, "pool_pre_ping": True})
    except SQLAlchemyError as error:
        reason = record.redact(str(getattr(error, "orig", None) or error)).strip().splitlines()[0]
        found, fix = f"{run.optuna.storage}: {reason[:160]}", "start it, or correct the URL, user or password"
        raise MissingError(KEY, found, "a database that answers", fix) from None
