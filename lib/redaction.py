"""What must not reach a record, a log or a terminal: secret values, and control characters that act on a terminal.

Standard library only, and no other module of `lib`: the pool's server imports it too (lib/run/forkserver.py).
"""

import contextlib
import json
import os
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

# A variable's name is taken apart at what is not a letter; it is secret if one of its words is, unless its last word
# says that it holds something about the secret rather than the secret.
SECRET_WORDS = {
    "PASSWORD", "PASSWD", "PASSPHRASE", "PASS", "PWD", "SECRET", "SECRETS", "TOKEN", "KEY", "KEYS", "PAT", "CREDENTIAL",
    "CREDENTIALS", "CREDS", "WEBHOOK", "COOKIE", "BEARER", "AUTHORIZATION",
}  # fmt: skip
JOINED = re.compile(  # APIKEY, AUTHTOKEN, PGPASSWORD: words written together
    r"(API|ACCESS|AUTH|SECRET|PRIVATE|SIGNING|ENCRYPTION|DEPLOY|MASTER)(KEY|TOKEN)S?$|(PASSWORD|PASSWD|SECRET)$"
)
ABOUT = {
    "FILE", "PATH", "DIR", "FOLDER", "LIMIT", "LENGTH", "COUNT", "TYPE", "NAME", "SOCK", "SOCKET", "BINDINGS", "LAYOUT",
    "TIMEOUT", "TTL", "SIZE", "PARALLELISM", "REPEAT", "MAP",
}  # fmt: skip
WORKING_FOLDERS = {"PWD", "OLDPWD"}
SHORTEST = 8  # characters; replacing anything shorter would garble ordinary text
# C0 and C1 controls but newline and tab: what moves a cursor, sets a title, rings, or hides text.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret."""
    if name.upper() in WORKING_FOLDERS:
        return False
    words = [w for w in re.split(r"[^A-Z]+", name.upper()) if w]
    return bool(words) and words[-1] not in ABOUT and any(w in SECRET_WORDS or JOINED.search(w) for w in words)


def password_in_url(value: str) -> str:
    """What stands between `:` (or `//`) and `@` in a URL such as a proxy's or a data base's; empty where nothing
    does."""
    found = re.match(r"[a-z][a-z0-9+.-]*://([^/?#\s]*)@", value, re.IGNORECASE)
    return found.group(1).partition(":")[2] or found.group(1) if found else ""


def is_secret(name: str, value: str = "") -> bool:
    return secret_name(name) or bool(password_in_url(value))


def of(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of an environment that hold secrets."""
    return {name: value for name, value in environment.items() if is_secret(name, value)}


def secrets(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """(text to be replaced, name) of every secret in the environment, in every form it may be written in, longest
    first."""
    found = {}
    for name, value in of(environment).items():
        password = password_in_url(value)
        for text in (value, password, urllib.parse.unquote(password), *value.splitlines()):
            forms = (
                text,
                text.strip(),
                json.dumps(text)[1:-1],
                json.dumps(text, ensure_ascii=False)[1:-1],
                repr(text)[1:-1],
                urllib.parse.quote(text),
                urllib.parse.quote_plus(text),
            )
            for form in forms:
                if len(form) >= SHORTEST and not form.startswith("-----"):
                    found.setdefault(form, name)
    return sorted(found.items(), key=lambda item: -len(item[0]))


# The owner's secrets, in a process of the pool: out of its environment, where a library would find and use them.
KNOWN: dict[str, str] = {}


def redact(text: str) -> str:
    """`text` with the value of every secret environment variable (8 characters or more) replaced by its name."""
    for value, name in secrets({**KNOWN, **os.environ}):
        if value in text:
            text = text.replace(value, f"[{name}]")
    return text


def inert(text: str) -> str:
    """`text` with control characters written out (`\\x1b`): text of a data set must not act on a terminal."""
    return CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


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
        self.rest = b""

    def _write(self, data: bytes) -> None:
        if not data:
            return
        text = inert(redact(data.decode("utf-8", errors="replace")))
        with contextlib.suppress(OSError):  # a full disk: what is being logged matters more than its log
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text)
