"""Models behind an address: any server that speaks OpenAI's chat completions, hosted or on this machine.

The one client of the house. It sits out what passes (429, 5xx, silence), says why it gave up, and asks one question at
a time; who asks many in parallel brings the threads.
"""

import base64
import json
import os
from collections.abc import Sequence
from http.client import HTTPException
from time import sleep
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from reelflow.config import configuration
from reelflow.errors import ConfigError, ReelflowError

__all__ = ["DESCRIBE", "Chat", "Describer", "NoAnswer"]

DESCRIBE = """\
You are shown frames of one short video, in order and evenly spaced. Answer with one paragraph that describes the video as \
someone who watched it would, and with nothing else: the subject and how it looks; its actions, in the order in which they \
happen, in the present tense; the surroundings; the light; the camera, its distance, angle and movement; the visual style. \
Say only what is seen, do not speak of frames or pictures, and guess no names. At most {words} words."""


class NoAnswer(ReelflowError):
    """A server that refused, stayed silent, or said nothing of use."""


@configuration
class Chat:
    """Ask `model` at `url` (the part before /chat/completions).

    An answer that is late, that is refused as too many (429) or by a fault of the server (5xx), or that never comes, is asked
    for again, after 1, 2, 4 ... `backoff` seconds.

    Raises:
        ConfigError: the address is none, or a number is out of range.
    """

    url: str  # such as https://api.openai.com/v1 or http://localhost:8080/v1
    model: str
    key_variable: str | None = None  # the environment variable that holds the key; None: a server that asks for none
    timeout: float = 30.0  # seconds without a sign of the server, in each attempt
    retries: int = 3
    backoff: float = 1.0  # seconds

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).netloc:
            raise ConfigError(
                f"url must begin with http:// or https://, got {self.url!r}; such as http://localhost:8080/v1"
            )
        if self.retries < 0:
            raise ConfigError(f"retries must be at least 0, got {self.retries}; nearest: 0")
        if not 0 < self.timeout < float("inf"):
            raise ConfigError(f"timeout must be some seconds, got {self.timeout}; nearest: 30")
        if not 0 <= self.backoff < float("inf"):
            raise ConfigError(f"backoff must be 0 seconds or more, got {self.backoff}; nearest: 0")

    def answer(self, messages: Sequence[dict[str, Any]]) -> str:
        """Return what the model says next, its white space reduced to single blanks.

        Raises:
            ConfigError: the environment lacks the key.
            NoAnswer: after all attempts there is none.
        """
        request = self._request("chat/completions", {"model": self.model, "messages": list(messages)})
        for attempt in range(1 + self.retries):
            if attempt:
                sleep(self.backoff * 2 ** (attempt - 1))
            try:
                with urlopen(request, timeout=self.timeout) as answer:
                    return _text(answer.read())
            except HTTPError as error:
                reason = f"status {error.code} ({error.reason})"
                error.close()
                if error.code != 429 and error.code < 500:
                    break
            except (URLError, HTTPException, OSError) as error:  # refused, cut off, or late
                reason = str(error) or type(error).__name__
            except ValueError as error:
                reason = str(error)
        raise NoAnswer(reason)

    def check(self) -> None:
        """Make sure that somebody is there, asking no model: the list of models is read, and any reply will do.

        Raises:
            ConfigError: the environment lacks the key, or nobody answers, or the key is refused.
        """
        try:
            with urlopen(self._request("models"), timeout=self.timeout):
                return
        except HTTPError as error:
            error.close()
            if error.code in (401, 403):
                raise ConfigError(f"{self.url} refuses the key: status {error.code} ({error.reason})") from error
        except (URLError, HTTPException, OSError) as error:
            why = str(error) or type(error).__name__
            raise ConfigError(f"{self.url} does not answer: {why}; start the server, or mend the address") from error

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Request:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data is not None else {}
        request = Request(f"{self.url.rstrip('/')}/{path}", data, headers)
        if self.key_variable is not None:
            key = os.environ.get(self.key_variable)
            if not key:
                raise ConfigError(f"the key is to be in the environment variable {self.key_variable}, which is not set")
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        return request


@configuration
class Describer(Chat):
    """Ask a model that sees for the caption of a clip, from some of its frames.

    Raises:
        ConfigError: as `Chat`, or `purpose` says nothing, or `max_words` is below 1.
    """

    purpose: str = DESCRIBE  # what the model is told; {words} stands for max_words
    max_words: int = 120

    def __post_init__(self) -> None:
        super().__post_init__()
        check_purpose(self.purpose, self.max_words, nearest="chat.DESCRIBE")

    def __call__(self, pictures: Sequence[bytes]) -> str:
        """Describe JPEG pictures, the frames of one clip in their order.

        Raises:
            ConfigError, NoAnswer: as `Chat.answer`.
        """
        shown = [f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}" for picture in pictures]
        told = {"type": "text", "text": self.purpose.replace("{words}", str(self.max_words))}
        content = [told, *({"type": "image_url", "image_url": {"url": url}} for url in shown)]
        return self.answer([{"role": "user", "content": content}])


def check_purpose(purpose: str, max_words: int, *, nearest: str) -> None:
    """Refuse a purpose that says nothing, and an answer of no words.

    Raises:
        ConfigError: either is so.
    """
    if not purpose.strip():
        raise ConfigError(f"purpose must tell the model what to do; nearest: {nearest}")
    if max_words < 1:
        raise ConfigError(f"max_words must be at least 1, got {max_words}; nearest: 1")


def _text(answer: bytes) -> str:
    """Return what the model said.

    Raises:
        ValueError: it said nothing, or the answer is no chat completion.
    """
    try:
        said = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"no chat completion: {answer[:80]!r}") from error
    said = said.strip() if isinstance(said, str) else ""
    if not said:
        raise ValueError("an empty answer")
    return " ".join(said.split())
