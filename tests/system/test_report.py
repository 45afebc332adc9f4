"""The page: it is self-contained, and every text in it stays text."""

import json
import re
import warnings
from dataclasses import asdict
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from fastlm.pipeline.charts import bits_figure
from fastlm.pipeline.funnel import Funnel
from fastlm.pipeline.report import FinishedStage, command_until, render_report
from fastlm.pipeline.stage import Input, StageContext
from fastlm.pipeline.text import count_text, seconds_text, size_text
from fastlm.stages import parse_recipe
from fastlm.train.charts import sweep_chart
from fastlm.train.metrics import read_metrics

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


MODEL = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
RECIPE = {
    "name": "evil", "description": EVIL,
    "stage": [
        {"kind": "data", "sources": [EVIL]},
        {"kind": "tokenizer", "vocab_size": 512},
        {"kind": "shards"},
        {"kind": "pretrain", "max_steps": 3, "sample_prompt": EVIL, "model": MODEL},
        {"kind": "eval"},
        {"kind": "quantize"},
    ],
}  # fmt: skip
TRAINED = {
    "steps": 3, "tokens": 300, "tokens_per_second": 1234.5, "loss": 2.0, "parameters": 5_600_000,
    "epochs": 1, "used_seconds": 60.0, "train_tokens": 1000,
    "machine_load": "1.2 at the start", "prompt": EVIL,
}  # fmt: skip
WINDOWS = {"loss": 3.0, "tokens": 1000, "seq_len": 32}
RESULTS = {
    "data": {},
    "tokenizer": {"vocab_size": 512},
    "shards": {"vocab_size": 512, "train_tokens": 1000, "train_bytes": 3000},
    "pretrain": TRAINED,
    "eval": {
        "bits_per_byte_xz": 2.0, "bits_per_byte_zstd": 2.1, "documents": 5,
        "models": {"pretrain": {"bits_per_byte": 1.5, "bytes": 5000, **WINDOWS}},
    },
    "quantize": {
        "format": "w4a16", "group_size": 128, "bytes_before": 1000, "bytes": 300,
        "bits_per_byte_before": 1.5, "bits_per_byte": 1.53,
        "decode_tokens_per_second_before": 10.0, "decode_tokens_per_second": 20.0,
    },
}  # fmt: skip


def metrics_of(folder, losses):
    """A metrics.jsonl with three steps."""
    lines = [
        {"step": 0, "val_loss": 5.0, "bits_per_byte": 3.0},
        {"step": 0, "sample": EVIL, "progress": 0.0},
    ]
    for step, loss in enumerate(losses, 1):
        lines.append(
            {"step": step, "loss": loss, "lr": 1e-3, "tokens": step * 100, "seconds": step}
        )
    lines.append({"step": 3, "val_loss": 2.5, "bits_per_byte": 1.5})
    lines.append({"step": 3, "sample": "\u2028\x00 fine", "progress": 1.0})
    folder.mkdir()
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


def page_of(folder, table, results):
    """report.html of a run folder that contains only the files that its stages read."""
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
    (folder / "data").mkdir()
    (folder / "data/funnel.json").write_text(json.dumps(asdict(funnel)))
    recipe = parse_recipe(table)
    parts, stages = [], {}
    for step in recipe.steps:
        inputs = {
            key: [Input(name, str(folder / name / "model")) for name in names]
            for key, names in step.inputs.items()
        }
        ctx = StageContext(step.name, folder / step.name, inputs, folder)
        done = FinishedStage(
            step, ctx, results[step.name], 60.0 if step.name == "pretrain" else 1.0
        )
        stages[step.name] = {"seconds": done.seconds}
        if part := step.stage.report(ctx, done.result):
            parts.append((step, part))
    summary = {
        "recipe": EVIL, "command": f"fastlm run '{EVIL}'",
        "seconds": sum(s["seconds"] for s in stages.values()), "stages": stages,
        "machine": {"cpu": EVIL, "threads": 2},
    }  # fmt: skip
    return render_report(summary, recipe, parts)


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    metrics_of(folder / "pretrain", (4.0, 3.0, 2.0))
    return page_of(folder, RECIPE, RESULTS)


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
        "1.500", "25 % below xz -9e", "5.60 M", "w4a16, 0.30 of before, +2.0 % bits",
        "0.30×", "+2.00 %", "2.00×",  # noqa: RUF001 - the page prints the multiplication sign
        "4 e-mail addresses replaced", "1 min 05 s in all",
        "before training", "after step 3", "xz -9e", "zstd -19",
        "The training used 300 tokens: 3 steps of 4,096.", "1,000 tokens, of which 30 % were used",
        "1 min 00 s, steps and checkpoints", "load 1.2 at the start",
        "1,000 tokens, 3 kB, 3.00 bytes per token",
    ):  # fmt: skip
        assert piece in text, piece


def test_two_models_of_a_kind_stand_side_by_side(tmp_path):
    other = {"kind": "pretrain", "name": "wide", "max_steps": 3, "model": MODEL}
    stages = [*RECIPE["stage"][:4], other, {"kind": "eval", "of": ["pretrain", "wide"]}]
    scores = {"pretrain": {"bits_per_byte": 1.5, "bytes": 5000, **WINDOWS}}
    scores["wide"] = {"bits_per_byte": 1.4, "bytes": 5000, **WINDOWS}
    results = RESULTS | {"wide": TRAINED, "eval": RESULTS["eval"] | {"models": scores}}
    for name in ("pretrain", "wide"):
        metrics_of(tmp_path / name, (4.0, 3.0, 2.0))
    html = page_of(tmp_path, RECIPE | {"stage": stages}, results)
    page = Page()
    page.feed(html)
    text = " ".join(" ".join(page.text).split())
    assert html.count('class="columns"') == 1 and html.count("<h2>Training</h2>") == 1
    assert "<h3>pretrain</h3>" in html and "<h3>wide</h3>" in html
    assert "parameters (pretrain)" in text and "parameters (wide)" in text
    assert "bits per byte of unseen text (wide), 30 % below xz -9e" in text
    assert html.count("<svg") == 3  # two losses, and the bits of both models in one chart


