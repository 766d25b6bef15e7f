"""Short prompts become the long captions that video networks were trained on, by a language model behind an address.

A rewriter is a function from prompt to prompt. `ChatRewriter` asks any server that speaks OpenAI's chat completions:
a hosted one, or llama.cpp, vLLM, Ollama and the like on this machine. It never stands in the way: when no answer comes
in time the prompt stays as it is, and the log says why.
"""

import json
import logging
import os
from collections.abc import Callable
from http.client import HTTPException
from time import sleep
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from reelflow.config import configuration
from reelflow.errors import ConfigError

__all__ = ["IMAGE_TO_VIDEO", "TEXT_TO_VIDEO", "ChatRewriter", "Rewriter"]

LOG = logging.getLogger(__name__)

Rewriter = Callable[[str], str]

TEXT_TO_VIDEO = """\
You write descriptions of short videos. The user gives an idea; answer with one paragraph that describes the video as if \
you had watched it, and with nothing else. Keep everything that the user said: who or what is seen, how many, which \
colours, what happens, names, and words in quotation marks letter by letter. Where the user is silent, add what a viewer \
would notice, in this order: the subject and how it looks; its actions, in the order in which they happen, in the present \
tense; the surroundings; the light; the camera, its distance, angle and movement; the visual style. Add no second scene and \
no story. Write in the language of the user, at most {words} words."""

IMAGE_TO_VIDEO = """\
You write descriptions of short videos that begin with a picture the viewer already has. The user says what shall happen; \
answer with one paragraph, and with nothing else. Keep everything that the user said, and words in quotation marks letter by \
letter. Describe motion, not the picture: what moves first and what follows, how fast and how far, in the present tense; \
what stays still; then the movement of the camera, and how light and mood change, if they do. Bring in nobody and nothing \
new unless the user asks for it. Write in the language of the user, at most {words} words."""


@configuration
class ChatRewriter:
    """Ask `model` at `url` (the part before /chat/completions) to rewrite prompts for a `purpose`.

    An answer that is late, that is refused as too many (429) or by a fault of the server (5xx), or that never comes, is asked
    for again, after 1, 2, 4 ... `backoff` seconds; in the end the prompt itself is returned.

    Raises:
        ConfigError: the address is none, a number is out of range, or `purpose` says nothing.
    """

    url: str  # such as https://api.openai.com/v1 or http://localhost:8080/v1
    model: str
    key_variable: str | None = None  # the environment variable that holds the key; None: a server that asks for none
    purpose: str = TEXT_TO_VIDEO  # what the model is told; {words} stands for max_words
    max_words: int = 150
    timeout: float = 30.0  # seconds without a sign of the server, in each attempt
    retries: int = 3
    backoff: float = 1.0  # seconds

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).netloc:
            raise ConfigError(
                f"url must begin with http:// or https://, got {self.url!r}; such as http://localhost:8080/v1"
            )
        if not self.purpose.strip():
            raise ConfigError("purpose must tell the model what to do; nearest: rewriting.TEXT_TO_VIDEO")
        for name, least in (("max_words", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}; nearest: {least}")
        if not 0 < self.timeout < float("inf"):
            raise ConfigError(f"timeout must be some seconds, got {self.timeout}; nearest: 30")
        if not 0 <= self.backoff < float("inf"):
            raise ConfigError(f"backoff must be 0 seconds or more, got {self.backoff}; nearest: 0")

    def __call__(self, prompt: str) -> str:
        """Return the prompt rewritten, or as it is where that fails.

        Raises:
            ConfigError: the environment lacks the key.
        """
        if not prompt.strip():
            return prompt
        request = self._request(prompt)
        for attempt in range(1 + self.retries):
            if attempt:
                sleep(self.backoff * 2 ** (attempt - 1))
            try:
                with urlopen(request, timeout=self.timeout) as answer:
                    return _text(answer.read())
            except HTTPError as error:
                reason = f"status {error.code} ({error.reason})"
                if error.code != 429 and error.code < 500:
                    break
            except (URLError, HTTPException, OSError) as error:  # refused, cut off, or late
                reason = str(error) or type(error).__name__
            except ValueError as error:
                reason = str(error)
        LOG.warning("%s did not rewrite the prompt, which stays as it is: %s", self.url, reason)
        return prompt

    def _request(self, prompt: str) -> Request:
        told = self.purpose.replace("{words}", str(self.max_words))
        messages = [{"role": "system", "content": told}, {"role": "user", "content": prompt}]
        body = json.dumps({"model": self.model, "messages": messages}).encode()
        request = Request(f"{self.url.rstrip('/')}/chat/completions", body, {"Content-Type": "application/json"})
        if self.key_variable is not None:
            key = os.environ.get(self.key_variable)
            if not key:
                raise ConfigError(f"the key is to be in the environment variable {self.key_variable}, which is not set")
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        return request


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
