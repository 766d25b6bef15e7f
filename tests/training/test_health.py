import pytest

from reelflow.training.health import CODEBOOK, diagnose

WELL = {
    "real_accuracy": 0.7,
    "fake_accuracy": 0.6,
    "hinge": 0.8,
    "adaptive_weight": 0.4,
    "channels_used": 1.0,
    "latent_peak": 6.0,
    "posterior_std": 0.1,
    "flicker_ratio": 0.98,
    "psnr": 30.0,
    "psnr_image": 31.0,
}
ILL = {
    "the discriminator wins": {"real_accuracy": 0.99, "fake_accuracy": 0.98},
    "the discriminator is a constant": {"real_accuracy": 0.99, "fake_accuracy": 0.01},
    "the discriminator is blind": {"real_accuracy": 0.5, "fake_accuracy": 0.51, "hinge": 1.0},
    "the adversary has no gradient": {"adaptive_weight": 9e3},
    "the adversary is silenced": {"adaptive_weight": 1e-6},
    "channels are silent": {"channels_used": 0.2},
    "latents have spots": {"latent_peak": 80.0},
    "the posterior is a point": {"posterior_std": 1e-6},
    "rebuilt clips flicker": {"flicker_ratio": 1.5},
    "rebuilt clips are smeared in time": {"flicker_ratio": 0.3},
    "images fall behind": {"psnr_image": 20.0},
}


def test_a_run_that_is_well_has_nothing_named():
    assert diagnose(WELL) == ()
    assert diagnose({}) == ()


@pytest.mark.parametrize("name", ILL)
def test_each_failure_is_named_by_its_signs_alone(name):
    (line,) = diagnose(WELL | ILL[name])
    assert line.startswith(f"{name} (")


def test_every_failure_of_the_codebook_is_tested():
    assert list(ILL) == [failure.name for failure in CODEBOOK]
