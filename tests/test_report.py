"""The page: whole in itself, and every text in it is text."""

import re
from html.parser import HTMLParser

import pytest

from fastlm.data.prepare import Funnel
from fastlm.recipe import parse_recipe
from fastlm.report import count_text, render_report, seconds_text, size_text

EVIL = '<script>alert("x")</script> & </style>'


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "use", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def html():
    recipe = parse_recipe({
        "name": "evil", "description": EVIL, "data": {"sources": [EVIL]},
        "model": {
            "hidden_size": 64, "intermediate_size": 64,
            "num_hidden_layers": 1, "num_attention_heads": 2,
        },
        "pretrain": {"max_steps": 3, "sample_prompt": EVIL},
    })  # fmt: skip
    funnel = Funnel(
        [
            {"step": "gather", "documents": 9, "bytes": 2_000_000, "removed": {EVIL: 3}},
            {
                "step": "scrub",
                "documents": 8,
                "bytes": 1_000_000,
                "removed": {},
                "replaced": {"email": 4},
            },
        ],
        {EVIL: {"files": 1, "documents": 2, "bytes": 3}},
    )
    metrics = [
        {"step": 0, "val_loss": 5.0, "bits_per_byte": 3.0},
        {"step": 0, "sample": EVIL, "progress": 0.0},
    ]
    for step in (1, 2, 3):
        metrics.append(
            {"step": step, "loss": 5.0 - step, "lr": 1e-3, "tokens": step * 100, "seconds": step}
        )
    metrics.append({"step": 3, "val_loss": 2.5, "bits_per_byte": 1.5})
    metrics.append({"step": 3, "sample": "\u2028\x00 fine", "progress": 1.0})
    summary = {
        "recipe": EVIL, "command": f"fastlm run '{EVIL}'",
        "bits_per_byte": 1.5, "bits_per_byte_xz": 2.0,
        "bits_per_byte_zstd": 2.1, "bits_per_byte_int4": 1.53, "format": "w4a16", "group_size": 128,
        "bf16_bytes": 1000, "int4_bytes": 300, "tokens_per_second": 1234.5,
        "parameters": 5_600_000, "tokens": 300,
        "steps": 3, "epochs": 1, "vocab_size": 512, "train_tokens": 1000,
        "heldout_documents": 5, "heldout_bytes": 5000,
        "decode_tokens_per_second_bf16": 10.0, "decode_tokens_per_second_int4": 20.0,
        "seconds": 65.0, "stage_seconds": {"data": 5.0, "pretrain": 60.0},
        "machine": {"cpu": EVIL, "threads": 2},
    }  # fmt: skip
    return render_report(summary, funnel, metrics, recipe)


def test_no_text_becomes_markup(html):
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    assert "script" not in {tag for tag, _ in page.tags}
    assert EVIL not in html and html.count("&lt;script&gt;") >= 6


def test_the_page_needs_nothing_else(html):
    page = Page()
    page.feed(html)
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset"):
            assert attributes.get(name, "#").startswith("#")
    assert not re.search(r"@import|url\((?!#)", html)
    assert html.count("<svg") == 2


def test_the_page_says_what_happened(html):
    page = Page()
    page.feed(html)
    text = " ".join(" ".join(page.text).split())
    for piece in (
        "1.500", "25 % below xz -9e", "5.60 M",
        "0.30×", "+2.00 %", "2.00×",  # noqa: RUF001 - the page prints the multiplication sign
        "4 email replaced", "1 min 05 s in all",
        "before training", "after step 3", "xz -9e", "zstd -19",
    ):  # fmt: skip
        assert piece in text, piece


def test_numbers_as_people_read_them():
    assert [size_text(n) for n in (12, 71_784, 10_200_000, 5e9)] == [
        "12 bytes",
        "71.8 kB",
        "10.2 MB",
        "5.00 GB",
    ]
    assert [seconds_text(n) for n in (3.21, 61, 7260)] == ["3.2 s", "1 min 01 s", "2 h 01 min"]
    assert [count_text(n) for n in (9999, 12_345, 3_240_000)] == ["9,999", "12 k", "3.24 M"]
