"""The judge through inspect-ai: its OpenAI-compatible provider, with its connections and its retries.

Imported where answers are graded and nowhere else: it needs the extra `judge` and a second. Of inspect-ai only the
model layer is used. Its eval() would read a `.env`, write a log and a trace of its own with all that an endpoint says
(a key that it repeats, too), and keep the grades a second time, beside the members' records.
"""

from __future__ import annotations

import asyncio
import email.utils
import time
import uuid
import warnings
from collections.abc import Awaitable, Callable, Iterable

from inspect_ai.log._transcript import Transcript, init_transcript
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    Model,
    get_model,
    modelapi,
)
from inspect_ai.model._model import ModelGenerateError
from inspect_ai.model._openai import OpenAIResponseError
from inspect_ai.model._providers.openai_compatible import OpenAICompatibleAPI
from openai import APIError, Omit
from openai.types import CompletionUsage
from tenacity import RetryCallState, RetryError, wait_exponential_jitter

from lib.errors import MissingError, StudyError

MAX_TOKENS = 2048
PATIENCE = 600.0  # seconds: an endpoint that asks to wait longer is left for a later call of the command
NO_KEY = "none"  # the client wants one; it is not sent
_OF_THIS_REQUEST = {400, 413, 422}  # a filter, a prompt too long: others may pass
_MESSAGES = {"system": ChatMessageSystem, "user": ChatMessageUser}


class Refused(Exception):
    """The endpoint will not grade this one answer."""


class Stopped(Exception):
    """Not asked: another request found out that there is no use in it."""


class Judge(OpenAICompatibleAPI):
    """inspect-ai's provider, but for three things: a reply is kept as it came, `Retry-After` is waited for, and no
    request is tried again once `stopped` is set."""

    def __init__(self, model_name: str, wait: float = 1.0, **given):
        super().__init__(
            model_name, service="judge", max_retries=0, **given
        )  # inspect-ai tries again, not openai's client too
        self.growing, self.stopped = wait_exponential_jitter(multiplier=wait, max=60 * wait), False
        self.scope = uuid.uuid4().hex

    def service_model_name(self) -> str:
        return self.model_name  # with its slashes, as the endpoint knows it

    def connection_key(self) -> str:
        return self.scope  # a later call's number of connections is its own

    def request_headers(self, config) -> dict:
        return {"Authorization": Omit()} if self.api_key == NO_KEY else {}

    def handle_bad_request(self, ex):
        return ex  # not a reply without a grade: nothing was graded

    def chat_choices_from_completion(self, completion, tools) -> list[ChatCompletionChoice]:
        """The first choice's text as it came. `completion` is mended where an endpoint leaves out what nobody here
        reads."""
        try:
            text = completion.choices[0].message.content or ""
        except (AttributeError, LookupError, TypeError):
            text = None
        if not isinstance(text, str):
            raise OpenAIResponseError("server_error", "not a chat completion")  # which is tried again
        used = [getattr(completion.usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        completion.model = self.model_name
        completion.usage = (
            CompletionUsage(prompt_tokens=used[0], completion_tokens=used[1], total_tokens=sum(used))
            if all(isinstance(count, int) for count in used)
            else None
        )
        return [ChatCompletionChoice(message=ChatMessageAssistant(content=text, source="generate"), stop_reason="stop")]

    def should_retry(self, ex):
        odd = isinstance(ex, ValueError) or _status(ex) == 409  # a body that is no JSON; a lock that was not had
        return not self.stopped and not (wanted_wait(ex) or 0) > PATIENCE and (odd or super().should_retry(ex))

    def retry_wait(self) -> Callable[[RetryCallState], float]:
        """Seconds before the next attempt: what the endpoint names, else exponentially growing ones."""

        def seconds(state: RetryCallState) -> float:
            named = wanted_wait(state.outcome.exception())
            return self.growing(state) if named is None else named

        return seconds


@modelapi(name="judge")
def _judge() -> type[Judge]:
    return Judge


def connected(base: str, secret: str, name: str, *, workers: int, attempts: int, wait: float, timeout: float) -> Model:
    """The judge `name` at an endpoint, at temperature 0: at most `attempts` of a request, at first `wait` seconds
    apart, each given up after `timeout` seconds without a byte."""
    settings = GenerateConfig(temperature=0, max_tokens=MAX_TOKENS, max_retries=attempts - 1, max_connections=workers)
    return get_model(
        f"judge/{name}",
        config=settings,
        base_url=base,
        api_key=secret or NO_KEY,
        memoize=False,
        wait=wait,
        client_timeout=timeout,
    )


async def ask(model: Model, body: list[dict]) -> dict:
    """One reply of the judge: its text, and the tokens that the endpoint counted ({} where it counts none)."""
    if model.api.stopped:
        raise Stopped
    init_transcript(Transcript())  # of this request: inspect-ai's own one would keep all of them in memory
    try:
        output = await model.generate([_MESSAGES[row["role"]](content=row["content"]) for row in body])
    except RetryError as error:
        raise MissingError(
            "the judge",
            f"{_said(error.last_attempt.exception())}, {error.last_attempt.attempt_number} times",
            "an endpoint that answers",
            "the same command again: what is graded is kept and not asked again",
        ) from None
    except (APIError, ModelGenerateError, OpenAIResponseError, ValueError) as error:
        if model.api.stopped:
            raise Stopped from None
        if _status(error) in _OF_THIS_REQUEST:
            raise Refused(_said(error)) from None
        if (after := wanted_wait(error) or 0) > PATIENCE:
            raise MissingError(
                "the judge",
                f"{_said(error)}, to be asked again in {after:.0f} s",
                "an endpoint that answers",
                "the same command then: what is graded is kept",
            ) from None
        raise StudyError("the judge", _said(error), "an answer", "check the model's name and the key") from None
    used = output.usage
    return {
        "text": output.completion,
        "usage": {"prompt_tokens": used.input_tokens, "completion_tokens": used.output_tokens} if used else {},
    }


def ask_each(
    model: Model, rows: Iterable[dict], one: Callable[[dict], Awaitable[None]], workers: int, timeout: float
) -> None:
    """`one(row)` for each row, `workers` at a time. At the first failure nothing more is asked, what is under way has
    `timeout` seconds to come back and be kept, and the failure is raised."""
    failed: list[Exception] = []
    waiting = iter(rows)

    async def work(limit: asyncio.Timeout) -> None:
        for row in waiting:  # shared: each takes the next
            try:
                await one(row)
            except Exception as error:
                if not model.api.stopped:
                    failed.append(error)
                    model.api.stopped = True
                    limit.reschedule(asyncio.get_running_loop().time() + timeout)
                return

    async def all_of_them() -> None:
        try:
            async with asyncio.timeout(None) as limit:
                await asyncio.gather(*(work(limit) for _ in range(workers)))
        except TimeoutError:
            pass
        finally:
            await model.api.aclose()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Pydantic serializer")  # they would show an odd reply on the terminal
        asyncio.run(all_of_them())
    if failed:
        raise failed[0]


def wanted_wait(error: BaseException) -> float | None:
    """Seconds of the Retry-After header of the answer that this error is; the header holds seconds or a date."""
    text = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "").strip()
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _status(error: BaseException) -> int | None:
    return getattr(error, "status_code", None)


def _said(error: BaseException) -> str:
    """What failed, in words that hold neither address nor key nor text."""
    if _status(error):
        return f"HTTP {_status(error)}"
    odd = isinstance(error, OpenAIResponseError | ValueError)
    return "a reply that is not a chat completion" if odd else type(error).__name__
