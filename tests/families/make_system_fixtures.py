"""Record what pipelines compute that diffusers does not have: their own repositories sample, with tiny networks.

    python tests/families/make_system_fixtures.py opensora2 CHECKOUT      hpcaitech/Open-Sora, main
    python tests/families/make_system_fixtures.py opensora_plan CHECKOUT  PKU-YuanGroup/Open-Sora-Plan at v1.3.1

Each writes tests/families/fixtures/NAME_system.safetensors: the weights of tiny networks, drawn at random and rounded to
float16; features that stand for what text encoders make of prompts; noise and pictures; and the latents, and frames where
ours makes any, that the repository's own sampling function makes of them, in float64. The metadata hold the arguments, and
the errors of the same in float32. What the imports ask for that takes no part is replaced by nothing, as in
`make_fixtures`.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers.hooks  # before flash_attn and peft are replaced by nothing
import diffusers.loaders.single_file_model
import diffusers.models.attention_processor  # noqa: F401
import make_fixtures
import torch
from make_fixtures import FIXTURES, draw
from make_fixtures import _folder as folder
from make_fixtures import _nothing as nothing
from parity import error, promoted, randomise
from safetensors.torch import save_file
from torch import Tensor, nn

SEED = 5


def half(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """Return random weights that float16 holds."""
    randomise(module, seed)
    return {name: x.detach().half() for name, x in module.state_dict().items()}


def write(
    name: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any], run: Callable[[], dict[str, Tensor]]
) -> None:
    """Run in float64 and in float32, and write the fixture."""
    narrow = run()
    with promoted():
        wide = run()
    floors = {key: error(narrow[key], x) for key, x in wide.items()}
    command = f"python tests/families/make_system_fixtures.py {name} CHECKOUT"
    path = FIXTURES / f"{name}_system.safetensors"
    stored = dict(tensors) | {key: x.clone().float().contiguous() for key, x in wide.items()}
    save_file(stored, path, {key: json.dumps(x) for key, x in {**notes, "floors": floors, "command": command}.items()})
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB, errors in float32 {floors}")


# Open-Sora 2.0

NETWORK = {"vec_in_dim": 4, "context_in_dim": 8, "hidden_size": 24, "depth": 1, "depth_single_blocks": 1}
NETWORK |= {"in_channels": 16, "num_heads": 2, "axes_dim": [4, 4, 4], "mlp_ratio": 2.0}
CODER = {"latent_channels": 4, "block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 4}
PROMPTS = ["a red kite over the dunes", "Two cats. They run at 12 FPS."]
RUNS: dict[str, dict[str, Any]] = {
    "text": {"prompts": PROMPTS, "negative": ["", "blue"]},
    "picture": {"prompts": PROMPTS[:1], "negative": ["blue"], "picture": 3.0},
    "weak": {"prompts": PROMPTS[1:], "negative": [""], "picture": 0.5},
}
STEPS, SIZE = 13, (9, 16, 32)


def opensora2(checkout: Path) -> None:
    """Record what `prepare_api` of Open-Sora 2.0 makes of prompts, and of a picture."""
    recorded = make_fixtures.opensora2(checkout)
    nothing("mmengine", "mmengine.config", "peft", "opensora.models.text.conditioner", "opensora.datasets.utils")
    nothing("opensora.utils.logger", "opensora.utils.prompt_refine")
    for name in (".datasets", ".models.hunyuan_vae", ".models.text", ".models.vae"):
        folder(f"opensora{name}", (checkout / "opensora").joinpath(*name.split(".")[1:]))
    sys.modules["opensora.datasets"].save_sample = None  # type: ignore[attr-defined]
    from opensora.models.hunyuan_vae import vae as coders
    from opensora.models.hunyuan_vae.autoencoder_kl_causal_3d import AutoEncoder3DConfig, AutoencoderKLCausal3D
    from opensora.utils import inference, sampling

    arguments = {**recorded.published["11b"], **NETWORK}

    def network() -> nn.Module:
        return recorded.build(arguments).eval()

    def coder() -> nn.Module:
        return AutoencoderKLCausal3D(AutoEncoder3DConfig(from_pretrained=None, **CODER)).eval()

    weights, coder_weights = half(network(), 1), half(coder(), 2)
    told = {
        name: inference.add_motion_score_to_text(inference.add_fps_info_to_text(run["prompts"], fps=24), "4")
        for name, run in RUNS.items()
    }
    known = list(dict.fromkeys(text for name, run in RUNS.items() for text in (*told[name], *run["negative"])))
    inputs = draw(3, tokens=(len(known), 5, 8), pooled=(len(known), 4))
    frames, height, width = SIZE
    levels = torch.randint(0, 256, (1, 3, height, width), generator=torch.Generator().manual_seed(4))
    inputs["image"] = (levels / 127.5 - 1).half()

    def run() -> dict[str, Tensor]:
        dtype = torch.get_default_dtype()
        model, ae = network().to(dtype), coder().to(dtype)
        model.load_state_dict(weights)
        ae.load_state_dict(coder_weights)
        decode, found = ae.decode, {}

        def features(name: str) -> Callable[..., Tensor]:
            return lambda prompts, **_: torch.stack([inputs[name][known.index(p)] for p in prompts]).to(dtype)

        def of(shape: Sequence[int], **_: Any) -> Tensor:
            generator = torch.Generator().manual_seed(SEED)
            return torch.randn(tuple(shape), generator=generator, dtype=NARROW).to(dtype)

        for name, each in RUNS.items():
            asked = sampling.SamplingOption(
                width=width,
                height=height,
                num_frames=frames,
                num_steps=STEPS,
                guidance=7.5,
                guidance_img=each.get("picture", 3.0),
                text_osci=True,
                image_osci=True,
                scale_temporal_osci=True,
                temporal_reduction=4,
                is_causal_vae=True,
            )
            ae.decode = lambda x, name=name: decode(found.setdefault(f"{name}.latents", x))
            api = sampling.prepare_api(model, ae, features("tokens"), features("pooled"), {})
            with (
                mock.patch.object(coders, "randn_tensor", of),
                mock.patch.object(inference, "read_from_path", return_value=inputs["image"][0, :, None].to(dtype)),
                mock.patch.object(sampling, "get_noise", return_value=noise[name].to(dtype)),
            ):
                found[f"{name}.frames"] = api(
                    sampling.sanitize_sampling_option(asked),
                    "i2v_head" if "picture" in each else "t2v",
                    seed=0,
                    text=told[name],
                    neg=each["negative"],
                    channel=arguments["in_channels"],
                    **({"ref": ["picture.png"]} if "picture" in each else {}),
                )[:1]
        return {key: x for key, x in found.items() if key != "weak.frames"}

    noise = {
        name: sampling.get_noise(len(each["prompts"]), height, width, 3, "cpu", torch.float32, index, channel=4).half()
        for index, (name, each) in enumerate(RUNS.items())
    }
    tensors = {f"network {name}": x for name, x in weights.items()} | {
        f"coder {k}": x for k, x in coder_weights.items()
    }
    tensors |= inputs | {f"{name}.noise": x for name, x in noise.items()}
    notes = {"arguments": arguments, "known": known, "runs": RUNS, "steps": STEPS, "size": SIZE, "seed": SEED}
    write("opensora2", tensors, notes, run)


# Open-Sora-Plan 1.3

PLAN = {"in_channels": 4, "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 6}
PLAN |= {"cross_attention_dim": 12, "caption_channels": 8}
LENGTHS = [3, 5, 1, 2]  # of two prompts, and of two to be led away from


def opensora_plan(checkout: Path) -> None:
    """Record what `OpenSoraPipeline` makes of features of prompts."""
    import transformers
    from diffusers import EulerAncestralDiscreteScheduler

    transformers.MT5Tokenizer = transformers.T5Tokenizer  # which it was
    recorded = make_fixtures.opensora_plan(checkout)
    folder("opensora.sample", checkout / "opensora" / "sample")
    from opensora.sample.pipeline_opensora import OpenSoraPipeline

    arguments = {**recorded.published["t2v_v1_3"], **PLAN}

    def network() -> nn.Module:
        return recorded.build(arguments).eval()

    weights, inputs = half(network(), 1), draw(3, tokens=(4, 5, 8), noise=(2, 4, 3, 4, 6))
    mask = torch.arange(5)[None] < torch.tensor(LENGTHS)[:, None]

    def run() -> dict[str, Tensor]:
        dtype = torch.get_default_dtype()
        model = network().to(dtype)
        model.load_state_dict(weights)
        scheduler = EulerAncestralDiscreteScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        )
        vae = mock.MagicMock(vae_scale_factor=(4, 8, 8))
        pipeline = OpenSoraPipeline.__new__(OpenSoraPipeline)
        vars(pipeline).update(
            vae=vae, transformer=model, scheduler=scheduler, text_encoder_2=None, tokenizer_2=None, tokenizer=None
        )
        vars(pipeline).update(text_encoder=None, progress_bar=mock.MagicMock(), maybe_free_model_hooks=lambda: None)
        tokens = inputs["tokens"].to(dtype)
        real = torch.randn
        with (
            mock.patch.object(torch.backends.cuda, "sdp_kernel", return_value=nullcontext()),
            mock.patch.object(torch, "randn", lambda *a, dtype=None, **k: real(*a, dtype=NARROW, **k).to(dtype)),
        ):
            made = pipeline(
                num_frames=9,
                height=32,
                width=48,
                num_inference_steps=STEPS,
                guidance_scale=7.5,
                generator=[torch.Generator().manual_seed(SEED + index) for index in range(2)],
                latents=inputs["noise"].to(dtype),
                prompt_embeds=tokens[:2],
                negative_prompt_embeds=tokens[2:],
                prompt_attention_mask=mask[:2].long(),
                negative_prompt_attention_mask=mask[2:].long(),
                prompt_embeds_2=tokens,  # which are asked for, and not read
                prompt_attention_mask_2=mask,
                negative_prompt_embeds_2=tokens,
                negative_prompt_attention_mask_2=mask,
                output_type="latent",
                return_dict=False,
                device=torch.device("cpu"),
            )
        return {"latents": made[0]}

    tensors = {f"network {name}": x for name, x in weights.items()} | inputs | {"mask": mask}
    write("opensora_plan", tensors, {"arguments": arguments, "steps": STEPS, "seed": SEED}, run)


NARROW = torch.float32  # of what is drawn, whatever the default

if __name__ == "__main__":
    {"opensora2": opensora2, "opensora_plan": opensora_plan}[sys.argv[1]](Path(sys.argv[2]).resolve())
