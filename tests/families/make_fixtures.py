"""Record what transformers compute that diffusers has no class for: their own repositories are run, on tiny networks.

    python tests/families/make_fixtures.py opensora CHECKOUT       hpcaitech/Open-Sora at v1.2.0
    python tests/families/make_fixtures.py opensora2 CHECKOUT      hpcaitech/Open-Sora, main
    python tests/families/make_fixtures.py opensora_plan CHECKOUT  PKU-YuanGroup/Open-Sora-Plan at v1.3.1
    python tests/families/make_fixtures.py latte_class CHECKOUT    Vchitect/Latte

Each writes tests/families/fixtures/NAME.safetensors: for a few tiny networks the weights and inputs, drawn at random and
rounded to float16, so that any machine reads the same numbers; and the output and the gradients of a random projection
of it, computed in float64 throughout (`parity.promoted`). The metadata hold the arguments, and the names and shapes of
the published networks. The second argument is a folder with the repository's files. Of its imports, what takes no part
in the mathematics is replaced by nothing, and small parts of other packages by our own, below; for opensora,
rotary_embedding_torch 0.5.3 must lie in a folder on PYTHONPATH.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from einops import rearrange
from parity import Result, compare, promoted, randomise
from safetensors.torch import save_file
from torch import Tensor, nn

FIXTURES = Path(__file__).parent / "fixtures"


@dataclass(frozen=True)
class Recorded:
    """A network of a repository: how to build and call it, tiny and as published."""

    build: Callable[[Mapping[str, Any]], nn.Module]
    call: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
    cases: tuple[tuple[dict[str, Any], dict[str, Tensor]], ...]  # arguments and inputs
    learned: tuple[str, ...]  # inputs whose gradient is recorded
    published: Mapping[str, dict[str, Any]]


def record(name: str, network: Recorded) -> None:
    """Write the fixture of a network."""
    tensors: dict[str, Tensor] = {}
    floors = []
    for index, (arguments, inputs) in enumerate(network.cases):
        found, floor = _run(network, arguments, inputs, seed=index)
        tensors |= {f"{index}.{key}": value.contiguous() for key, value in found.items()}
        floors.append(floor)
    notes = {
        "command": f"python tests/families/make_fixtures.py {name} CHECKOUT",
        "cases": [arguments for arguments, _ in network.cases],
        "floors": floors,
        "published": {size: _published(network, arguments) for size, arguments in network.published.items()},
    }
    FIXTURES.mkdir(exist_ok=True)
    path = FIXTURES / f"{name}.safetensors"
    save_file(tensors, path, {key: json.dumps(value) for key, value in notes.items()})
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB, errors in float32 {floors}")
    for size, facts in notes["published"].items():
        print(
            f"  {size}: {facts['parameters']:,} parameters, {sum(count for _, count in facts['shapes'].values())} tensors"
        )


def _run(
    network: Recorded, arguments: Mapping[str, Any], inputs: Mapping[str, Tensor], seed: int
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """Return what is recorded, and what the network loses in float32, of the output and of the gradients."""
    torch.manual_seed(seed)  # for buffers
    module = network.build(arguments)
    fixed = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    randomise(module, seed)
    state = {name: x.half() for name, x in module.state_dict().items()} | fixed
    narrow, _ = _walk(network, arguments, state, inputs)
    with promoted():
        wide, projection = _walk(network, arguments, {k: x for k, x in state.items() if k not in fixed}, inputs)
    tensors = {f"weight {name}": value for name, value in state.items()}
    tensors |= {f"input {name}": value for name, value in inputs.items()}
    tensors |= {f"gradient {name}": value for name, value in wide[1].items()}
    return tensors | {"output": wide[0], "projection": projection}, compare(narrow, wide)


def _walk(
    network: Recorded, arguments: Mapping[str, Any], state: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> tuple[Result, Tensor]:
    """Return the output, the gradients of a projection of it, and the projection, in the type that is the default."""
    dtype = torch.get_default_dtype()
    module = network.build(arguments).eval().to(dtype)
    tensors = module.state_dict()
    for name, value in state.items():  # what is not in it, the network has by itself
        tensors[name].copy_(value)
    given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    for name in network.learned:
        given[name].requires_grad_()
    out = network.call(module, given)
    projection = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).half()
    (out * projection.to(dtype)).sum().backward()
    gradients = {f"input {name}": given[name].grad for name in network.learned}
    gradients |= {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    return (out.detach(), gradients), projection


def _published(network: Recorded, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Count a published network, and list its tensors; of blocks that are alike, one with "*" for the index."""
    with torch.device("meta"), mock.patch.object(Tensor, "item", return_value=0.0):  # of rates that are all 0
        module = network.build(arguments)
    shapes: dict[str, tuple[list[int], int]] = {}
    for name, value in module.state_dict().items():
        pattern = re.sub(r"blocks\.\d+\.", "blocks.*.", name)
        shape, count = shapes.get(pattern, (list(value.shape), 0))
        assert shape == list(value.shape), name
        shapes[pattern] = (shape, count + 1)
    return {
        "arguments": arguments,
        "parameters": sum(p.numel() for p in module.parameters()),
        "shapes": shapes,
    }


