"""Adapters of the reference (PEFT in diffusers' networks) read, used and written: the same numbers on both sides."""

import json
import shutil
import warnings
from functools import partial
from pathlib import Path

import pytest
import test_cogvideox
import test_hunyuan
import test_ltx
import test_mochi
import test_sd3
import test_wan
import tiny
import torch
from diffusers import WanTransformer3DModel
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from parity import BOUND64, Case, as_ours, error, promoted, randomise
from safetensors.torch import save_file
from torch import Tensor, nn

import reelflow
from reelflow.cli.main import run
from reelflow.data.video import read_clip
from reelflow.errors import CheckpointError, ConfigError
from reelflow.families.adapters import AdapterUse, apply_files, load_adapter, save_adapter
from reelflow.families.published import export_transformer, load_transformer, save_transformer
from reelflow.families.system import Expert
from reelflow.families.wan import WAN, transformer
from reelflow.generation.pipeline import to_frames
from reelflow.generation.published import PublishedSampling
from reelflow.interop.adapters import adapter_as_theirs, read_adapter
from reelflow.models.adapters import Adapter, LoRA, apply, merge, new_adapter
from reelflow.models.blocks import Dual, Single
from reelflow.models.condition import Condition
from reelflow.models.context import Layers
from reelflow.models.dit import DiTConfig, VideoDiT

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

CASES = {
    "wan": test_wan.case,
    "hunyuan": partial(test_hunyuan.case, picture=None),
    "mochi": test_mochi.case,
    "cogvideox": test_cogvideox.case,
    "ltx": test_ltx.case,
    "sd3": test_sd3.case,
}


def reference_of(case: Case) -> nn.Module:
    reference = case.reference(**case.arguments).eval().double()
    randomise(reference, case.seed)
    return reference


