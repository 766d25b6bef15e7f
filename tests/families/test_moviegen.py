import pytest
import torch

from reelflow.families.moviegen import MOVIEGEN, transformer
from reelflow.models.condition import Condition, Source
from reelflow.models.dit import VideoDiT


@pytest.mark.parametrize(("size", "advertised"), [("30b", 30e9), ("5b", 5e9), ("1b", 1e9)])
def test_the_count_is_what_is_advertised_within_a_fifteenth(size, advertised):
    with torch.device("meta"):
        model = VideoDiT(MOVIEGEN.sizes[size].config)
    count = sum(p.numel() for p in model.parameters())
    assert count == MOVIEGEN.sizes[size].parameters
    assert abs(count / advertised - 1) < 1 / 15


def test_places_are_told_before_every_block():
    torch.manual_seed(0)
    model = VideoDiT(
        transformer(dim=12, depth=2, heads=2, mlp=8, channels=2, texts=(3, 4, 5), table=(2, 3, 3))
    ).double()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    texts = [Source(torch.randn(1, n, width).double()) for n, width in ((2, 3), (1, 4), (3, 5))]
    condition = Condition(context=texts[0].tokens, further=tuple(texts[1:]))
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, given: seen.append(given[0].video))
        block.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    latents = torch.randn(1, 2, 2, 4, 6).double()
    assert model(latents, torch.tensor([0.3]).double(), condition).shape == latents.shape
    _, after, before, _ = seen
    places = sum(table for table in model.tables[0].tables)[:2, :2, :3].flatten(0, 2)
    torch.testing.assert_close(before - after, places[None])
