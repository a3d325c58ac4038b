"""What a run leaves behind, written so that a kill, a full disk or a crash never leaves half a truth.

JSON files are replaced whole (write, fsync, rename) and never hold NaN; `history.jsonl` grows by one flushed line
per step and is cut back to the checkpoint on resume; a torn last line (the process died inside the write) is dropped by
the reader. Text that goes into a record,
a log or a terminal holds no secret and nothing that acts on a terminal.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import signal
import statistics
import tempfile
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lib.errors import StudyError

FINISHED = ("completed", "diverged")  # both are results; anything else is not
TEMPORARY = ".*.tmp"  # what a writer killed before its rename leaves behind


def finite(value) -> Any:
    """The same nested value with every NaN or infinity turned into None and numpy scalars into Python's."""
    if hasattr(value, "tolist"):  # numpy's and torch's
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are there; None where none is."""
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present else None


def digest(value) -> str:
    """16 hexadecimal digits of SHA-256 over the value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    """Of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step: a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value) -> None:
    """Write `value` as JSON atomically; NaN and infinities become null."""
    write_text(path, json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, default=None):
    """The JSON in `path`, or `default` where there is no such file or it does not parse."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default


def append_jsonl(path: Path, value: dict) -> None:
    """Append one line and flush it to the system, so that a kill of this process loses nothing written before."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(finite(value), ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Replace `path` by one JSON object per line, atomically."""
    lines = (json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_text(path, "".join(lines))


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a JSONL file; a torn last line is dropped, a broken line elsewhere is an error with its number."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            if line:
                rows.append(json.loads(line))
        except ValueError:
            if number == len(lines):  # no newline behind it: the writer died in this line
                break
            raise StudyError(f"{path}, line {number}", "a line that is not JSON", "one JSON object per line") from None
    return rows


def next_number(folder: Path, pattern: str) -> int:
    """One more than the highest number in names such as `default-s1.3` (`pattern` has `*` for the number): a number is
    never given twice, even where one in between was deleted."""
    before, _, after = pattern.partition("*")
    numbers = [p.name.removeprefix(before).removesuffix(after) for p in Path(folder).glob(pattern)]
    return 1 + max((int(n) for n in numbers if n.isdigit()), default=0)


def remove_temporary(folder: Path) -> None:
    """What killed writers left below `folder`. Only for who has the folder to himself."""
    for path in Path(folder).rglob(TEMPORARY):
        path.unlink(missing_ok=True)


def count(phase: str, number: int) -> None:
    """Batch `number` of a phase begins: told to nobody, unless `check` watches (lib/run/watch.py takes its place)."""


def batches(phase: str, items: Iterable) -> Iterator:
    """`items`, counted: a trial may take two at most in each phase that touches data."""
    for number, item in enumerate(items, 1):
        count(phase, number)
        yield item


_asked: list[int] = []


def catch_stop_requests() -> None:
    """From here on SIGTERM asks this process to stop where it can go on later, instead of ending it."""
    signal.signal(signal.SIGTERM, lambda number, _: _asked.append(number))


def stopping() -> bool:
    """Whether this process was asked to stop."""
    return bool(_asked)


def stop() -> None:
    """End as the signal would have ended it: for the pool, a lost process that may be started again."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


# ---- secrets, and what acts on a terminal

# A variable's name is taken apart at what is not a letter; it is secret if one of its words is, unless its last word
# says that it holds something about the secret rather than the secret.
SECRET = """PASSWORD PASSWD PASSPHRASE PASS PWD SECRET SECRETS TOKEN KEY KEYS PAT CREDENTIAL CREDENTIALS CREDS WEBHOOK
COOKIE BEARER AUTHORIZATION"""
JOINED = re.compile(  # APIKEY, AUTHTOKEN, PGPASSWORD: words written together
    r"(API|ACCESS|AUTH|SECRET|PRIVATE|SIGNING|ENCRYPTION|DEPLOY|MASTER)(KEY|TOKEN)S?$|(PASSWORD|PASSWD|SECRET)$"
)
ABOUT = """FILE PATH DIR FOLDER LIMIT LENGTH COUNT TYPE NAME SOCK SOCKET BINDINGS LAYOUT TIMEOUT TTL SIZE PARALLELISM REPEAT
MAP"""
WORKING_FOLDERS = {"PWD", "OLDPWD"}
SHORTEST = 8  # characters; replacing anything shorter would garble ordinary text
# C0 and C1 controls but newline and tab: what moves a cursor, sets a title, rings, or hides text.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def password_in_url(value: str) -> str:
    """What stands between `:` (or `//`) and `@` in a URL such as a proxy's or a database's; empty where nothing
    does."""
    match = re.match(r"[a-z][a-z0-9+.-]*://([^/?#\s]*)@", value, re.IGNORECASE)
    return match.group(1).partition(":")[2] or match.group(1) if match else ""


def is_secret(name: str, value: str = "") -> bool:
    """Whether a variable of this name, or with this value, holds a secret."""
    words = [word for word in re.split(r"[^A-Z]+", name.upper()) if word and name.upper() not in WORKING_FOLDERS]
    named = not {*SECRET.split()}.isdisjoint(words) or any(map(JOINED.search, words))
    return (named and words[-1] not in ABOUT.split()) or bool(password_in_url(value))


def secret_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of an environment that hold secrets."""
    return {name: value for name, value in environment.items() if is_secret(name, value)}


def secrets(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """(text to be replaced, name) of every secret in the environment, in every form it may be written in, longest
    first."""
    names = {}
    for name, value in secret_variables(environment).items():
        password = password_in_url(value)
        for text in (value, password, urllib.parse.unquote(password), *value.splitlines()):
            quoted = (json.dumps(text), json.dumps(text, ensure_ascii=False), repr(text))
            in_urls = (urllib.parse.quote(text), urllib.parse.quote_plus(text))
            for form in (text, text.strip(), *(form[1:-1] for form in quoted), *in_urls):
                if len(form) >= SHORTEST and not form.startswith("-----"):
                    names.setdefault(form, name)
    return sorted(names.items(), key=lambda item: -len(item[0]))


# The owner's secrets, in a process of the pool: out of its environment, where a library would find and use them.
KNOWN: dict[str, str] = {}


def redact(text: str) -> str:
    """`text` with the value of every secret environment variable (8 characters or more) replaced by its name."""
    for value, name in secrets({**KNOWN, **os.environ}):
        if value in text:
            text = text.replace(value, f"[{name}]")
    return text


def escape_controls(text: str) -> str:
    """`text` with control characters written out (`\\x1b`): text of a data set must not act on a terminal."""
    return CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", text)


class Log:
    """A log file that is fed by a pipe: whole lines, without secrets and without what would act on a terminal.

    A line is held back until it ends (a secret cut in two would not be found), or until it is 64 KiB long.
    """

    def __init__(self, path: str):
        self.path, self.rest = Path(path), b""

    def feed(self, data: bytes) -> None:
        lines, newline, self.rest = (self.rest + data.replace(b"\r", b"\n")).rpartition(b"\n")
        if len(self.rest) > 1 << 16:
            lines, newline, self.rest = lines + newline + self.rest, b"", b""
        self._write(lines + newline)

    def close(self) -> None:
        self._write(self.rest)

    def _write(self, data: bytes) -> None:
        if not data:
            return
        text = escape_controls(redact(data.decode("utf-8", errors="replace")))
        with contextlib.suppress(OSError):  # a full disk: what is being logged matters more than its log
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text)


# ---- what a member's rows begin with


def identity(spec: dict) -> dict:
    run, cell = spec["config"], {key.rsplit(".", 1)[-1]: value for key, value in spec["cell"].items()}
    fixed = {key: (run.get("loss") or {}).get(key) for key in ("beta", "tau") if key not in cell}
    names = {"run_id": spec["run_id"], "method": run["method"], "role": run.get("role"), "study": spec["study"]}
    names |= {"subset": subset} if (subset := (run.get("dataset") or {}).get("subset")) else {}
    pilot = spec["seed"] in (run.get("pilot_seeds") or ())
    return {**names, "cell": spec["cell_name"], **fixed, **cell, "seed": spec["seed"], "pilot": pilot}
