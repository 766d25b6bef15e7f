import resource
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from reelflow.training.whole_file import DTYPES, Layout, Part, read_part


@st.composite
def cut_tensors(draw):
    """Tensors, each cut into boxes: along every dimension into runs."""
    found, parts = {}, []
    for number in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(list(DTYPES.values())))
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        tensor = (torch.rand(shape) * 9).to(dtype)
        name = f"a/{number}"
        found[name] = tensor
        cuts = [sorted({0, size, draw(st.integers(0, size))}) for size in shape]
        boxes = [()]
        for cut in cuts:
            boxes = [(*box, run) for box in boxes for run in pairwise(cut)]
        for box in boxes:
            offset = tuple(start for start, _ in box)
            parts.append(Part(name, offset, tensor[tuple(slice(*run) for run in box)]))
    return found, parts


@settings(deadline=None, max_examples=60)
@given(cut_tensors(), st.integers(1, 3))
def test_parts_written_one_after_the_other_are_the_file_that_is_written_at_once(tmp_path_factory, cut, writers):
    tensors, parts = cut
    path = tmp_path_factory.mktemp("whole") / "a.safetensors"
    layout = Layout(tensors)
    layout.create(path)
    for writer in range(writers):
        layout.fill(path, parts[writer::writers])
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(path, framework="pt") as file:
        for name, offset, data in parts:
            read = torch.zeros_like(data)
            read_part(file, Part(name, offset, read))
            assert torch.equal(read, data)


def test_tensors_are_aligned_to_their_types_without_gaps():
    tensors = {"b": torch.rand(3).double(), "a": torch.ones(3).bfloat16(), "c": torch.arange(3), "d": torch.ones(3) > 0}
    layout = Layout(tensors)
    spans = sorted((layout.places[name], x.nbytes, x.itemsize) for name, x in tensors.items())
    assert all(start % itemsize == 0 for start, _, itemsize in spans)
    assert [start for start, _, _ in spans[1:]] == [start + size for start, size, _ in spans[:-1]]
    assert spans[0][0] == len(layout.head)
    assert sum(spans[-1][:2]) == layout.size


def test_too_little_space_is_noticed_before_anything_is_written(tmp_path):
    layout = Layout({"a": torch.zeros(1 << 16)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            layout.create(tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
