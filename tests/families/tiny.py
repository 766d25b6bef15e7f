"""Tiny random text and image encoders with their tokenizers and processors, in folders as published pipelines have them.

Every function writes what transformers' `save_pretrained` writes, offline and seeded. Vocabularies are spelled out, not
trained: trainers of `tokenizers` break ties by chance. Words of `WORDS` are a token or two each, any other text is more,
so that published templates have about the length in tokens that they really have. transformers is imported on use.
Each returns what it wrote: the tokenizer or processor and the encoder (`llava` both of the former).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "WIDTH",
    "byt5",
    "clip_text",
    "clip_vision",
    "llama",
    "llava",
    "mt5",
    "qwen_vl",
    "siglip",
    "t5",
    "umt5",
    "wan",
]

SPELLED = """
a an the and in on of at to over is no not with by
red blue green kite dunes cat dog sea city night sun rain runs flies jumps swims walks turns left right slowly
system user assistant You are helpful Describe video detailing following aspects according reference image main content
theme color shape size texture quantity text spatial relationships objects Actions events behaviors temporal physical
movement changes background environment light style atmosphere camera angles movements transitions used Text The
"""
WORDS = SPELLED.split()
WIDTH = 32

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def t5(
    folder: Path,
    *,
    tokenizer: str = "tokenizer",
    encoder: str = "text_encoder",
    dim: int = WIDTH,
    length: int = 512,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Write a T5 v1.1 encoder; `length` is the tokenizer's own longest text."""
    from transformers import T5EncoderModel

    words = _unigram(folder / tokenizer, length)
    return words, _save(T5EncoderModel(_t5_config(len(words), dim)), folder / encoder, seed)


def umt5(
    folder: Path,
    *,
    tokenizer: str = "tokenizer",
    encoder: str = "text_encoder",
    dim: int = WIDTH,
    length: int = 512,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Write a UMT5 encoder: T5 with relative positions in every layer."""
    from transformers import UMT5Config, UMT5EncoderModel

    words = _unigram(folder / tokenizer, length)
    return words, _save(UMT5EncoderModel(UMT5Config(**_t5_sizes(len(words), dim))), folder / encoder, seed)


def mt5(
    folder: Path,
    *,
    tokenizer: str = "tokenizer",
    encoder: str = "text_encoder",
    dim: int = WIDTH,
    length: int = 512,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Write an mT5 encoder: T5 v1.1 of another vocabulary."""
    from transformers import MT5Config, MT5EncoderModel

    words = _unigram(folder / tokenizer, length)
    return words, _save(MT5EncoderModel(MT5Config(**_t5_sizes(len(words), dim))), folder / encoder, seed)


def byt5(
    folder: Path,
    *,
    tokenizer: str = "tokenizer_2",
    encoder: str = "text_encoder_2",
    dim: int = WIDTH,
    length: int = 256,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Write a T5 encoder that reads bytes."""
    from transformers import ByT5Tokenizer, T5EncoderModel

    words = ByT5Tokenizer(model_max_length=length)
    words.save_pretrained(folder / tokenizer)
    return words, _save(T5EncoderModel(_t5_config(len(words), dim)), folder / encoder, seed)


def clip_text(
    folder: Path,
    *,
    tokenizer: str = "tokenizer_2",
    encoder: str = "text_encoder_2",
    dim: int = WIDTH,
    projection: int | None = None,
    pad: str = "<|endoftext|>",
    seed: int = 0,
) -> tuple[Any, Any]:
    """Write a CLIP text encoder, with a projection of the pooled output to so many channels if asked; `pad` is "!" in CLIP-G."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    letters = _byte_letters()
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges = _merges([[*word[:-1], word[-1] + "</w>"] for word in map(str.lower, WORDS)])
    vocabulary = list(dict.fromkeys([*vocabulary, *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]))
    words = CLIPTokenizer(_numbered(vocabulary), merges, pad_token=pad, model_max_length=77)
    words.save_pretrained(folder / tokenizer)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection or dim,
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=2,  # as published: the end is then found as the largest number
        pad_token_id=words.pad_token_id,
        hidden_act="quick_gelu",
    )
    model = CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)
    return words, _save(model, folder / encoder, seed)


def llama(
    folder: Path, *, tokenizer: str = "tokenizer", encoder: str = "text_encoder", dim: int = WIDTH, seed: int = 0
) -> tuple[Any, Any]:
    """Write a LLaMA 3 decoder without its head."""
    from transformers import LlamaModel

    words = _llama_tokenizer(folder / tokenizer)
    return words, _save(LlamaModel(_llama_config(words, dim)), folder / encoder, seed)


