import pytest
from diffusers import LattePipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.conditioning.cleaning import cleaned

CAPTIONS = [
    "A Cat &amp; a <person> dog,by the sea...  #123 #45678 1234567",
    'see https://example.com/a/b?c=1 or www:x/y photos.net/shop @nick "“quoted”"',
    "<p>some <b>bold</b> text<script>var x = 1;</script> <!-- no -->after a&nbsp;space &lt;i&gt;",
    "this-is-my-cute-cat and_also snake_case—dash ‘single’ 10.0.0.1 5:30 ",
    "free shipping worldwide! download free image.png click for more page 12 jc6640 jc6640vc 6640vc231 j2d1a2a 3x4 3.5х2",
    "蓝色 kite ーズ ㍿ ***wow*** (great) [yes] {no} a | b \\n c ® ™ 1:20 ",
    "''start: end' , -",
    "a+b %41 word : word .hidden",
    "",
]


def test_captions_lose_what_the_reference_takes_from_them():
    theirs = LattePipeline._text_preprocessing
    reference = object.__new__(LattePipeline)
    for caption in CAPTIONS:
        assert cleaned(caption, "caption") == theirs(reference, caption, clean_caption=True)[0], caption
        assert cleaned(caption, "lower") == theirs(reference, caption)[0]


PIECES = st.sampled_from(
    ["A", "cat", " ", "-", "_", ".", ",", "#", "1", "23456", "@x", "&amp;", '"', "x", "com", "/", "é", ":"]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES, max_size=14).map("".join))
def test_any_caption_is_cleaned_as_the_reference_cleans_it(caption):
    reference = object.__new__(LattePipeline)
    assert cleaned(caption, "caption") == reference._text_preprocessing(caption, clean_caption=True)[0]


@pytest.mark.parametrize("text", ["  two\n\twords &amp;amp; “quotes” ", "cafÃ©  &lt;b&gt;", "\u3000a\u200b b"])
def test_web_text_is_mended_as_the_reference_mends_it(text):
    assert cleaned(text, "web") == prompt_clean(text)


def test_quotes_keep_each_text_once():
    assert cleaned('say "Go" and “Stop”, then "Go" again', "quotes") == 'Text "Go". Text "Stop". '
    assert cleaned("nothing is quoted", "quotes") == ""


def test_none_is_as_it_is():
    assert cleaned("  A &amp; b ", "none") == "  A &amp; b "