def draw(seed: int, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Draw normal inputs that float16 holds."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}


# What the repositories import.


def _nothing(*names: str) -> None:
    """Let modules be imported that are not here, and do nothing."""
    for name in names:
        sys.modules[name] = mock.MagicMock()


def _folder(name: str, path: Path) -> None:
    """Let the modules in a package's folder be imported without its __init__."""
    module = ModuleType(name)
    module.__path__ = [str(path)]
    sys.modules[name] = module


class TimmMlp(nn.Module):
    """As timm's, without dropout."""

    def __init__(self, in_features, hidden_features=None, out_features=None, act_layer=nn.GELU, drop=0.0):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class TransformersModel(nn.Module):
    """As transformers', as far as a network's forward goes."""

    def __init__(self, config):
        super().__init__()
        self.config = config


class TransformersConfig:
    """As transformers', which keeps nothing here."""


def xformers_attention(q, k, v, p, attn_bias):
    """Attend within segments, given as (query lengths, key lengths)."""
    ends = [torch.tensor([0, *lengths]).cumsum(0).tolist() for lengths in attn_bias]
    parts = [
        nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q[:, a:b], k[:, c:d], v[:, c:d])))
        for a, b, c, d in zip(ends[0], ends[0][1:], ends[1], ends[1][1:], strict=False)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


class TimmPatchEmbed(nn.Module):
    """As timm's, without a norm."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim, bias):
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class LigerRMSNormFunction:
    """As liger_kernel's."""

    @staticmethod
    def apply(x, weight, eps, offset, casting, in_place):
        return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


class LigerRopeFunction:
    """As liger_kernel's: channel i turns with channel i + d / 2."""

    @staticmethod
    def apply(q, k, cos, sin):
        def turn(x):
            first, second = x.chunk(2, dim=-1)
            return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]

        return turn(q), turn(k)


