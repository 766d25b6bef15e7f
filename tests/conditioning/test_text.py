import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.conditioning.text import HashedWords, words_of
from reelflow.errors import ConfigError

ENCODER = HashedWords(dim=64, max_words=8)


def test_the_same_text_gives_the_same_features_whatever_stands_beside_it():
    together = ENCODER(["a red ring", "", "blue"])
    alone = ENCODER(["a red ring"])
    assert torch.equal(together.tokens[0], alone.tokens[0])
    assert torch.equal(together.pooled[0], alone.pooled[0])


def test_different_words_are_nearly_orthogonal():
    words = ENCODER(["red", "green", "blue", "ring", "square", "disc"]).tokens[:, 0, :48]
    unit = words / words.norm(dim=-1, keepdim=True)
    off = (unit @ unit.T - torch.eye(6)).abs()
    assert off.max() < 0.5


def test_the_empty_prompt_has_no_tokens_and_pools_to_zero():
    features = ENCODER(["", "  ...  "])
    assert not features.mask.any()
    assert features.pooled.abs().max() == 0


@settings(max_examples=25, deadline=None)
@given(st.text(max_size=30))
def test_any_script_is_read_or_refused_by_length(text):
    if len(words_of(text)) > ENCODER.max_words:
        with pytest.raises(ConfigError, match="words"):
            ENCODER([text])
    else:
        features = ENCODER([text])
        assert features.mask.sum() == len(words_of(text))
        assert features.tokens.isfinite().all()


def test_scripts_without_spaces_give_a_word_per_character():
    assert words_of("红色圆环") == list("红色圆环")
    assert words_of("ЖЁЛТЫЙ круг, медленно") == ["жёлтый", "круг", "медленно"]


def test_a_prompt_that_is_too_long_names_the_setting_that_would_read_it():
    with pytest.raises(ConfigError, match="max_words=9"):
        ENCODER(["one two three four five six seven eight nine"])
