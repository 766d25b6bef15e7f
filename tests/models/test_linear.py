import pytest
import torch
from einops import rearrange

from reelflow.errors import ConfigError
from reelflow.models.coder import Act, Conv, Fold, Res, Unfold
from reelflow.models.linear import fit_linear, is_linear, linear
from reelflow.models.vae import CausalVAE, Stage, staged

ENCODER = (Conv(8), Conv(4, (1, 1)), Fold(2, 2), Res(32), Act(), Conv(12))
DECODER = (Conv(32), Res(32), Unfold(2, 2), Act(), Conv(12))
ALONE = linear(6, patch=2, space=2, time=2)
BESIDE = linear(6, patch=2, space=2, time=2, encoder=ENCODER, decoder=DECODER)


def clips(num: int = 8) -> torch.Tensor:
    """Clips of cells of 2 x 4 x 4 that lie in six dimensions, frame 0 being a cell of copies."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(6, 3, 1, 4, 4, generator=generator).expand(-1, -1, 2, -1, -1) - 0.5
    weights = torch.rand(num, 3, 2, 2, 6, generator=generator) - 0.5
    cells = torch.einsum("btyxk,kcfhw->bctfyhxw", weights, patterns)
    return cells.reshape(num, 3, 6, 8, 8)[:, :, 1:] + 0.2


def noise() -> torch.Tensor:
    return torch.rand(6, 3, 5, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def fitted(config=ALONE, data: torch.Tensor | None = None) -> CausalVAE:
    torch.manual_seed(0)
    vae = CausalVAE(config)
    fit_linear(vae, (clips() if data is None else data).split(3))
    return vae.eval()


@pytest.mark.parametrize("config", [ALONE, BESIDE], ids=["alone", "beside a network"])
def test_clips_with_no_more_dimensions_than_latents_are_given_back(config):
    vae = fitted(config)
    latents = vae.encode(clips()).mean
    assert latents.shape == (8, 6, 3, 2, 2)
    torch.testing.assert_close(vae.decode(latents), clips(), atol=1e-4, rtol=0)
    values = latents.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(values.T @ values / len(values), torch.eye(6), atol=1e-3, rtol=0)


def test_what_is_lost_is_what_the_lesser_components_held():
    vae = fitted(data=noise())
    pixels = rearrange(noise(), "B C T (H h) (W w) -> B (C h w) T H W", h=2, w=2)
    cells = vae.encoder[0](pixels, None)[0].movedim(1, -1).flatten(0, -2)
    latents = vae.encode(noise()).mean
    again = vae.decoder[0](latents, None)[0].movedim(1, -1).flatten(0, -2)
    lost = torch.linalg.svdvals(cells - cells.mean(0))[6:].square().sum()
    torch.testing.assert_close((again - cells).square().sum(), lost)


def test_the_projection_is_fixed_and_the_network_beside_it_learns():
    assert not any(weight.requires_grad for weight in fitted().parameters())
    vae = fitted(BESIDE)
    free = {name for name, weight in vae.named_parameters() if weight.requires_grad}
    assert free == {name for name, _ in vae.named_parameters() if ".layers." in name}
    before = fitted(ALONE).encode(clips())
    torch.testing.assert_close(vae.encode(clips()).mean, before.mean)
    assert (vae.encode(clips()).logvar == -8).all()
    assert (before.logvar == -30).all()
    error = (vae.decode(vae.encode(noise()).mean) - noise()).square().mean()
    error.backward()
    assert vae.decoder[0].layers[-1].conv.weight.grad.any()


def test_a_projection_streams():
    vae, clip = fitted(), clips()[:1]
    latents, state = [], None
    for frames in clip.split(1, dim=2):
        posterior, state = vae.encode_chunk(frames, state)
        if posterior is not None:
            latents.append(posterior.mean)
    torch.testing.assert_close(torch.cat(latents, dim=2), vae.encode(clip).mean)


def test_flat_clips_have_finite_latents():
    vae = fitted(data=torch.full((2, 3, 3, 8, 8), 0.3))
    flat = torch.full((1, 3, 3, 8, 8), 0.3)
    torch.testing.assert_close(vae.decode(vae.encode(flat).mean), flat)


def test_what_cannot_be_fitted_is_refused():
    plain = staged(2, (Stage(8, 0, space=2, time=2),), (Stage(8, 0, space=2, time=2),))
    assert is_linear(ALONE)
    assert is_linear(BESIDE)
    assert not is_linear(plain)
    with pytest.raises(ConfigError, match="no projection to fit"):
        fit_linear(CausalVAE(plain), [clips()])
    with pytest.raises(ConfigError, match="no clips"):
        fit_linear(CausalVAE(ALONE), [])