def test_bars_are_the_difference_to_xz(html):
    """Starting from xz's line at 2.0, zstd's bar goes right and the model's left. No bar is long
    just because its value is far from zero.
    """
    actual = re.findall(r'class="bar" style="left:([\d.]+)%;width:([\d.]+)%', html)
    bars = [(float(left), float(left) + float(width)) for left, width in actual]
    line = float(re.findall(r'class="line" style="left:([\d.]+)%"', html)[0])
    assert line == pytest.approx(100 * 0.5 / 0.6, abs=0.1)
    expected = [(0, line), (line, line), (line, 100)]  # the model, xz, zstd
    for bar, position in zip(bars, expected, strict=True):
        assert bar == pytest.approx(position, abs=0.11)


@pytest.mark.parametrize(
    "model, xz, zstd",
    [
        (1.6, 2.041, 2.074), (2.04, 2.586, 2.518), (2.05, 2.041, 2.044), (2.042, 2.042, 2.042),
        (3.3, 2.041, 2.6), (0.9, 2.9, 2.91),
    ],
)  # fmt: skip
def test_labels_stand_at_their_own_lines(model, xz, zstd):
    """Labels are right of the axes, clear of curves and dashes. They are in the order of their
    values, do not overlap, and are as near to their lines as that allows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    metrics = []
    for step in range(40):
        metrics.append({"step": step, "loss": 1.0, "tokens": 50_000 * step})
        metrics.append({"step": step, "bits_per_byte": model + 2 * 0.8**step})
    names = {"model": model, "xz -9e": xz, "zstd -19": zstd}
    packed = {"xz -9e": xz, "zstd -19": zstd}
    figure = bits_figure({"model": metrics}, {"model": model}, packed)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes = figure.axes[0]
    labels = []
    for note in axes.texts:
        name, value = note.get_text().rsplit(" ", 1)
        assert float(value) == pytest.approx(names.pop(name), abs=5e-4)
        box = Text.get_window_extent(note, canvas.get_renderer())  # excludes the line to its value
        assert box.x0 > axes.bbox.x1 and box.x1 < figure.bbox.x1
        labels.append((float(value), box))
    assert not names
    labels.sort(key=lambda label: label[0])
    height = max(box.height for _, box in labels)
    for (_, low), (_, high) in pairwise(labels):
        assert low.y1 <= high.y0
    at = [axes.transData.transform((0, value))[1] for value, _ in labels]
    crowded = [y for y in at if sum(abs(y - other) < 2 * height for other in at) > 1]
    for y, (_, box) in zip(at, labels):
        off = abs((box.y0 + box.y1) / 2 - y)
        assert off < (2 * height if y in crowded else 1.5)


def test_numbers_as_people_read_them():
    assert [size_text(n) for n in (12, 71_784, 10_200_000, 5e9)] == [
        "12 bytes",
        "71.8 kB",
        "10.2 MB",
        "5.00 GB",
    ]
    assert [seconds_text(n) for n in (3.21, 61, 7260)] == ["3.2 s", "1 min 01 s", "2 h 01 min"]
    assert [count_text(n) for n in (9999, 12_345, 3_240_000)] == ["9,999", "12 k", "3.24 M"]


def test_metrics_with_a_line_separator_in_a_sample(tmp_path):
    step = {"step": 1, "loss": 2, "lr": 1, "tokens": 3, "seconds": 1}
    sample = {"step": 1, "sample": "a\u2028b", "progress": 1}
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in (step, sample)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert read_metrics(tmp_path / "metrics.jsonl") == [step, sample]


@pytest.mark.parametrize("size", [20, 40, 90])
def test_long_names_of_curves_leave_room_for_the_curves(size):
    names = ["x" * size, *(f"{'word ' * (size // 5)}{i}" for i in range(4))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the layout warns if it cannot fit the axes in
        chart = sweep_chart({name: [[(0, 1.0), (9, 2.0)]] * 2 for name in names}, "loss")
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', chart)[1])
    grid = re.search(r'id="line2d_\d+">\s*<path d="M ([\d.]+) [\d.]+ \s*L ([\d.]+) ', chart)
    assert float(grid[2]) - float(grid[1]) > 0.6 * width


def test_the_chart_of_seeds_shows_what_was_learnt():
    curves = [[(0, 0.1), (10, 0.81), (20, 0.82), (30, 0.83)]] * 2
    alone = sweep_chart({"all runs": curves}, "score")
    compared = sweep_chart({"lr = 1": curves, "lr = 2": curves}, "score")
    assert ">0.2<" in alone and ">0.2<" not in compared  # a number of the axis


def test_each_part_names_the_command_that_gives_it(html):
    page = Page()
    page.feed(html)
    text = " ".join(page.text)
    for name in ("data", "pretrain", "eval", "quantize"):
        assert f"--until {name}" in text
    command = "fastlm run r.toml --until 'a b' --out runs/x"
    assert command_until(command, "eval") == "fastlm run r.toml --out runs/x --until eval"
    assert command_until("fastlm run r.toml --until=x", "my eval").endswith(
        "r.toml --until 'my eval'"
    )
