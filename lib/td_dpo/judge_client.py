"""An OpenAI-compatible endpoint: where it is, whether it answers, and one reply of it, tried again where that may help.

The endpoint is OPENAI_BASE_URL (a local vLLM server will do), its key OPENAI_API_KEY; the key is sent as a header and
written nowhere.
"""

from __future__ import annotations

import email.utils
import os
import threading
import time
from urllib.parse import urlsplit

import httpx
import tenacity

from lib.errors import MissingError, StudyError

MAX_TOKENS = 2048
PATIENCE = 600.0  # seconds: an endpoint that asks to wait longer is left for a later call of the command
_TRANSIENT = {408, 409, 429, 500, 502, 503, 504}
_OF_THIS_REQUEST = {400, 413, 422}  # a filter, a prompt too long: others may pass


class _Transient(Exception):
    """An answer that another attempt may better; `after`: seconds that the endpoint asks to wait."""

    def __init__(self, what: str, after: float | None = None):
        super().__init__(what)
        self.after = after


class Refused(Exception):
    """The endpoint will not grade this one answer."""


def endpoint(environ=os.environ) -> tuple[str, dict]:
    """(address of the API, headers). MissingError where neither address nor key is set."""
    base, secret = environ.get("OPENAI_BASE_URL", "").strip(), environ.get("OPENAI_API_KEY", "").strip()
    if not base and not secret:
        raise MissingError("the judge", "neither OPENAI_BASE_URL nor OPENAI_API_KEY is set", "an OpenAI-compatible endpoint",
                           "export OPENAI_BASE_URL=http://localhost:8000/v1, or OPENAI_API_KEY; the answers are kept")
    return (base or "https://api.openai.com/v1").rstrip("/"), {"Authorization": f"Bearer {secret}"} if secret else {}


def host(base: str) -> str:
    """The endpoint as records name it: host and port, no user, no path."""
    parts = urlsplit(base if "//" in base else f"//{base}")
    try:
        return f"{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}"
    except ValueError:  # no port number
        return parts.hostname or ""


def probe(seconds: float = 10.0) -> None:
    """Raises MissingError where nothing answers at the endpoint, or it refuses the key, before anything is paid for."""
    base, headers = endpoint()
    try:
        status = httpx.get(f"{base}/models", headers=headers, timeout=seconds).status_code
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise MissingError("the judge", f"{host(base)} does not answer ({type(error).__name__})", "an endpoint that answers",
                           "start it, or correct OPENAI_BASE_URL") from None
    if status in (401, 403):
        raise MissingError("the judge", f"{host(base)} refuses the key (HTTP {status})", "a key that it knows",
                           "correct OPENAI_API_KEY")


def _wanted_wait(answer: httpx.Response) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date."""
    text = answer.headers.get("Retry-After", "").strip()
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def ask(client: httpx.Client, base: str, model: str, body: list[dict], attempts: int, wait: float,
        stopped: threading.Event) -> dict:
    """One reply of the judge at temperature 0, tried again where the endpoint may recover: after the time it names, else
    after exponentially growing ones."""
    def once() -> dict:
        try:
            answer = client.post(f"{base}/chat/completions", json={"model": model, "messages": body, "temperature": 0,
                                                                   "max_tokens": MAX_TOKENS})
        except httpx.TransportError as error:
            raise _Transient(type(error).__name__) from None
        if answer.status_code in _TRANSIENT:
            after = _wanted_wait(answer)
            if after is not None and after > PATIENCE:
                raise MissingError("the judge", f"HTTP {answer.status_code}, to be asked again in {after:.0f} s",
                                   "an endpoint that answers", "the same command then: what is graded is kept")
            raise _Transient(f"HTTP {answer.status_code}", after)
        if answer.status_code in _OF_THIS_REQUEST:
            raise Refused(f"HTTP {answer.status_code}")
        if answer.status_code != 200:
            raise StudyError("the judge", f"HTTP {answer.status_code}", "an answer", "check the model's name and the key")
        try:
            made = answer.json()
            return {"text": made["choices"][0]["message"]["content"] or "", "usage": made.get("usage") or {}}
        except (ValueError, KeyError, IndexError, TypeError):
            raise _Transient("a reply that is not a chat completion") from None

    growing = tenacity.wait_exponential_jitter(initial=wait, max=60 * wait)

    def pause(state: tenacity.RetryCallState) -> float:
        named = getattr(state.outcome.exception(), "after", None)
        return growing(state) if named is None else named

    retry = tenacity.Retrying(stop=tenacity.stop_after_attempt(attempts) | tenacity.stop_when_event_set(stopped), wait=pause,
                              retry=tenacity.retry_if_exception_type(_Transient), sleep=tenacity.sleep_using_event(stopped),
                              reraise=True)
    try:
        return retry(once)
    except _Transient as error:
        raise MissingError("the judge", f"{error}, {attempts} times", "an endpoint that answers",
                           "the same command again: what is graded is kept and not asked again") from None
