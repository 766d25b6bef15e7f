import json
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from reelflow.errors import CheckpointError, ConfigError
from reelflow.interop import checkpoints
from reelflow.interop.checkpoints import AsOurs, Stored, gradients_as_theirs, read_into, state_as_theirs, write_folder
from reelflow.interop.mapping import NEGATED, derived, given, ignored, linear, parameter, rearranged, table

NAME = "diffusion_pytorch_model"


class Gate(nn.Module):
    """Has a buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.empty(()), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        self.last.fill_(0.5)


class Network(nn.Module):
    """A fused map, one of half the size on either side, a table, a norm, tied maps, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up = nn.Linear(4, 12), nn.Linear(4, 8)
        self.rows = nn.Parameter(torch.zeros(6, 4))
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 4)
        self.tied = self.out
        self.gate = Gate()
        self.register_buffer("mean", torch.zeros(3))


TABLE = table(
    derived("freqs", lambda: torch.linspace(0, 1, 5)),
    linear({"qkv": "q k v", "up": "mlp"}, {"q": "q", "k": "k", "v_mlp": "v mlp"}, heights={"mlp": 2}),
    parameter("rows", "table", rearranged("1 n d -> n d")),
    linear("norm", "norm"),
    linear("out", "proj_out", NEGATED),
    given("mean", lambda: torch.ones(3)),
    ignored("leftover"),
)
SHAPES = {"q": (4, 4), "k": (4, 4), "v_mlp": (12, 4), "proj_out": (4, 4)}


def published(*, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"norm.weight": (4,), "norm.bias": (4,), "table": (1, 6, 4), "leftover": (2,)}
    for name, shape in SHAPES.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return tensors | {"freqs": torch.linspace(0, 1, 5).to(dtype)}


def without(tensors: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: x for name, x in tensors.items() if name not in names}


def empty() -> Network:
    with torch.device("meta"):
        return Network()


def shard(folder, tensors, *, names=None) -> None:
    """Write three shards and an index, which says `names` where it should not tell the truth."""
    folder.mkdir(exist_ok=True)
    files = {name: f"{NAME}-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": files | (names or {})}
    (folder / f"{NAME}.safetensors.index.json").write_text(json.dumps(index))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


@pytest.fixture
def loaded(folder):
    save_file(published(), folder / f"{NAME}.safetensors")
    model = empty()
    read_into(model, TABLE, folder)
    return model


def test_a_checkpoint_fills_an_empty_model(loaded):
    theirs = published()
    assert torch.equal(
        loaded.qkv.weight, torch.cat([theirs["q.weight"], theirs["k.weight"], theirs["v_mlp.weight"][:4]])
    )
    assert torch.equal(loaded.up.bias, theirs["v_mlp.bias"][4:])
    assert torch.equal(loaded.out.weight, -theirs["proj_out.weight"])
    assert loaded.mean.tolist() == [1, 1, 1]
    assert loaded.tied.weight is loaded.out.weight
    assert loaded.gate.last == 0.5
    assert not any(x.is_meta for x in [*loaded.parameters(), *loaded.buffers()])


def test_loaded_tensors_share_no_memory_and_can_be_trained(loaded):
    places = [p.untyped_storage().data_ptr() for p in loaded.parameters()]
    assert len(set(places)) == len(places)
    assert all(p.untyped_storage().nbytes() == p.numel() * 4 and p.is_contiguous() for p in loaded.parameters())
    loaded.out(loaded.qkv(torch.ones(1, 4))[:, :4]).sum().backward()
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    assert loaded.out.weight.grad.any()


def test_frozen_parameters_stay_frozen(folder):
    save_file(published(), folder / f"{NAME}.safetensors")
    model = empty()
    model.out.requires_grad_(False)
    read_into(model, TABLE, folder)
    assert not model.out.weight.requires_grad
    assert model.qkv.weight.requires_grad


def test_file_folder_shards_and_index_hold_the_same(folder, loaded):
    shard(folder.parent / "shards", published())
    prefixed = {f"model.net.{name}": x for name, x in published().items()}
    save_file(prefixed | {"vae.x": torch.ones(1)}, folder.parent / "all.safetensors")
    for source, prefix in (
        (folder / f"{NAME}.safetensors", ""),
        (folder.parent / "shards", ""),
        (folder.parent / "shards" / f"{NAME}.safetensors.index.json", ""),
        (folder.parent / "all.safetensors", "model.net."),
    ):
        model = empty()
        read_into(model, TABLE, source, prefix=prefix)
        assert same(model.state_dict(), loaded.state_dict())


