"""What published systems do to the text of a prompt before any tokenizer sees it."""

import html
import re
from html.parser import HTMLParser
from importlib.util import find_spec
from typing import Literal
from urllib.parse import unquote_plus

__all__ = ["Cleaning", "cleaned"]

Cleaning = Literal["none", "web", "lower", "caption", "quotes"]

HIDDEN = frozenset({"script", "style", "template"})

# Substitutions in their order, of captions found on the web (Saharia et al. 2022 and followers).
ADDRESS = r"{}(?:\/{{1,3}}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)"
FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
DASHES = "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
TAGGED = (
    ("<person>", "person"),
    (rf"\b({ADDRESS.format('https?:')})", ""),
    (rf"\b({ADDRESS.format('www:')})", ""),
)
SIGNS = (
    (r"@\w+\b", ""),  # nicknames
    (r"[\u31c0-\u9fff]+", ""),  # Chinese characters and their parts
    (f"[{re.escape(DASHES[0])}{DASHES[1:]}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # addresses of machines
    (r"\d:\d\d\s+$", ""),  # numbers of articles
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{FILES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
WORDS = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{FILES})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def cleaned(text: str, how: Cleaning) -> str:
    """Return a prompt as a system's encoder is to read it.

    none      as it is
    web       mended letters (with ftfy, where it is installed), characters for HTML's names of them, single spaces
    lower     lower case, no space around
    caption   lower case, without addresses, tags, file names, Chinese characters, codes, advertisement; twice over
    quotes    only what stands in double quotes, each once: Text "a". Text "b". Without quotes, nothing.
    """
    match how:
        case "none":
            return text
        case "web":
            return re.sub(r"\s+", " ", _mended(text)).strip()
        case "lower":
            return text.lower().strip()
        case "caption":
            return _caption(_caption(text))
        case "quotes":
            found = re.findall(r'"(.*?)"|“(.*?)”', text)
            return "".join(f'Text "{each}". ' for each in dict.fromkeys(straight or curly for straight, curly in found))


def _mended(text: str) -> str:
    if find_spec("ftfy"):
        from ftfy import fix_text

        text = fix_text(text)
    return html.unescape(html.unescape(text))


def _caption(text: str) -> str:
    text = _replaced(unquote_plus(text).strip().lower(), TAGGED)
    text = _replaced(_Shown.of(text), SIGNS)
    if len(re.findall("[-_]", text)) > 3:  # words-joined-to-one
        text = re.sub("[-_]", " ", text)
    return _replaced(_mended(text), WORDS).strip()


def _replaced(text: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


class _Shown(HTMLParser):
    """Collects what a page shows of its text."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    @classmethod
    def of(cls, page: str) -> str:
        parser = cls()
        parser.feed(page)
        parser.close()
        return "".join(parser.parts)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in HIDDEN

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in HIDDEN and self.hidden > 0

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)
