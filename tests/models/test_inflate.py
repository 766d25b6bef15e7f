import pytest
import torch

from reelflow.errors import ConfigError
from reelflow.models.coder import Act, Attention, Conv, Groups, Nearest, Padding, Res, Skip
from reelflow.models.inflate import inflate, inflated
from reelflow.models.vae import CausalVAE, VAEConfig

ZEROS, FRAME = Padding("zeros", "zeros"), (1, 3)
NORM = Groups(2)


def conv(channels: int) -> Conv:
    return Conv(channels, FRAME, pad=ZEROS)


IMAGES = VAEConfig(
    2,
    encoder=(
        conv(4),
        Res(4, NORM, (FRAME, FRAME), ZEROS),
        Conv(4, FRAME, (1, 2), Padding("zeros", "after")),
        Res(6, NORM, (FRAME, FRAME), ZEROS),
        Conv(6, FRAME, (1, 2), Padding("zeros", "after")),
        Attention(norm=NORM),
        Act(NORM),
        conv(4),
        Conv(4, (1, 1), pad=ZEROS),
    ),
    decoder=(
        *(Conv(2, (1, 1), pad=ZEROS), conv(6), Attention(norm=NORM), Nearest(), conv(6)),
        *(Res(4, NORM, (FRAME, FRAME), ZEROS), Nearest(), conv(4), Act(NORM), conv(3)),
    ),
    latent_mean=(0.1,),
    latent_std=(0.5,),
)


def images() -> CausalVAE:
    torch.manual_seed(0)
    vae = CausalVAE(IMAGES).double().eval()
    for weight in vae.parameters():
        torch.nn.init.normal_(weight, std=0.3)  # none is zero
    vae.set_statistics(torch.tensor([0.2, -0.3]), torch.tensor([1.5, 0.7]))
    return vae


def clip(frames: int) -> torch.Tensor:
    return torch.rand(2, 3, frames, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-12)


@pytest.mark.parametrize("halvings", [0, 1, 2])
def test_an_image_is_at_first_to_the_clips_network_what_it_was_to_the_images(halvings):
    image, video = images(), inflate(images(), halvings=halvings)
    assert video.config == inflated(IMAGES, halvings=halvings)
    before, after = image.encode(clip(1)), video.encode(clip(1))
    assert close(before.mean, after.mean)
    assert close(before.logvar, after.logvar)
    assert close(image.decode(before.mean), video.decode(before.mean))


@pytest.mark.parametrize("halvings", [0, 1, 2])
def test_the_latents_of_a_clip_are_at_first_those_of_its_frames(halvings):
    image, video, f = images(), inflate(images(), halvings=halvings), 2**halvings
    latents = video.encode(clip(9)).mean
    assert latents.shape[2] == 1 + 8 // f
    assert close(latents, image.encode(clip(9)[:, :, ::f]).mean)
    again = video.decode(latents)
    assert again.shape[2] == 9
    assert close(again[:, :, ::f], image.decode(latents))


def test_an_inflated_network_streams_and_every_new_weight_learns():
    video = inflate(images(), halvings=1)
    assert video.config.streams
    video.decode(video.encode(clip(5)).mean).square().sum().backward()
    kernels = [weight for name, weight in video.named_parameters() if weight.ndim == 5 and weight.shape[2] == 3]
    assert len(kernels) == 14
    assert all(kernel.grad[:, :, tap].any() for kernel in kernels for tap in range(3))


def test_what_is_no_autoencoder_of_images_is_refused():
    with pytest.raises(ConfigError, match="got 3, nearest: 2"):
        inflated(IMAGES, halvings=3)
    with pytest.raises(ConfigError, match="divides time by 2"):
        inflated(inflated(IMAGES, halvings=1), halvings=1)
    with pytest.raises(ConfigError, match="already sees 3 frames"):
        inflated(inflated(IMAGES, halvings=0), halvings=1)
    with pytest.raises(ConfigError, match="shortcut"):
        inflated(VAEConfig(2, (Skip((conv(3),)), conv(4)), (conv(3),)), halvings=0)