def llava(
    folder: Path,
    *,
    tokenizer: str = "tokenizer",
    encoder: str = "text_encoder",
    processor: str = "image_processor",
    dim: int = WIDTH,
    seed: int = 0,
) -> tuple[Any, Any, Any]:
    """Write a LLaMA 3 that sees one picture as 24 x 24 tokens, as LLaVA does (of 48 x 48 pixels here)."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    words = _llama_tokenizer(folder / tokenizer)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=48)
    pictures.save_pretrained(folder / processor)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_vision_sizes(dim, size=48, patch=2)),
        text_config=_llama_config(words, dim),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=576,
        pad_token_id=words.pad_token_id,
    )
    return words, pictures, _save(LlavaForConditionalGeneration(config), folder / encoder, seed)


def qwen_vl(
    folder: Path, *, tokenizer: str = "tokenizer", encoder: str = "text_encoder", dim: int = WIDTH, seed: int = 0
) -> tuple[Any, Any]:
    """Write the text part of a Qwen2.5-VL, with a chat template."""
    from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, Qwen2Tokenizer

    merges = _spaced_merges()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = list(dict.fromkeys([*_byte_letters(), *map("".join, merges), *special]))
    words = Qwen2Tokenizer(_numbered(vocabulary), merges, eos_token="<|im_end|>", chat_template=CHAT)
    words.add_special_tokens({"additional_special_tokens": special[1:]})
    words.padding_side = "right"
    words.save_pretrained(folder / tokenizer)
    config = Qwen2_5_VLTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [dim // 16, dim // 16, dim // 8]},
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return words, _save(Qwen2_5_VLTextModel(config), folder / encoder, seed)


def clip_vision(
    folder: Path,
    *,
    processor: str = "image_processor",
    encoder: str = "image_encoder",
    dim: int = WIDTH,
    size: int = 16,
    patch: int = 4,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Write a CLIP vision encoder of (size / patch)^2 + 1 tokens."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    pictures = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size)
    pictures.save_pretrained(folder / processor)
    return pictures, _save(CLIPVisionModel(CLIPVisionConfig(**_vision_sizes(dim, size, patch))), folder / encoder, seed)


def siglip(
    folder: Path,
    *,
    processor: str = "feature_extractor",
    encoder: str = "image_encoder",
    dim: int = WIDTH,
    size: int = 16,
    patch: int = 4,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Write a SigLIP vision encoder of (size / patch)^2 tokens."""
    from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

    pictures = SiglipImageProcessorPil(size={"height": size, "width": size})
    pictures.save_pretrained(folder / processor)
    return pictures, _save(
        SiglipVisionModel(SiglipVisionConfig(**_vision_sizes(dim, size, patch))), folder / encoder, seed
    )


def wan(folder: Path) -> None:
    """Write a whole text-to-video pipeline: 16 latent channels, strides of 4 and 8."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    tokenizer, encoder = umt5(folder.with_name(f"{folder.name}-parts"))
    torch.manual_seed(0)
    network = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=WIDTH, freq_dim=16, ffn_dim=20, num_layers=2
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1)
    WanPipeline(
        tokenizer=tokenizer, text_encoder=encoder, transformer=network, vae=vae, scheduler=scheduler
    ).save_pretrained(folder)


def _save(model: Any, folder: Path, seed: int) -> Any:
    """Write and return a model with every parameter random: gains about one, biases about zero, products of unit scale."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=draw)
            if value.ndim > 1:
                table = "embed" in name or "shared" in name or "relative" in name
                value.copy_(noise if table else noise / value[0].numel() ** 0.5)
            else:
                value.copy_(0.2 * noise + float(name.endswith("weight")))
    model.eval().save_pretrained(folder)
    return model


def _t5_sizes(size: int, dim: int) -> dict[str, Any]:
    return {
        "vocab_size": size,
        "d_model": dim,
        "d_kv": dim // 4,
        "d_ff": 2 * dim,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    }


def _t5_config(size: int, dim: int) -> Any:
    from transformers import T5Config

    return T5Config(**_t5_sizes(size, dim))


def _vision_sizes(dim: int, size: int, patch: int) -> dict[str, Any]:
    return {
        "hidden_size": dim,
        "intermediate_size": 2 * dim,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": size,
        "patch_size": patch,
    }


def _llama_config(words: Any, dim: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(words),
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
    )


def _unigram(folder: Path, length: int) -> Any:
    """Write and return a T5 tokenizer."""
    from transformers import T5Tokenizer

    letters = [chr(code) for code in range(0x21, 0x7F)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    vocabulary += [(letter, -8.0) for letter in letters] + [("▁" + word, -4.0) for word in WORDS]
    words = T5Tokenizer(vocabulary, extra_ids=0, model_max_length=length)
    words.save_pretrained(folder)
    return words


def _llama_tokenizer(folder: Path) -> Any:
    """Write and return a byte-level tokenizer with the special tokens of LLaMA 3."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    merges = _spaced_merges()
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>", "<pad>"]
    vocabulary = _numbered(dict.fromkeys([*_byte_letters(), *map("".join, merges), *special]))
    words = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    pieces = pre_tokenizers.Split(Regex(r" ?\w+|\s*\n+| ?[^\s\w]+|\s+"), "isolated")
    words.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(False, use_regex=False)])
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([AddedToken(each, special=True) for each in special])
    start = special[0]
    words.post_processor = processors.TemplateProcessing(f"{start} $A", special_tokens=[(start, vocabulary[start])])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=start, eos_token="<|eot_id|>", pad_token="<pad>", padding_side="right"
    )
    fast.save_pretrained(folder)
    return fast


def _numbered(vocabulary: Iterable[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(vocabulary)}


def _byte_letters() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _merges(spellings: Iterable[list[str]]) -> list[tuple[str, str]]:
    """Say how byte pairs make each word, letter by letter from its start."""
    pairs = [("".join(letters[:i]), letters[i]) for letters in spellings for i in range(1, len(letters))]
    return list(dict.fromkeys(pairs))


def _spaced_merges() -> list[tuple[str, str]]:
    """Make every word with a space before it, then every word without, then the blank line."""
    spaced = [["Ġ", *word] for word in WORDS]
    return _merges([*spaced, *map(list, WORDS), ["Ċ", "Ċ"]])
