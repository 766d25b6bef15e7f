"""Short prompts become the long captions that video networks were trained on, by a language model behind an address.

A rewriter is a function from prompt to prompt. `ChatRewriter` asks any server that speaks OpenAI's chat completions:
a hosted one, or llama.cpp, vLLM, Ollama and the like on this machine. It never stands in the way: when no answer comes
in time the prompt stays as it is, and the log says why.
"""

import logging
from collections.abc import Callable

from reelflow.conditioning.chat import Chat, NoAnswer, check_purpose
from reelflow.config import configuration

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
class ChatRewriter(Chat):
    """Ask a model to rewrite prompts for a `purpose`; where no answer comes, the prompt itself is returned.

    Raises:
        ConfigError: as `Chat`, or `purpose` says nothing, or `max_words` is below 1.
    """

    purpose: str = TEXT_TO_VIDEO  # what the model is told; {words} stands for max_words
    max_words: int = 150

    def __post_init__(self) -> None:
        super().__post_init__()
        check_purpose(self.purpose, self.max_words, nearest="rewriting.TEXT_TO_VIDEO")

    def __call__(self, prompt: str) -> str:
        """Return the prompt rewritten, or as it is where that fails.

        Raises:
            ConfigError: the environment lacks the key.
        """
        if not prompt.strip():
            return prompt
        told = self.purpose.replace("{words}", str(self.max_words))
        try:
            return self.answer([{"role": "system", "content": told}, {"role": "user", "content": prompt}])
        except NoAnswer as reason:
            LOG.warning("%s did not rewrite the prompt, which stays as it is: %s", self.url, reason)
            return prompt