def test_types_are_kept_islands_included(folder):
    tensors = published(dtype=torch.bfloat16)
    tensors |= {name: tensors[name].float() for name in ("table", "norm.weight")}
    tensors["norm.bias"] = tensors["norm.bias"].half()
    save_file(tensors, folder / f"{NAME}.safetensors")
    model = empty()
    read_into(model, TABLE, folder)
    assert model.rows.dtype == model.norm.weight.dtype == torch.float32
    assert model.norm.bias.dtype == torch.float16
    assert model.qkv.weight.dtype == model.out.weight.dtype == torch.bfloat16
    write_folder(model, TABLE, folder.parent / "out", config={})
    assert same(load_file(folder.parent / "out" / f"{NAME}.safetensors"), without(tensors, "leftover"))


def test_a_type_asked_for_is_cast_to_directly(folder):
    save_file(published(dtype=torch.float64), folder / f"{NAME}.safetensors")
    model = empty()
    read_into(model, TABLE, folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.norm.weight, published(dtype=torch.float64)["norm.weight"].bfloat16())


def forgetful(self) -> None:
    nn.Module.__init__(self)
    self.register_buffer("last", torch.ones(()), persistent=False)


def test_a_buffer_that_nobody_sets_is_refused_before_reading(folder, monkeypatch):
    save_file(published(), folder / f"{NAME}.safetensors")
    monkeypatch.delattr(Gate, "reset_buffers")
    monkeypatch.setattr(Gate, "__init__", forgetful)
    with pytest.raises(ConfigError, match=r"1 buffers have shapes but no values \(gate\.last\)"):
        read_into(empty(), TABLE, folder)
    real = Network()  # whose buffers have values already
    read_into(real, TABLE, folder)
    assert real.gate.last == 1