def flash_attention(q, k, v):
    """As flash_attn's, of B N heads d."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _replace_timm() -> None:
    transformer = SimpleNamespace(Mlp=TimmMlp, PatchEmbed=TimmPatchEmbed)
    _nothing("timm", "timm.models", "timm.models.layers")
    sys.modules["timm.models.vision_transformer"] = transformer  # type: ignore[assignment]


# The networks.


def opensora(checkout: Path) -> Recorded:
    """STDiT3, of Open-Sora 1.2."""
    root = checkout / "opensora"
    _replace_timm()
    _nothing("opensora.registry", "opensora.utils.ckpt_utils", "opensora.acceleration.communications")
    _nothing("xformers")
    mask = SimpleNamespace(from_seqlens=lambda queries, keys: (queries, keys))
    operations = SimpleNamespace(
        memory_efficient_attention=xformers_attention, fmha=SimpleNamespace(BlockDiagonalMask=mask)
    )
    sys.modules["xformers"].ops = operations
    sys.modules["xformers.ops"] = operations  # type: ignore[assignment]
    sys.modules["transformers"] = SimpleNamespace(  # type: ignore[assignment]
        PretrainedConfig=TransformersConfig, PreTrainedModel=TransformersModel
    )
    for name in ("", ".acceleration", ".models", ".models.layers", ".models.stdit", ".utils"):
        _folder(f"opensora{name}", root.joinpath(*name.split(".")[1:]))
    from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config

    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        _, _, _, height, width = inputs["latents"].shape
        out = module(
            inputs["latents"],
            1000 * (1 - inputs["t"]),
            inputs["context"][:, None],
            mask=inputs["mask"],
            x_mask=inputs["frames"],
            fps=inputs["fps"],
            height=torch.tensor([8 * height]),
            width=torch.tensor([8 * width]),
        )
        # Frames that are given are normalised twice before the readout, whose outputs there nobody reads.
        return out * inputs["frames"][:, None, :, None, None]

    def case(seed: int, shape: tuple[int, ...], lengths: tuple[int, ...], **arguments: Any) -> tuple:
        channels, text = arguments["in_channels"], arguments["caption_channels"]
        batch, length = len(lengths), arguments["model_max_length"]
        inputs = draw(seed, latents=(batch, channels, *shape), context=(batch, length, text))
        inputs["t"] = torch.tensor([0.3125, 0.75][:batch], dtype=torch.float64)
        inputs["fps"] = torch.tensor([24.0, 8.0][:batch], dtype=torch.float64)
        inputs["mask"] = torch.arange(length)[None] < torch.tensor(lengths)[:, None]
        inputs["frames"] = torch.tensor([[(b + t + seed + 1) % 3 > 0 for t in range(shape[0])] for b in range(batch)])
        return arguments, inputs

    common = {"caption_channels": 6, "model_max_length": 5}
    return Recorded(
        build=lambda arguments: STDiT3(STDiT3Config(**arguments)),
        call=call,
        cases=(
            case(1, (3, 4, 10), (5, 2), **common, in_channels=2, hidden_size=8, depth=2, num_heads=2, mlp_ratio=2.0),
            case(
                2,
                (2, 6, 4),
                (1, 3),
                **common,
                in_channels=3,
                hidden_size=8,
                depth=1,
                mlp_ratio=3.0,
                num_heads=1,
                input_sq_size=256,
            ),
            case(
                3,
                (1, 2, 6),
                (4,),
                **common,
                in_channels=1,
                hidden_size=8,
                depth=1,
                num_heads=2,
                mlp_ratio=1.5,
                patch_size=[1, 1, 2],
                qk_norm=False,
                pred_sigma=False,
            ),
        ),
        learned=("latents", "context"),
        published={
            "v1_2": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
            "v1_2_3b": {"hidden_size": 1872, "depth": 28, "num_heads": 26},
        },
    )


def opensora2(checkout: Path) -> Recorded:
    """MMDiTModel, of Open-Sora 2.0."""
    _nothing("opensora.registry", "opensora.utils.ckpt", "opensora.acceleration.checkpoint", "flash_attn_interface")
    sys.modules["flash_attn_interface"] = None  # type: ignore[assignment]
    sys.modules["flash_attn"] = SimpleNamespace(flash_attn_func=flash_attention)  # type: ignore[assignment]
    sys.modules["opensora.acceleration.checkpoint"].auto_grad_checkpoint = lambda block, *inputs: block(*inputs)
    _nothing("liger_kernel", "liger_kernel.ops")
    sys.modules["liger_kernel.ops.rms_norm"] = SimpleNamespace(LigerRMSNormFunction=LigerRMSNormFunction)  # type: ignore[assignment]
    sys.modules["liger_kernel.ops.rope"] = SimpleNamespace(LigerRopeFunction=LigerRopeFunction)  # type: ignore[assignment]
    for name in ("", ".acceleration", ".models", ".models.mmdit", ".utils"):
        _folder(f"opensora{name}", (checkout / "opensora").joinpath(*name.split(".")[1:]))
    with mock.patch.object(torch, "compile", return_value=lambda function: function):
        from opensora.models.mmdit.model import MMDiTConfig, MMDiTModel

    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        side = module.config.patch_size
        batch, _, frames, height, width = inputs["latents"].shape
        grid = (frames, height // side, width // side)
        cut = "b c t (h y) (w x) -> b (t h w) (c y x)"
        places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.get_default_dtype()) for n in grid))
        out = module(
            rearrange(inputs["latents"], cut, y=side, x=side),
            places[None].expand(batch, -1, -1),
            inputs["context"],
            torch.zeros(batch, inputs["context"].shape[1], 3, dtype=places.dtype),
            1 - inputs["t"],
            inputs["vector"],
            cond=rearrange(inputs["given"], cut, y=side, x=side) if "given" in inputs else None,
            guidance=inputs.get("guidance"),
        )
        back = "b (t h w) (c y x) -> b c t (h y) (w x)"
        return rearrange(out, back, t=grid[0], h=grid[1], w=grid[2], y=side, x=side)

    def case(seed: int, shape: tuple[int, ...], **arguments: Any) -> tuple:
        arguments = {**common, **arguments}
        channels = arguments["in_channels"] // arguments["patch_size"] ** 2
        inputs = draw(seed, latents=(2, channels, *shape), context=(2, 3, 5), vector=(2, 3))
        if arguments["cond_embed"]:
            inputs |= draw(seed + 10, given=(2, channels + 1, *shape))
        if arguments["guidance_embed"]:
            inputs["guidance"] = torch.tensor([3.5, 7.0], dtype=torch.float64)
        inputs["t"] = torch.tensor([0.3125, 0.75], dtype=torch.float64)
        return arguments, inputs

    published = {
        "from_pretrained": None,
        "cache_dir": None,
        "in_channels": 64,
        "vec_in_dim": 768,
        "context_in_dim": 4096,
        "hidden_size": 3072,
        "mlp_ratio": 4.0,
        "num_heads": 24,
        "depth": 19,
        "depth_single_blocks": 38,
        "axes_dim": [16, 56, 56],
        "theta": 10_000,
        "qkv_bias": True,
        "guidance_embed": False,
        "cond_embed": True,
        "fused_qkv": False,
        "use_liger_rope": True,
        "patch_size": 2,
    }
    tiny = {"vec_in_dim": 3, "context_in_dim": 5, "hidden_size": 12, "depth": 1, "depth_single_blocks": 1}
    common = {**published, **tiny, "mlp_ratio": 1.5, "in_channels": 8, "num_heads": 1, "axes_dim": [4, 2, 6]}
    return Recorded(
        build=lambda arguments: MMDiTModel(MMDiTConfig(**arguments)),
        call=call,
        cases=(
            case(1, (3, 4, 2)),
            case(
                2,
                (2, 1, 3),
                **{"in_channels": 2, "patch_size": 1, "num_heads": 2, "axes_dim": [2, 0, 4], "theta": 100},
                **{"cond_embed": False, "guidance_embed": True, "qkv_bias": False, "depth_single_blocks": 0},
            ),
        ),
        learned=("latents", "context", "vector"),
        published={"11b": published, "11b_deep": {**published, "in_channels": 128, "patch_size": 1}},
    )


def opensora_plan(checkout: Path) -> Recorded:
    """OpenSoraT2V_v1_3 and, where there is a mask, OpenSoraInpaint_v1_3, of Open-Sora-Plan 1.3."""
    _nothing("opensora.utils.utils", "opensora.utils.parallel_states", "opensora.utils.communications")
    sys.modules["opensora.utils.parallel_states"].get_sequence_parallel_state = lambda: False
    for name in ("", ".models", ".models.diffusion", ".models.diffusion.opensora_v1_3", ".utils"):
        _folder(f"opensora{name}", (checkout / "opensora").joinpath(*name.split(".")[1:]))
    from opensora.models.diffusion.opensora_v1_3.modeling_inpaint import OpenSoraInpaint_v1_3
    from opensora.models.diffusion.opensora_v1_3.modeling_opensora import OpenSoraT2V_v1_3

    def build(arguments: Mapping[str, Any]) -> nn.Module:
        return (OpenSoraInpaint_v1_3 if "vae_scale_factor_t" in arguments else OpenSoraT2V_v1_3)(**arguments)

    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        latents = torch.cat([inputs["latents"], inputs["given"]], dim=1) if "given" in inputs else inputs["latents"]
        with mock.patch.object(torch.backends.cuda, "sdp_kernel", return_value=nullcontext()):
            return module(
                latents,
                1000 * (1 - inputs["t"]),
                inputs["context"][:, None],
                attention_mask=torch.ones_like(latents[:, 0]),
                encoder_attention_mask=inputs["mask"][:, None],
                return_dict=False,
            )[0]

    def case(seed: int, shape: tuple[int, ...], **arguments: Any) -> tuple:
        width = arguments["num_attention_heads"] * arguments["attention_head_dim"]
        arguments = {**kind, "caption_channels": 5, **arguments, "cross_attention_dim": width}
        inputs = draw(seed, latents=(2, arguments["in_channels"], *shape), context=(2, 4, 5))
        if mask := arguments.get("vae_scale_factor_t"):
            inputs |= draw(seed + 10, given=(2, arguments["in_channels"] + mask, *shape))
        inputs["t"] = torch.tensor([0.3125, 0.75], dtype=torch.float64)
        inputs["mask"] = torch.arange(4)[None] < torch.tensor([2, 4])[:, None]
        return arguments, inputs

    kind = {
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "caption_channels": 4096,
        "patch_size": 2,
        "patch_size_t": 1,
        "sparse1d": True,
        "sparse_n": 4,
    }
    published = {**kind, "in_channels": 8, "num_layers": 32, "num_attention_heads": 24, "attention_head_dim": 96}
    published["cross_attention_dim"] = 2304
    head = {"num_attention_heads": 1, "attention_head_dim": 6}
    times = {"interpolation_scale_t": 2.0, "interpolation_scale_h": 1.5, "interpolation_scale_w": 0.5}
    return Recorded(
        build=build,
        call=call,
        cases=(
            case(1, (3, 4, 6), in_channels=2, num_layers=4, num_attention_heads=2, attention_head_dim=6),
            case(
                2,
                (2, 3, 4),
                in_channels=1,
                num_layers=1,
                num_attention_heads=1,
                attention_head_dim=12,
                **times,
                patch_size=1,
            ),
            case(3, (2, 2, 4), in_channels=3, num_layers=1, **head, vae_scale_factor_t=2, sparse1d=False, sparse_n=1),
        ),
        learned=("latents", "context"),
        published={"t2v_v1_3": published, "i2v_v1_3": {**published, "vae_scale_factor_t": 4}},
    )


def latte_class(checkout: Path) -> Recorded:
    """Latte, without text."""
    _replace_timm()
    _nothing("xformers", "xformers.ops")
    _folder("models", checkout / "models")
    from models.latte import Latte

    def build(arguments: Mapping[str, Any]) -> nn.Module:
        if torch.get_default_device().type != "meta":
            return Latte(**arguments)
        with mock.patch.object(Latte, "initialize_weights"):  # which numpy computes
            return Latte(**arguments)

    def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        label = inputs.get("label")
        return module(inputs["latents"].transpose(1, 2), 1000 * (1 - inputs["t"]), label).transpose(1, 2)

    def case(seed: int, **arguments: Any) -> tuple:
        side = arguments["input_size"]
        inputs = draw(seed, latents=(2, arguments["in_channels"], arguments["num_frames"], side, side))
        inputs["t"] = torch.tensor([0.3125, 0.75], dtype=torch.float64)
        if arguments["extras"] == 2:
            inputs["label"] = torch.tensor([1, arguments["num_classes"]])
        return arguments, inputs

    common = {"hidden_size": 8, "num_frames": 3}
    large = {"hidden_size": 1152, "depth": 28, "num_heads": 16}
    return Recorded(
        build=build,
        call=call,
        cases=(
            case(
                1, **common, input_size=4, in_channels=2, depth=4, num_heads=2, extras=2, num_classes=3, mlp_ratio=2.0
            ),
            case(2, **common, input_size=6, in_channels=1, depth=2, num_heads=1, extras=1, learn_sigma=False),
            case(3, **common, input_size=6, in_channels=3, depth=2, num_heads=4, extras=2, num_classes=1, patch_size=3),
        ),
        learned=("latents",),
        published={
            "xl_2_ucf101": {**large, "num_classes": 101, "extras": 2},
            "xl_2": {**large, "extras": 1},
        },
    )


NETWORKS: dict[str, Callable[[Path], Recorded]] = {
    "opensora": opensora,
    "opensora2": opensora2,
    "opensora_plan": opensora_plan,
    "latte_class": latte_class,
}

if __name__ == "__main__":
    record(sys.argv[1], NETWORKS[sys.argv[1]](Path(sys.argv[2]).resolve()))
