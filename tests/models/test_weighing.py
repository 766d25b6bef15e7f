from contextlib import nullcontext

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from reelflow.models.weighing import Weighing, peak_bytes, scratch_bytes


def test_what_is_dropped_is_given_back_and_views_weigh_nothing():
    with Weighing() as weighing:
        a = torch.ones(1000)
        b = a.view(10, 100)[2:]
        assert (weighing.alive, weighing.peak) == (4000, 4000)
        c = b + 1
        del c
        assert (weighing.alive, weighing.peak) == (4000, 7200)
        a.add_(1)
        assert weighing.peak == 7200


def test_a_model_without_data_weighs_what_it_makes_and_not_its_weights():
    with torch.device("meta"):
        model = nn.Linear(1000, 10)
    assert peak_bytes(model, lambda: model(torch.zeros(2, 1000))) == 4 * (2000 + 20)


def test_convolutions_weigh_more_than_their_results_while_they_run():
    x, y = torch.zeros(1, 2, 4, 5, 5), torch.zeros(1, 3, 4, 5, 5)
    assert scratch_bytes(x, torch.zeros(3, 2, 1, 3, 3), y) == 4 * 3 * 2 * 9
    last = torch.zeros(3, 2, 1, 3, 3).contiguous(memory_format=torch.channels_last_3d)
    assert scratch_bytes(x, last, y) == 4 * (3 * 2 * 9 + 200)
    assert scratch_bytes(x, torch.zeros(3, 2, 1, 1, 1), y) == 4 * (3 * 2 + 200)
    assert scratch_bytes(x, torch.zeros(3, 2, 3, 1, 1), y) == 4 * (3 * 2 * 3 + 200 + 300)
    assert scratch_bytes(x.double(), torch.zeros(3, 2, 1, 3, 3).double(), y) == 8 * 2 * 9 * 100
    with Weighing() as weighing, torch.no_grad():
        nn.functional.conv3d(x.double(), torch.zeros(3, 2, 1, 1, 1).double())
    assert weighing.peak > 8 * 2 * 100


def test_a_video_padded_with_its_border_keeps_channels_last_with_data_and_without():
    x = torch.zeros(1, 4, 3, 5, 5).contiguous(memory_format=torch.channels_last_3d)
    for mode in (nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        with mode, Weighing():
            y = nn.functional.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate")
        assert y.is_contiguous(memory_format=torch.channels_last_3d)


def test_a_norm_of_one_picture_with_channels_last_copies_it_with_data_and_without():
    peaks = []
    for mode in (nullcontext(), FakeTensorMode()):
        with mode, Weighing() as weighing:
            x = torch.empty_strided((1, 4, 1, 8, 8), (256, 1, 256, 32, 4))
            nn.functional.group_norm(x.movedim(2, 1).flatten(0, 1), 2)
        peaks.append(weighing.peak)
    assert peaks[0] == peaks[1] > 3 * 1024
