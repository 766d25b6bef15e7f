"""Prompts and pictures read by large pretrained encoders, through transformers (`pip install "reelflow[text]"`).

A published network has learned its prompts as one encoder, read in one way, gave them to it: so many tokens, a template
around the text, one of the layers, something beyond the end of the prompt. A `Reading` says all of that. Encoders are
given one prompt at a time, so that a prompt's features are the same whatever stands beside it.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor

from reelflow.conditioning.cleaning import Cleaning, cleaned
from reelflow.conditioning.text import TextFeatures
from reelflow.config import configuration, to_dict
from reelflow.errors import CheckpointError, ConfigError

__all__ = [
    "PretrainedImage",
    "PretrainedText",
    "Reading",
    "check_layer",
    "inner_states",
    "pixel_values",
    "read_model",
    "read_processor",
    "read_tokenizer",
    "tokenized",
    "transformers",
]

LOG = logging.getLogger(__name__)
TURN = Lock()  # padding and length are state of a tokenizer, which another thread could change midway

# Classes that read only, where transformers would choose one that also writes, or also sees.
READERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel", "clip": "CLIPTextModel"}
SEERS = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}


def transformers() -> ModuleType:
    """Return the library, imported on first use.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f'pretrained encoders need transformers: pip install "reelflow[text]" ({error})') from error
    return transformers


@configuration
class Reading:
    """How a system reads its prompts through one encoder; texts longer than `length` tokens are cut, and the log says so.

    Raises:
        ConfigError: a length below 1, a negative crop or layer, or a template without exactly one place for the prompt.
    """

    length: int  # tokens, those of the prompt and of the template behind it
    template: str = "{}"  # put around the prompt
    crop: int = 0  # tokens of the template in front, read by the encoder and then dropped
    cleaning: Cleaning = "none"
    empty: str | None = ""  # read in place of a text that is empty; None: nothing is, and no token is real
    layer: int = 0  # 0: the last, with the encoder's own last norm; k: the state k layers before, without
    mask_encoder: bool = True  # tokens of the prompt attend only to each other while it is read
    padding: Literal["masked", "zeros", "encoded"] = "masked"  # beyond the prompt; the last two count as real tokens
    pooled: Literal["none", "output", "projection", "mean"] = (
        "none"  # the encoder's own, its projection, or over tokens
    )

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError(f"length must be at least 1 token, got {self.length}; nearest: 1")
        for name in ("crop", "layer"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}; nearest: 0")
        if self.template.count("{}") != 1:
            raise ConfigError(f"template must have one {{}} for the prompt, got {self.template!r}; nearest: '{{}}'")


