import pytest
import tiny
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel
from pipelines import check, normal
from transformers import AutoTokenizer, T5EncoderModel

# it asks for float32, where that is no choice
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
PROMPTS, NEGATIVE = ["a red kite", "two cats run slowly to the sea"], ["blue", ""]
SIZE = {"num_frames": 13, "height": 32, "width": 48}
GRID = (2, 12, 3, 4, 6)


def transformer() -> MochiTransformer3DModel:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "pooled_projection_dim": 24, "text_embed_dim": 32}
    return MochiTransformer3DModel(**sizes, num_layers=2, time_embed_dim=16).eval()


def vae() -> AutoencoderKLMochi:
    widths = {f"{side}_block_out_channels": (32, 32, 32, 32) for side in ("encoder", "decoder")}
    return AutoencoderKLMochi(**widths, layers_per_block=(1, 1, 1, 1, 1)).eval()


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict:
    """The tokenizer, the text encoder and the scheduler."""
    folder = tmp_path_factory.mktemp("parts")
    tiny.t5(folder)
    return {
        "tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer"),
        "text_encoder": T5EncoderModel.from_pretrained(folder / "text_encoder"),
        "scheduler": FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    }


def test_text_to_video(tmp_path, parts):
    pipeline = MochiPipeline(transformer=transformer(), vae=vae(), **parts)
    noise, steps = normal(0, *GRID), 5
    theirs = {"prompt": PROMPTS, "negative_prompt": NEGATIVE, "num_inference_steps": steps, "latents": noise}
    ours = {"prompts": PROMPTS, "negative_prompts": NEGATIVE, "num_steps": steps, "noise": noise}
    check(pipeline, tmp_path / "mochi", theirs | SIZE, ours | SIZE)


def test_an_empty_prompt_that_is_nothing(tmp_path, parts):
    pipeline = MochiPipeline(transformer=transformer(), vae=vae(), force_zeros_for_empty_prompt=True, **parts)
    noise, steps = normal(1, *GRID), 4
    theirs = {"prompt": PROMPTS, "num_inference_steps": steps, "latents": noise, "guidance_scale": 6.0}
    ours = {"prompts": PROMPTS, "num_steps": steps, "noise": noise, "guidance_scale": 6.0}
    check(pipeline, tmp_path / "mochi", theirs | SIZE, ours | SIZE)