def with_adapter(reference: nn.Module) -> nn.Module:
    """Put an adapter (DoRA, which has all that LoRA has) on every linear map, as if it had learned something."""
    targets = [name for name, module in reference.named_modules() if isinstance(module, nn.Linear)]
    reference.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, use_dora=True))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in reference.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter + 0.2 * noise if "magnitude" in name else 0.3 * noise
    return reference


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("family", CASES)
@settings(
    max_examples=2, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_an_adapter_of_the_reference_gives_its_numbers_and_the_reverse(family, tmp_path_factory, data):
    folder, case = tmp_path_factory.mktemp("lora"), CASES[family](data.draw)
    with promoted(), torch.no_grad():
        reference = reference_of(case)
        model = as_ours(case.family, case.arguments, reference.state_dict(), torch.float64)
        theirs = case.sign * case.theirs(with_adapter(reference), case.inputs)
        reference.save_lora_adapter(folder)
        adapter = load_adapter(folder, model)
        plain = case.ours(model, case.inputs)
        with apply(model, [(adapter, 1.0)]):
            assert error(case.ours(model, case.inputs), theirs) < BOUND64
        assert error(plain, theirs) > 1e-3
        save_adapter(adapter, model, folder / "back", case.family, layout="diffusers")
        again = reference_of(case)
        again.load_lora_adapter(folder / "back", weight_name="pytorch_lora_weights.safetensors")
        assert error(case.sign * case.theirs(again, case.inputs), theirs) < BOUND64


def small(seed: int = 0) -> VideoDiT:
    """Return a network of a published design, random everywhere."""
    model = VideoDiT(transformer(heads=2, depth=2, mlp=20, head_dim=12, text=10, waves=8)).requires_grad_(False)
    randomise(model, seed)
    return model


def grown(model: VideoDiT, seed: int = 0, **config) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    adapter = new_adapter(model, LoRA(**{"rank": 2, "alpha": 3.0} | config), generator)
    return adapter.map(lambda x: x + 0.2 * torch.rand(x.shape, generator=generator))


def merged(model: VideoDiT, adapters: list[tuple[Adapter, float]]) -> dict[str, Tensor]:
    with merge(model, adapters):
        return {name: x.clone() for name, x in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


DIALECTS = {
    "a pipeline's": ("transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight", "diffusers", "."),
    "PEFT's, as trained": (
        "base_model.model.{}.lora_A.default.weight",
        "base_model.model.{}.lora_B.default.weight",
        "diffusers",
        ".",
    ),
    "of the original names": (
        "diffusion_model.{}.lora_A.weight",
        "diffusion_model.{}.lora_B.weight",
        "original",
        ".",
    ),
    "without dots": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "original", "_"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_trainers_files_are_read(dialect, tmp_path):
    model, (down, up, layout, dot) = small(), DIALECTS[dialect]
    adapter = grown(model, targets=("all",))
    tensors = {}
    for name, each in adapter_as_theirs(adapter, export_transformer(model.config, layout).rows, model).items():
        module = name.replace(".", dot)
        tensors |= {down.format(module): each.down, up.format(module): each.up}
        tensors[down.format(module).partition(module)[0] + f"{module}.alpha"] = torch.tensor(3.0)
    save_file(tensors, tmp_path / "style.safetensors")
    found = load_adapter(tmp_path / "style.safetensors", model)
    assert same(merged(model, [(found, 1.0)]), merged(model, [(adapter, 1.0)]))


def test_settings_of_pefts_say_the_scale_of_every_module(tmp_path):
    torch.manual_seed(0)
    reference = WanTransformer3DModel(**WAN.write(small().config) | {"rope_max_seq_len": 32}).eval()
    randomise(reference, 1)
    said = {"r": 4, "lora_alpha": 3, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"blocks.1.attn1.to_q": 7}}
    config = peft.LoraConfig(target_modules=["to_q", "to_k", "net.2"], use_rslora=True, init_lora_weights=False, **said)
    wrapped = peft.get_peft_model(reference, config)
    wrapped.save_pretrained(tmp_path / "peft")
    with torch.device("meta"):
        model = VideoDiT(small().config)
    adapter = load_adapter(tmp_path / "peft", model)
    rows = WAN.weights(model.config)
    expected = {name: x for row in rows for name, x in row.to_ours(wrapped.merge_and_unload().state_dict()).items()}
    fresh = WanTransformer3DModel(**WAN.write(model.config) | {"rope_max_seq_len": 32})
    randomise(fresh, 1)
    ours = as_ours(WAN, WAN.write(model.config), fresh.state_dict(), torch.float32).requires_grad_(False)
    assert same(merged(ours, [(adapter, 1.0)]), expected)
    assert not same(ours.state_dict(), expected)
    save_adapter(adapter, model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").merge_and_unload().state_dict()
    assert same({name: x for row in rows for name, x in row.to_ours(back).items()}, expected)


def test_an_adapter_of_a_network_of_no_family_survives_its_file(tmp_path):
    layers = (Dual(mlp_ratio=1.0), Single(mlp_ratio=1.0))
    model = VideoDiT(DiTConfig(2, dim=16, num_heads=2, layers=layers, rope=(4, 2, 2), context=Layers(5)))
    adapter = grown(model.requires_grad_(False), targets=("all",), magnitudes=True)
    save_adapter(adapter, model, tmp_path / "a", times=(0.0, 0.5))
    assert same(merged(model, [(load_adapter(tmp_path / "a", model), 0.7)]), merged(model, [(adapter, 0.7)]))
    assert read_adapter(tmp_path / "a").times == (0.0, 0.5)
    with pytest.raises(CheckpointError, match="not an empty folder"):
        save_adapter(adapter, model, tmp_path / "a")


def kept(tensors: dict[str, Tensor], tmp_path: Path, **settings) -> Path:
    """Write an adapter in PEFT's folder."""
    (tmp_path / "bad").mkdir()
    save_file(tensors, tmp_path / "bad" / "adapter_model.safetensors")
    (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2} | settings))
    return tmp_path / "bad"


A, B = torch.ones(2, 24), torch.ones(24, 2)


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({"blocks.0.attn1.to_qq.lora_A.weight": A, "blocks.0.attn1.to_qq.lora_B.weight": B}, {}, "did you mean"),
        ({"blocks.0.attn1.to_q.lora_A.weight": A}, {}, "without one of its two factors"),
        ({"blocks.0.attn1.to_q.diff_b": A}, {}, r"1 not understood \(blocks.0.attn1.to_q.diff_b\)"),
        (
            {"blocks.0.attn1.to_q.lora_A.weight": A[:, :5].clone(), "blocks.0.attn1.to_q.lora_B.weight": B},
            {},
            r"is \[24, 24\], but its factors make \[24, 5\]",
        ),
        ({"blocks.0.attn1.to_q.lora_A.weight": A, "blocks.0.attn1.to_q.lora_B.weight": B}, {"r": 3}, "say 3"),
        (
            {"blocks.0.attn1.to_q.lora_A.weight": A, "blocks.0.attn1.to_q.lora_B.weight": B},
            {"modules_to_save": ["norm"]},
            "of a kind that is not read",
        ),
        (
            {"blocks.0.attn1.to_q.lora_A.weight": A, "blocks.0.attn1.to_q.lora_B.weight": B},
            {"peft_type": "LOHA"},
            "LOHA",
        ),
        ({}, {}, "holds no adapter"),
    ],
)
def test_what_cannot_be_read_whole_is_refused(tensors, settings, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load_adapter(kept(tensors, tmp_path, **settings), small())


def test_of_two_networks_a_file_names_the_one_it_is_for(tmp_path):
    experts = (Expert(small(1), until=0.1), Expert(small(2)))
    plain = [{name: x.clone() for name, x in expert.network.state_dict().items()} for expert in experts]
    adapter = grown(small())
    for name, network, times in (
        ("unsaid", "transformer", None),
        ("first", "transformer", (0.0, 0.1)),
        ("second", "transformer_2", None),
    ):
        save_adapter(adapter, small(), tmp_path / name, layout="diffusers", network=network, times=times)

    def changed(*uses: AdapterUse) -> list[bool]:
        probe = torch.randn(1, 16, 1, 2, 2), torch.tensor([0.5]), Condition(context=torch.randn(1, 3, 10))
        before = [expert.network(*probe) for expert in experts]
        with apply_files(experts, uses):
            return [not torch.equal(expert.network(*probe), x) for expert, x in zip(experts, before, strict=True)]

    def use(name: str, network: str | None = None) -> AdapterUse:
        return AdapterUse(str(tmp_path / name), network=network)

    assert changed(use("first")) == [True, False]
    assert changed(use("second")) == [False, True]
    assert changed(use("unsaid", "transformer_2")) == [False, True]
    assert changed(use("first"), use("second")) == [True, True]
    with pytest.raises(ConfigError, match="does not say which it is for: say transformer="):
        changed(use("unsaid"))
    with pytest.raises(CheckpointError, match=r"trained for t from 0 to 0\.1; transformer_2 works from 0\.1 to 1"):
        changed(use("first", "transformer_2"))
    with pytest.raises(CheckpointError, match="is for transformer_2, not for transformer"):
        changed(use("second", "transformer"))
    with pytest.raises(CheckpointError, match="the system has no transformer_2"):
        apply_files(experts[:1], [use("second")])
    with pytest.raises(ConfigError, match="the system has transformer only"):
        apply_files(experts[:1], [use("unsaid", "transformer_2")])
    with pytest.raises(ConfigError, match="did you mean transformer"):
        use("unsaid", "transformr")
    assert all(same(expert.network.state_dict(), x) for expert, x in zip(experts, plain, strict=True))


@pytest.fixture(scope="module")
def system(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Return a folder of a whole system, one of an adapter for it, and the system with the adapter in its weights."""
    folder = tmp_path_factory.mktemp("system")
    tiny.wan(folder / "plain")
    shutil.copytree(folder / "plain", folder / "merged")
    model = load_transformer(folder / "plain" / "transformer").requires_grad_(False)
    adapter = grown(model)
    save_adapter(adapter, model, folder / "style", layout="diffusers")
    shutil.rmtree(folder / "merged" / "transformer")
    merge(model, [(adapter, 0.5)])
    save_transformer(model, folder / "merged" / "transformer", WAN)
    return folder / "plain", folder / "style" / "pytorch_lora_weights.safetensors", folder / "merged"


SMALL = PublishedSampling(num_steps=2, height=32, width=48)


def test_a_system_is_loaded_with_adapters(system):
    plain, style, whole = system
    clip, expected, without = (
        loaded.generate(["a red kite"], num_frames=5, sampling=SMALL)
        for loaded in (
            reelflow.load(plain, adapters=[(str(style), 0.25), AdapterUse(str(style), 0.25)]),
            reelflow.load(whole),
            reelflow.load(plain),
        )
    )
    assert error(clip, expected) < 1e-4
    assert error(clip, without) > 1e-2


def test_the_command_line_uses_and_remembers_adapters(system, tmp_path, monkeypatch, capsys):
    plain, style, whole = system
    monkeypatch.chdir(tmp_path)
    size = ("--frames", "5", "--height", "32", "--width", "48", "--steps", "2")
    call = ["generate", "a red kite", "--model", str(plain), *size]
    assert run([*call, "-o", "a.mkv", "--adapter", f"{style}:0.5"]) == 0
    clip = reelflow.load(plain, adapters=[(str(style), 0.5)]).generate(["a red kite"], num_frames=5, sampling=SMALL)
    assert torch.equal(read_clip("a.mkv").frames, to_frames(clip[0]))
    told = json.loads(Path("a.json").read_text())
    assert told["adapters"] == [{"file": str(style), "strength": 0.5, "network": None}]
    capsys.readouterr()
    assert run(["generate", "--from", "a.json", "-o", "b.mkv"]) == 0
    assert "bit for bit" in capsys.readouterr().out
    Path("a.json").write_text(json.dumps(told | {"adapters_sha256": ["0" * 64]}))
    for options, message in (
        (["generate", "--from", "a.json", "-o", "c.mkv"], "made with the adapter"),
        ([*call, "-o", "c.mkv", "--adapter", f"{style}:loud"], "is a number"),
        ([*call, "-o", "c.mkv", "--adapter", f"transformer_2={style}"], "the system has transformer only"),
        ([*call, "-o", "c.mkv", "--adapter", "nowhere"], "does not exist"),
    ):
        assert run(options) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert run(["convert", str(plain / "transformer"), "out", "--to", "diffusers", "--merge", f"{style}:0.5"]) == 0
    assert same(*(load_transformer(path).state_dict() for path in ("out", whole / "transformer")))
