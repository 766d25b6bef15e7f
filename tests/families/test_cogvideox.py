import ast
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models import embeddings
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from parity import EXAMPLES, Case, Inputs, check

from reelflow.families.cogvideox import COGVIDEOX
from reelflow.models.condition import Condition


def case(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    positions = draw(st.sampled_from(["sinusoids", "rotary", "rotary", "table"]))
    patch_t = draw(st.sampled_from([None, 2])) if positions == "rotary" else None
    heads, head_dim, channels, extra = (draw(st.sampled_from(x)) for x in ([1, 2], [16, 32], [1, 3], [0, 2]))
    frames, rows, columns = (draw(st.integers(1, high)) for high in (4, 4, 5))
    tokens, seed = draw(st.integers(1, 6)), draw(st.integers(0, 2**16))
    base = (rows, columns) if positions == "table" else (draw(st.integers(5, 8)), draw(st.integers(5, 8)))
    arguments = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": channels + extra,
        "out_channels": channels,
        "time_embed_dim": 24,
        "ofs_embed_dim": draw(st.sampled_from([None, 24])),
        "text_embed_dim": 10,
        "num_layers": 2,
        "sample_height": 2 * base[0],
        "sample_width": 2 * base[1],
        "sample_frames": 4 * (frames - 1) + 1,
        "patch_size_t": patch_t,
        "max_text_seq_length": tokens,
        "use_rotary_positional_embeddings": positions != "sinusoids",
        "use_learned_positional_embeddings": positions == "table",
        "patch_bias": patch_t is None or draw(st.booleans()),
    }
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    grid = (frames * (patch_t or 1), 2 * rows, 2 * columns)
    inputs: Inputs = {
        "latents": normal(2, channels, *grid),
        "channels": normal(2, extra, *grid),
        "context": normal(2, tokens, 10),
        "t": torch.rand(2, generator=generator, dtype=torch.float64),
        "offset": normal(2, 1),
    }
    learned = ("latents", "context", "channels")
    return Case(COGVIDEOX, CogVideoXTransformer3DModel, arguments, inputs, _theirs, _ours, learned, sign=1, seed=seed)


def _from_pipeline(name: str) -> Any:
    """Return a function of the reference's pipeline, whose module needs more than this function does."""
    tree = ast.parse((Path(diffusers.__file__).parent / "pipelines/cogvideo/pipeline_cogvideox.py").read_text())
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    names: dict[str, Any] = {}
    exec(compile(ast.Module(found, []), name, "exec"), names)
    return names[name]


def _rotary(config: Any, grid: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotary table as the reference's pipeline makes it."""
    head_dim, base = config.attention_head_dim, (config.sample_height // 2, config.sample_width // 2)
    crops = _from_pipeline("get_resize_crop_region_for_grid")(grid[1:], base[1], base[0])
    # The type of the rotary frequencies is a default argument, which was bound before `promoted` could change it.
    rotary = partial(embeddings.get_1d_rotary_pos_embed, freqs_dtype=torch.float32)
    with mock.patch.object(embeddings, "get_1d_rotary_pos_embed", rotary):
        table = partial(embeddings.get_3d_rotary_pos_embed, head_dim, grid_size=grid[1:], temporal_size=grid[0])
        if config.patch_size_t:
            return table(None, grid_type="slice", max_size=base)
        return table(crops)


def _theirs(model, inputs: Inputs) -> torch.Tensor:
    clip, config = torch.cat([inputs["latents"], inputs["channels"]], dim=1), model.config
    grid = (clip.shape[2] // (config.patch_size_t or 1), clip.shape[3] // 2, clip.shape[4] // 2)
    out = model(
        clip.transpose(1, 2),
        inputs["context"],
        1000 * (1 - inputs["t"]),
        ofs=inputs["offset"][:, 0] if config.ofs_embed_dim else None,
        image_rotary_emb=_rotary(config, grid) if config.use_rotary_positional_embeddings else None,
        return_dict=False,
    )[0]
    return out.transpose(1, 2)


def _ours(model, inputs: Inputs) -> torch.Tensor:
    condition = Condition(
        context=inputs["context"],
        channels=inputs["channels"] if inputs["channels"].shape[1] else None,
        numbers=inputs["offset"] if model.config.numbers else None,
    )
    return model(inputs["latents"], inputs["t"], condition)


@settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_outputs_and_gradients_are_those_of_the_reference(data):
    check(case(data.draw))
