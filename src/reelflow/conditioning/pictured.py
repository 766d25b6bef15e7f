"""A language model that sees reads the first frame together with the prompt, in a template that has a place for it.

template    | system, before the picture | <picture> | system, after | user: the prompt | header | padding |
kept                                       every k-th                  the prompt                  padding
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reelflow.conditioning.pretrained import (
    check_layer,
    inner_states,
    pixel_values,
    read_model,
    read_processor,
    read_tokenizer,
    tokenized,
)
from reelflow.conditioning.text import TextFeatures
from reelflow.config import configuration
from reelflow.errors import ConfigError

__all__ = ["PicturedReading", "PretrainedPictured"]


@configuration
class PicturedReading:
    """How a system reads a prompt and a picture through one encoder that sees.

    The template has a place for the picture, as the tokenizer names it, and ends with the header of an answer, whose
    last token is `header_end`; `header` tokens up to that one are dropped, so that prompt and padding are kept.

    Raises:
        ConfigError: a number is out of range, or the template has not exactly one place for the prompt.
    """

    length: int  # tokens, those of the prompt and of the template behind it
    template: str
    crop: int  # tokens of the template in front, the picture counted as one; they are read and then dropped
    header: int
    header_end: str
    picture_tokens: int  # that the encoder makes of a picture
    every: int  # of the picture's tokens one in so many is kept, and put before the prompt's
    layer: int  # 0: the last, with the encoder's own last norm; k: the state k layers before, without

    def __post_init__(self) -> None:
        for name, least in (
            ("length", self.header + 1),
            ("crop", 0),
            ("header", 0),
            ("picture_tokens", 1),
            ("every", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}; nearest: {least}")
        if self.template.count("{}") != 1:
            raise ConfigError(f"template must have one {{}} for the prompt, got {self.template!r}")


class PretrainedPictured:
    """A tokenizer, a processor of pictures and an encoder that reads both: prompts and pictures to `TextFeatures`.

    Raises:
        ConfigError: the encoder has fewer layers than the reading asks for.
    """

    def __init__(self, tokenizer: Any, processor: Any, encoder: Any, reading: PicturedReading) -> None:
        self.tokenizer, self.processor, self.encoder, self.reading = tokenizer, processor, encoder.eval(), reading
        check_layer(encoder, reading.layer)

    @classmethod
    def load(
        cls,
        encoder: Path,
        tokenizer: Path,
        processor: Path,
        reading: PicturedReading,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> "PretrainedPictured":
        """Read the folders of an encoder, of its tokenizer and of its processor.

        Raises:
            CheckpointError: a folder is missing or torn, or lacks weights.
            ConfigError: transformers is not installed, or the encoder does not fit the reading.
        """
        model = read_model(encoder, {"llava": "LlavaForConditionalGeneration"}, dtype, device)
        return cls(read_tokenizer(tokenizer), read_processor(processor), model, reading)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], pictures: Float[Tensor, "B 3 H W"]) -> TextFeatures:
        """Encode each prompt with its picture in [-1, 1]: the picture's tokens, then the prompt's.

        Raises:
            ConfigError: there is not a picture for each prompt, or the template does not name one.
        """
        if len(prompts) != len(pictures):
            raise ConfigError(f"need a picture for each prompt, got {len(pictures)} for {len(prompts)}")
        pixels = pixel_values(self.processor, pictures).to(self.encoder.device, self.encoder.dtype)
        rows = [self._encode(prompt, each[None]) for prompt, each in zip(prompts, pixels, strict=True)]
        tokens, masks = zip(*rows, strict=True)
        return TextFeatures(torch.stack(tokens), torch.stack(masks), None)

    def _encode(self, prompt: str, pixels: Tensor) -> tuple[Tensor, Tensor]:
        reading, config = self.reading, self.encoder.config
        numbers, attended = tokenized(self.tokenizer, prompt, reading.template, reading.crop, reading.length)
        ids, mask = numbers[0], attended[0].bool()
        places = (ids == config.image_token_index).nonzero().flatten().tolist()
        if len(places) != 1:
            raise ConfigError(
                f"the template must show the picture once, got {len(places)} times in {reading.template!r}"
            )
        start, grown = places[0], reading.picture_tokens - 1
        picture = torch.full((reading.picture_tokens,), config.image_token_index)
        seen = torch.cat([ids[:start], picture, ids[start + 1 :]])[None].to(self.encoder.device)
        real = (seen != config.pad_token_id).long()
        out = self.encoder(
            input_ids=seen,
            attention_mask=real,
            position_ids=(real.cumsum(-1) - 1).masked_fill(real == 0, 1),
            pixel_values=pixels,
            output_hidden_states=True,
        )
        states = inner_states(out, reading.layer)[0]
        kept = self._kept(ids)
        shown = states[start : start + reading.picture_tokens : reading.every]
        told = torch.cat([torch.ones(len(shown), dtype=torch.bool), mask[kept]])
        return torch.cat([shown, states[kept + grown]]), told.to(states.device)

    def _kept(self, ids: Tensor) -> Tensor:
        """Return the places of the prompt and of the padding: behind the crop, without the header.

        Of a prompt so long that the header is cut off, the last tokens are dropped in its stead.
        """
        ends = (ids == self.tokenizer.convert_tokens_to_ids(self.reading.header_end)).nonzero().flatten()
        whole = self.reading.template.count(self.reading.header_end)
        last = int(ends[-1]) if len(ends) == whole else len(ids) - 1
        places = torch.arange(self.reading.crop, len(ids))
        return places[(places <= last - self.reading.header) | (places > last)]