def test_what_differs_is_listed_before_anything_is_read(folder, monkeypatch):
    tensors = without(published(), "k.bias") | {"new": torch.ones(1), "table": torch.ones(1, 5, 4)}
    save_file(tensors, folder / f"{NAME}.safetensors")
    monkeypatch.setattr(Stored, "__getitem__", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(CheckpointError) as refusal:
        read_into(empty(), TABLE, folder)
    for said in ("1 missing (k.bias)", "1 unexpected (new)", "table is [1, 5, 4], expected [1, 6, 4]", str(folder)):
        assert said in str(refusal.value)


def test_a_model_stays_as_it_was_when_reading_fails(folder):
    save_file(published() | {"freqs": torch.ones(5)}, folder / f"{NAME}.safetensors")
    model = Network()
    before = model.qkv.weight
    with pytest.raises(CheckpointError, match="freqs is not what the configuration makes"):
        read_into(model, TABLE, folder)
    assert model.qkv.weight is before


def test_folders_without_one_set_of_weights_are_refused(folder):
    def refusal(source) -> str:
        with pytest.raises(CheckpointError) as error:
            Stored(source)
        return str(error.value)

    assert "does not exist" in refusal(folder / "nothing")
    assert "holds no safetensors file" in refusal(folder)
    (folder / "model.bin").write_bytes(b"\x80\x02}.")
    assert "pickled weights only (model.bin)" in refusal(folder)
    assert "make safetensors of it, if you trust it, with: python -c" in refusal(folder / "model.bin")
    save_file({"a": torch.ones(1)}, folder / f"{NAME}-00001-of-00002.safetensors")
    (folder / "model.bin").unlink()
    assert "but no *.safetensors.index.json" in refusal(folder)
    save_file({"a": torch.ones(1)}, folder / "a.safetensors")
    assert Stored(folder)["a"].item() == 1
    save_file({"a": torch.ones(1)}, folder / "b.safetensors")
    assert "holds a.safetensors and b.safetensors; name the one to read" in refusal(folder)
    save_file({"a": torch.zeros(1)}, folder / f"{NAME}.safetensors")
    assert Stored(folder)["a"].item() == 0


@pytest.mark.parametrize("keep", [0, 4, 20, 200, -1])
def test_a_damaged_file_is_refused(folder, keep):
    path = folder / f"{NAME}.safetensors"
    save_file(published(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing or is not a whole safetensors file"):
        Stored(folder)


@pytest.mark.parametrize(
    "text", ["", '{"weight_map": {"a": ', "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index_is_refused(folder, text):
    (folder / f"{NAME}.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not a whole index of shards"):
        Stored(folder)


def test_an_index_and_its_shards_must_agree(folder):
    first = f"{NAME}-00001-of-00003.safetensors"
    shard(folder, published(), names={"ghost": first})
    with pytest.raises(CheckpointError, match=r"1 in the index but not in its shard \(ghost\)"):
        Stored(folder)
    shard(folder, published(), names={"ghost": "other.safetensors"})
    with pytest.raises(CheckpointError, match=r"not beside it: 1 missing \(other\.safetensors\)"):
        Stored(folder)
    shard(folder, published(), names={"ghost": f"../{folder.name}/{first}"})
    with pytest.raises(CheckpointError, match="not beside it"):
        Stored(folder)
    shard(folder, published())
    save_file({"stray": torch.ones(1)} | load_file(folder / first), folder / first)
    with pytest.raises(CheckpointError, match=r"1 in a shard but not in the index \(stray\)"):
        Stored(folder)


def test_a_folder_is_written_as_published_ones_are(loaded, folder):
    out = folder.parent / "out"
    write_folder(loaded, TABLE, out, config={"num_layers": 2, "_class_name": "A"})
    assert sorted(path.name for path in out.iterdir()) == ["config.json", f"{NAME}.safetensors"]
    assert (out / "config.json").read_text() == '{\n  "_class_name": "A",\n  "num_layers": 2\n}\n'
    with safe_open(out / f"{NAME}.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert same(load_file(out / f"{NAME}.safetensors"), without(published(), "leftover"))


def test_large_models_are_written_in_shards(loaded, folder):
    out = folder.parent / "out"
    write_folder(loaded, TABLE, out, config={}, max_shard_size=200)
    index = json.loads((out / f"{NAME}.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files[0] == f"{NAME}-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    theirs = without(published(), "leftover")
    assert index["metadata"] == {"total_size": sum(x.nbytes for x in theirs.values())}
    shards = {file: load_file(out / file) for file in files}
    assert same({name: x for tensors in shards.values() for name, x in tensors.items()}, theirs)
    assert all(name in shards[file] for name, file in index["weight_map"].items())
    assert all(len(s) == 1 or sum(x.nbytes for x in s.values()) <= 200 for s in shards.values())
    again = empty()
    read_into(again, TABLE, out)
    assert same(again.state_dict(), loaded.state_dict())


def test_a_folder_can_be_written_in_another_type(loaded, folder):
    write_folder(loaded, TABLE, folder.parent / "out", config={}, dtype=torch.float16)
    expected = {name: x.half() for name, x in without(published(), "leftover").items()}
    assert same(load_file(folder.parent / "out" / f"{NAME}.safetensors"), expected)


def test_a_folder_is_written_from_another_without_the_network(folder, loaded):
    out, told = folder.parent / "out", []
    ours = AsOurs(Stored(folder), TABLE)
    assert same(dict(ours), {name: x for name, x in loaded.state_dict().items() if not name.startswith("tied")})
    rows = table(parameter(name, f"net.{name}") for name in ours)
    write_folder(
        ours,
        rows,
        out,
        config=None,
        dtype=torch.float16,
        max_shard_size=None,
        name="all",
        metadata={"made": "here"},
        progress=lambda *bytes_: told.append(bytes_),
    )
    assert [path.name for path in out.iterdir()] == ["all.safetensors"]
    assert same(load_file(out / "all.safetensors"), {f"net.{name}": x.half() for name, x in ours.items()})
    assert Stored(out).metadata == {"format": "pt", "made": "here"}
    assert told == sorted(told)
    assert told[-1] == (2 * sum(x.numel() for x in ours.values()),) * 2


def test_what_should_follow_from_the_configuration_is_checked_before_anything_is_written(folder):
    save_file(published() | {"freqs": torch.ones(5)}, folder / f"{NAME}.safetensors")
    with pytest.raises(CheckpointError, match="freqs is not what the configuration makes"):
        AsOurs(Stored(folder), TABLE)


def test_the_line_that_makes_safetensors_of_a_pickle_does(folder):
    tensors = {"a": torch.ones(2), "b": torch.zeros(1)}
    torch.save({"module": tensors}, folder / "model.pt")
    with pytest.raises(CheckpointError) as refusal:
        Stored(folder / "model.pt")
    line = re.search('python -c "(.*)"$', str(refusal.value)).group(1)
    exec(line, {})
    assert same(load_file(folder / "model.safetensors"), tensors)


def test_the_preferred_of_several_files_is_read(folder):
    for name in ("a", "b"):
        save_file({name: torch.ones(1)}, folder / f"{name}.safetensors")
    assert list(Stored(folder, names=("c", "b", "b"))) == ["b"]


def test_copies_are_written_each(folder):
    model = nn.Linear(3, 2)
    rows = table(parameter({"weight": "a"}, {"x": "a", "y": "a"}), parameter("bias", "b"))
    write_folder(model, rows, folder, config={})
    assert same(load_file(folder / f"{NAME}.safetensors"), state_as_theirs(model, rows))


def test_only_an_empty_place_is_written_to(loaded, folder):
    before = sorted(folder.iterdir())
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        write_folder(loaded, TABLE, folder, config={})
    assert sorted(folder.iterdir()) == before
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        write_folder(loaded, TABLE, folder / f"{NAME}.safetensors", config={})
    (folder.parent / "empty").mkdir()
    write_folder(loaded, TABLE, folder.parent / "empty", config={})


@pytest.mark.parametrize("failure", [OSError("disk full"), SafetensorError("io"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_behind(loaded, folder, monkeypatch, failure):
    written = []

    def failing(*args, **kwargs) -> None:
        save_file(*args, **kwargs)
        written.append(args)
        if len(written) == 2:
            raise failure

    monkeypatch.setattr(checkpoints, "write_tensors", failing)
    with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else CheckpointError):
        write_folder(loaded, TABLE, folder.parent / "out", config={}, max_shard_size=200)
    assert len(written) == 2
    assert [path.name for path in folder.parent.iterdir()] == ["weights"]


def test_a_model_without_values_is_not_written(folder):
    with pytest.raises(ConfigError, match="no weights to write"):
        write_folder(empty(), TABLE, folder, config={})
    assert list(folder.iterdir()) == []


def test_what_theirs_have_no_place_for_is_not_lost_silently(loaded, folder):
    loaded.mean.add_(1)
    with pytest.raises(CheckpointError, match="mean is not what the configuration makes"):
        write_folder(loaded, TABLE, folder.parent / "out", config={})


def test_an_empty_model_says_the_names_and_shapes_of_its_checkpoint():
    theirs = state_as_theirs(empty(), TABLE)
    assert {name: x.shape for name, x in theirs.items()} == {
        name: x.shape for name, x in without(published(), "leftover").items()
    }


def test_gradients_have_their_names_and_layout(loaded):
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    loaded.out(loaded.qkv(x)[:, :4] * loaded.up(x)[:, 4:]).square().sum().backward()
    ours = gradients_as_theirs(loaded, TABLE)
    theirs = {name: p.requires_grad_() for name, p in published().items()}
    q = x @ theirs["q.weight"].T + theirs["q.bias"]
    up = x @ theirs["v_mlp.weight"][8:].T + theirs["v_mlp.bias"][8:]
    (-(q * up) @ theirs["proj_out.weight"].T - theirs["proj_out.bias"]).square().sum().backward()
    assert ours.keys() == without(theirs, "leftover", "freqs").keys()
    for name, gradient in ours.items():
        expected = torch.zeros_like(gradient) if theirs[name].grad is None else theirs[name].grad
        torch.testing.assert_close(gradient, expected)


MEMORY = """
    import sys
    from pathlib import Path
    import torch
    from torch import nn
    from safetensors.torch import save_file
    from reelflow.interop.checkpoints import AsOurs, Stored, read_into, write_folder
    from reelflow.interop.mapping import NEGATED, differences, linear, rearranged, table

    WIDTH, DEPTH = 640, 64
    ROWS = table(
        table(
            linear("0", ["q", "k", "v"]),
            linear("1", "up", NEGATED),
            linear("2", "down", rearranged("(a b) ... -> (b a) ...", a=2)),
            ours=f"{i}.", theirs=f"blocks.{i}.",
        ) for i in range(DEPTH)
    )

    def model():
        return nn.Sequential(*(
            nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(DEPTH)
        ))

    def status(field):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

    def peak(work):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = status("VmRSS")
        work()
        return status("VmHWM") - before

    folder, act = Path(sys.argv[1]), sys.argv[2]
    torch.manual_seed(0)
    if act == "make":
        write_folder(model(), ROWS, folder, config={}, max_shard_size=100_000_000)
        sys.exit()
    with torch.device("meta"):
        empty = model()
    size = sum(p.numel() for p in empty.parameters()) * 4
    dtype = {"float32": None, "bfloat16": torch.bfloat16}[sys.argv[3]]
    differences(ROWS, empty, {})  # torch imports 75 MB of code for the meta device, whatever the model
    read = peak(lambda: read_into(empty, ROWS, folder, dtype=dtype))
    again, converted = (folder.with_name(f"{name}-{sys.argv[3]}") for name in ("again", "converted"))
    written = peak(lambda: write_folder(empty, ROWS, again, config={}, max_shard_size=100_000_000))
    stored = Stored(folder)
    streamed = peak(lambda: write_folder(
        AsOurs(stored, ROWS), ROWS, converted, config=None, dtype=dtype, max_shard_size=100_000_000
    ))
    print(read / (size / (2 if dtype else 1)), written, streamed)
"""


@pytest.mark.slow
def test_reading_takes_little_more_memory_than_the_weights_and_writing_a_shard(tmp_path):
    script = tmp_path / "memory.py"
    script.write_text(textwrap.dedent(MEMORY))

    def run(*args: str) -> str:
        return subprocess.run(
            [sys.executable, str(script), str(tmp_path / "weights"), *args], check=True, capture_output=True, text=True
        ).stdout

    run("make")
    for dtype in ("float32", "bfloat16"):
        read, written, streamed = map(float, run("read", dtype).split())
        print(dtype, read, written, streamed)
        assert read <= 1.1
        assert written <= 150_000_000
        assert streamed <= 150_000_000