class PretrainedText:
    """A tokenizer and an encoder of transformers, read in one way: prompts to `TextFeatures`.

    Raises:
        ConfigError: the encoder has fewer layers or positions than the reading asks for.
    """

    def __init__(self, tokenizer: Any, encoder: Any, reading: Reading) -> None:
        self.tokenizer, self.encoder, self.reading = tokenizer, encoder.eval(), reading
        check_layer(encoder, reading.layer)
        positions, asked = getattr(encoder.config, "max_position_embeddings", None), reading.crop + reading.length
        if positions and asked > positions:
            raise ConfigError(
                f"the encoder has {positions} positions, the reading asks for {asked}; "
                f"nearest: length={positions - reading.crop}"
            )

    @classmethod
    def load(
        cls,
        encoder: Path,
        tokenizer: Path,
        reading: Reading,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> "PretrainedText":
        """Read the folders of an encoder and of its tokenizer; without `dtype`, as the weights are stored.

        Raises:
            CheckpointError: a folder is missing or torn, or lacks weights.
            ConfigError: transformers is not installed, or the encoder does not fit the reading.
        """
        readers = READERS | ({"clip": "CLIPTextModelWithProjection"} if reading.pooled == "projection" else {})
        return cls(read_tokenizer(tokenizer), read_model(encoder, readers, dtype, device), reading)

    @property
    def dim(self) -> int:
        """The channels of a token."""
        return int(self.encoder.config.hidden_size)

    @cached_property
    def identity(self) -> str:
        """The SHA-256 of all that features depend on: reading, tokenizer, configuration and weights (about 1 GB/s)."""
        digest = hashlib.sha256(json.dumps(to_dict(self.reading)).encode())
        rust = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = rust.to_str() if rust is not None else json.dumps(self.tokenizer.get_vocab())
        for part in (type(self.tokenizer).__name__, vocabulary, self.encoder.config.to_json_string()):
            digest.update(hashlib.sha256(part.encode()).digest())
        for name, value in sorted(self.encoder.state_dict().items()):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> TextFeatures:
        """Encode prompts, each by itself; features stay on the encoder's device, in its dtype."""
        known = {prompt: self._encode(prompt) for prompt in dict.fromkeys(prompts)}
        rows = [known[prompt] for prompt in prompts]
        pooled = [row.pooled for row in rows if row.pooled is not None]
        return TextFeatures(
            tokens=torch.cat([row.tokens for row in rows]),
            mask=torch.cat([row.mask for row in rows]),
            pooled=torch.cat(pooled) if pooled else None,
        )

    def _encode(self, prompt: str) -> TextFeatures:
        reading = self.reading
        text = cleaned(prompt, reading.cleaning)
        if not text and reading.empty is None:
            return self._nothing()
        ids, mask = tokenized(
            self.tokenizer, text or reading.empty or "", reading.template, reading.crop, reading.length
        )
        ids, mask = ids.to(self.encoder.device), mask.to(self.encoder.device)
        out = self.encoder(
            input_ids=ids,
            attention_mask=mask if reading.mask_encoder else None,
            **_asked(reading.layer),
        )
        tokens, real = inner_states(out, reading.layer)[:, reading.crop :], mask[:, reading.crop :].bool()
        if reading.padding == "zeros":
            tokens = tokens.where(real[..., None], 0.0)
        pooled = self._pooled(out, tokens, real)
        return TextFeatures(tokens, real if reading.padding == "masked" else torch.ones_like(real), pooled)

    def _pooled(self, out: Any, tokens: Tensor, real: Tensor) -> Tensor | None:
        match self.reading.pooled:
            case "none":
                return None
            case "output":
                return out.pooler_output
            case "projection":
                return out.text_embeds
            case "mean":
                return (tokens * real[..., None]).sum(1) / real.sum(1, keepdim=True)

    def _nothing(self) -> TextFeatures:
        config, like = self.encoder.config, {"device": self.encoder.device, "dtype": self.encoder.dtype}
        width = {"none": 0, "projection": getattr(config, "projection_dim", 0)}.get(self.reading.pooled, self.dim)
        return TextFeatures(
            tokens=torch.zeros(1, self.reading.length, self.dim, **like),
            mask=torch.zeros(1, self.reading.length, dtype=torch.bool, device=self.encoder.device),
            pooled=torch.zeros(1, width, **like) if width else None,
        )


class PretrainedImage:
    """A processor and a vision encoder of transformers: pictures to the tokens of one of its layers."""

    def __init__(self, processor: Any, encoder: Any, *, layer: int) -> None:
        self.processor, self.encoder, self.layer = processor, encoder.eval(), layer
        check_layer(encoder, layer)

    @classmethod
    def load(
        cls,
        encoder: Path,
        processor: Path,
        *,
        layer: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> "PretrainedImage":
        """Read the folders of an encoder and of its processor; `layer` counts back from the last, which is 0.

        Raises:
            CheckpointError: a folder is missing or torn, or lacks weights.
            ConfigError: transformers is not installed, or the encoder has too few layers.
        """
        return cls(read_processor(processor), read_model(encoder, SEERS, dtype, device), layer=layer)

    @torch.no_grad()
    def __call__(self, pictures: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P G"]:
        """Encode pictures in [-1, 1], rounded to 8 bits as files have them."""
        pixels = pixel_values(self.processor, pictures).to(self.encoder.device, self.encoder.dtype)
        return inner_states(self.encoder(pixel_values=pixels, **_asked(self.layer)), self.layer)


def tokenized(
    tokenizer: Any, text: str, template: str, crop: int, length: int
) -> tuple[Int[Tensor, "1 L"], Int[Tensor, "1 L"]]:
    """Return numbers and mask of crop + length tokens of a text in its template; the log names words that do not fit."""
    limit, text = crop + length, template.replace("{}", text)
    fit = {"padding": "max_length", "truncation": True, "max_length": limit}
    with TURN:
        batch = tokenizer([text], **fit, return_attention_mask=True, return_tensors="pt")
        whole = tokenizer(text, verbose=False).input_ids
    if len(whole) > limit:
        kept = batch.input_ids[0].tolist()
        same = next((i for i, (a, b) in enumerate(zip(kept, whole, strict=False)) if a != b), limit)
        behind = tokenizer(template.partition("{}")[2], add_special_tokens=False).input_ids
        dropped, behind = (tokenizer.decode(part, skip_special_tokens=True) for part in (whole[same:], behind))
        dropped = dropped.removesuffix(behind).strip()
        if dropped and not behind.strip().endswith(dropped):  # else the template alone is cut
            LOG.warning("the encoder reads %d tokens of a prompt and drops: %s", length, dropped)
    return batch.input_ids, batch.attention_mask


def read_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in a folder.

    Raises:
        CheckpointError: the folder is missing or torn.
    """
    return _read("tokenizer", transformers().AutoTokenizer, folder)


def read_processor(folder: Path) -> Any:
    """Return the processor of pictures in a folder; it resizes by Pillow, on any machine alike.

    Raises:
        CheckpointError: the folder is missing or torn.
    """
    return _read("processor", transformers().AutoImageProcessor, folder, backend="pil")


def pixel_values(processor: Any, pictures: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 h w"]:
    """Resize and normalise pictures in [-1, 1] as an encoder wants them."""
    from PIL import Image

    bytes_ = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return processor(images=[Image.fromarray(each) for each in bytes_], return_tensors="pt").pixel_values


def _asked(layer: int) -> dict[str, bool]:
    """Ask for states within only where they are read: a decoder's would fill memory."""
    return {"output_hidden_states": True} if layer else {}


def inner_states(out: Any, layer: int) -> Tensor:
    """Return what left the last layer (0), or one so many layers before."""
    return out.hidden_states[-1 - layer] if layer else out.last_hidden_state


def check_layer(encoder: Any, layer: int) -> None:
    """Refuse a layer that an encoder does not have.

    Raises:
        ConfigError: it has fewer.
    """
    layers = getattr(encoder.config, "text_config", encoder.config).num_hidden_layers
    if layer > layers:
        raise ConfigError(
            f"layer must be 0 to {layers} for this encoder of {layers} layers, got {layer}; nearest: {layers}"
        )


def read_model(folder: Path, readers: dict[str, str], dtype: torch.dtype | None, device: torch.device | str) -> Any:
    """Return the encoder in a folder, of the class that `readers` names for its kind, else of transformers' own choice.

    Raises:
        CheckpointError: the folder is missing or torn, or lacks weights.
    """
    library = transformers()
    kind = _read("configuration", library.AutoConfig, folder).model_type
    name = readers.get(kind) or readers.get(kind.partition("_")[0], "AutoModel")
    model, report = _read(
        "encoder",
        getattr(library, name),
        folder,
        dtype=dtype or "auto",
        use_safetensors=True,  # nothing is unpickled
        output_loading_info=True,
    )
    lacking = sorted(report["missing_keys"]) + sorted(str(each) for each in report["mismatched_keys"])
    if lacking:
        raise CheckpointError(
            f"{folder} lacks {len(lacking)} weights of a {type(model).__name__}: {', '.join(lacking[:3])}"
        )
    return model.to(device)


def _read(what: str, kind: Any, folder: Path, **options: Any) -> Any:
    if not Path(folder).is_dir():  # else taken for a name on a hub
        raise CheckpointError(f"there is no folder {folder} to read the {what} from")
    told = transformers().utils.logging
    shown = told.is_progress_bar_enabled()
    told.disable_progress_bar()  # of its own, in the middle of ours
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} holds no {what} that transformers reads: {error}") from error
    finally:
        if shown:
            told.enable_progress_bar()
