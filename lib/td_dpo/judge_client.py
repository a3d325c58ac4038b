"""The judge's endpoint: where it is, whether it answers, and whether what asks it (lib/td_dpo/judge_model.py) is
installed.

The endpoint is OPENAI_BASE_URL (a local vLLM server will do), its key OPENAI_API_KEY; the key is sent as a header and
written nowhere.
"""

from __future__ import annotations

import os
from urllib.parse import urlsplit

import httpx

from lib.errors import MissingError
from lib.run import preflight


def endpoint(environ=os.environ) -> tuple[str, str]:
    """(address of the API, key; empty where there is none). MissingError where neither is set, or the extra `judge` is
    not installed."""
    if lacking := preflight.judge_package():
        raise MissingError("the judge", f"{lacking} is not installed", "the extra `judge`", preflight.JUDGE_EXTRA)
    base, secret = environ.get("OPENAI_BASE_URL", "").strip(), environ.get("OPENAI_API_KEY", "").strip()
    if not base and not secret:
        raise MissingError(
            "the judge",
            "neither OPENAI_BASE_URL nor OPENAI_API_KEY is set",
            "an OpenAI-compatible endpoint",
            "export OPENAI_BASE_URL=http://localhost:8000/v1, or OPENAI_API_KEY; the answers are kept",
        )
    return (base or "https://api.openai.com/v1").rstrip("/"), secret


def host(base: str) -> str:
    """The endpoint as records name it: host and port, no user, no path."""
    parts = urlsplit(base if "//" in base else f"//{base}")
    try:
        return f"{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}"
    except ValueError:  # no port number
        return parts.hostname or ""


def probe(seconds: float = 10.0) -> None:
    """Raises MissingError where nothing answers at the endpoint, or it refuses the key, before anything is paid for."""
    base, secret = endpoint()
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    try:
        status = httpx.get(f"{base}/models", headers=headers, timeout=seconds).status_code
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise MissingError(
            "the judge",
            f"{host(base)} does not answer ({type(error).__name__})",
            "an endpoint that answers",
            "start it, or correct OPENAI_BASE_URL",
        ) from None
    if status in (401, 403):
        raise MissingError(
            "the judge",
            f"{host(base)} refuses the key (HTTP {status})",
            "a key that it knows",
            "correct OPENAI_API_KEY",
        )
