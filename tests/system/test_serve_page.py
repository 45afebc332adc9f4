"""The pages to chat, to rank and of the dashboard, in headless Chromium: what a person does there,
with the mouse and with keys, and that text from models and users stays text.
"""

import json
import re
import shutil
import time

import pytest
from monitored import CODE, COOKING, MODELS, fill
from serve_app import script, serving, tiny_model

from fastlm.data.preferences import Unranked
from fastlm.data.ranking import RankingStore
from fastlm.serve.feedback import FeedbackStore
from fastlm.serve.monitor.monitor import Settings
from fastlm.serve.monitor.rules import Rule, Rules
from fastlm.serve.ratings import Rating
from fastlm.serve.said import Opinion

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="wanted a browser (Debian: chromium), found none"
)
HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
# every control has a name that a screen reader can say
NAMELESS = """() => [...document.querySelectorAll("button, input, textarea")].filter((e) =>
  !(e.textContent.trim() || e.ariaLabel || [...(e.labels ?? [])].some((l) => l.textContent.trim())))
  .map((e) => e.outerHTML)"""
# texts whose contrast with what is behind them is below WCAG 2's 4.5 to 1
PALE = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const color = channels(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const contrast = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const shown = [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility()
    && !e.disabled && !e.classList.contains("hidden"));
  const texts = shown.filter((e) => e.matches("input, textarea")
    || [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())).map((e) => [e, null]);
  for (const e of shown) if (e.placeholder) texts.push([e, "::placeholder"]);
  const found = texts.map(([e, part]) => [e.outerHTML.slice(0, 80), part,
    contrast(channels(getComputedStyle(e, part).color), behind(e))]);
  if (found.length < 15) throw new Error(`wanted the texts of the page, found ${found.length}`);
  return found.filter(([, , ratio]) => ratio < 4.5);
}"""
TOO_WIDE = "() => document.documentElement.scrollWidth > document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


def opened(browser, url, **options):
    """A page, and what its console says that is wrong."""
    page, wrong = browser.new_context(**options).new_page(), []
    page.set_default_timeout(120_000)  # a machine may be busy
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    origin = "/".join(url.split("/")[:3])
    page.on("request", lambda r: None if r.url.startswith(origin) else wrong.append(r.url))
    page.goto(url)
    return page, wrong


def send(page, text):
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def says(locator, text):
    from playwright.sync_api import expect

    expect(locator).to_have_text(text, timeout=120_000)


def status(page, pattern):
    says(page.locator("#status"), re.compile(pattern))


def test_chat(browser, tiny, tmp_path):
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        serving(*tiny, feedback=store) as (url, server),
    ):
        script(
            server, f"Hello. {HOSTILE}\n```\ncode <b>\n```", "Second", "Third", "Fourth", "Fifth"
        )
        page, wrong = opened(browser, url)
        send(page, f"Hi {HOSTILE}")
        status(page, r"\d+ tokens, [\d.]+ tokens/s")
        first = page.get_by_role("article", name="Answer")
        assert HOSTILE in first.locator(".text").inner_text()
        assert first.locator("pre").inner_text() == "code <b>\n"
        assert page.locator("img").count() == 0 and page.evaluate("window.hacked") is None

        consent = page.get_by_label("Keep my conversations")
        assert consent.is_visible() and not consent.is_checked()  # no settings to open
        first.get_by_role("button", name="Good").click()
        status(page, "stored; the text of the answer is not kept, since nobody consented")
        assert first.get_by_role("button", name="Good").get_attribute("aria-pressed") == "true"
        first.get_by_role("button", name="Comment").click()
        page.keyboard.type("Write to ann@mail.org")
        page.keyboard.press("Control+Enter")
        page.locator("form.box").wait_for(state="detached")
        first.get_by_role("button", name="Correct").click()
        page.locator("form.box textarea").fill("What it should be")
        page.get_by_role("button", name="Save").click()
        # wait_for_function polls by eval, which the page's Content-Security-Policy refuses
        says(page.locator(".assistant .text").first, "What it should be")
        thumb, comment, corrected = store.opinions()
        assert (thumb.thumb, comment.comment) == ("up", "Write to <EMAIL>")
        assert corrected.corrected == "What it should be" and not store.answers()

        first.get_by_role("button", name="Again").click()
        status(page, "tokens/s")
        page.get_by_text("Second").wait_for()
        assert page.evaluate("document.activeElement.id") == "text"
        assert page.get_by_text("What it should be").count() == 0
        page.get_by_role("article", name="You").get_by_role("button", name="Edit").click()
        page.locator("form.box textarea").fill("Another question")
        page.keyboard.press("Control+Enter")
        page.get_by_text("Third").wait_for()
        assert page.get_by_text("Second").count() == 0

        page.get_by_role("button", name="Settings").click()
        consent.check()
        page.get_by_label("System prompt").fill("Be kind")
        page.get_by_label("Two answers").check()
        send(page, "Two, please")
        pick = page.get_by_role("button", name="Pick answer 2")
        pick.wait_for()
        page.screenshot(path=tmp_path / "two.png")
        page.keyboard.press("Alt+2")
        status(page, "stored, with the conversation")
        picked = store.opinions()[-1]
        assert picked.choice == 1 and picked.preferred_over == ((picked.response_id, 0),)
        kept = store.answers()[picked.response_id]
        assert [m["role"] for m in kept.prompt] == ["system", "user", "assistant", "user"]
        assert [c[0]["content"] for c in kept.choices] == ["Fourth", "Fifth"]
        assert page.evaluate(NAMELESS) == [] and wrong == []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate(PALE) == []
            page.screenshot(path=tmp_path / f"{scheme}.png")
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.get_by_role("button", name="Theme").click()  # auto, then light
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
        page.set_viewport_size({"width": 360, "height": 740})
        assert not page.evaluate(TOO_WIDE)
        page.screenshot(path=tmp_path / "phone.png", full_page=True)
        page.get_by_role("button", name="New").click()
        assert page.locator("article").count() == 0


def test_consent_after_the_answer(browser, tiny, tmp_path):
    """The next opinion sends the text, once; withdrawn consent stays withdrawn, and is told."""
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        serving(*tiny, feedback=store) as (url, server),
    ):
        script(server, "An answer")
        page, wrong = opened(browser, url)
        send(page, "Hi")
        status(page, "tokens/s")
        bodies = []
        page.on("request", lambda request: bodies.append(request.post_data or ""))
        page.get_by_label("Keep my conversations").check()
        page.get_by_role("button", name="Good").click()
        status(page, "stored, with the conversation")
        (kept,) = store.answers().values()
        assert kept.choices == [[{"role": "assistant", "content": "An answer"}]]
        store.forget(kept.response_id)
        page.get_by_role("button", name="Bad").click()
        status(page, "not kept, since its consent was withdrawn")
        page.get_by_role("button", name="Good").click()
        status(page, "not kept, since its consent was withdrawn")
        assert ["An answer" in body for body in bodies] == [True, False, False]  # sent once
        assert not store.answers() and wrong == []


def test_numbers_for_an_answer(browser, tiny, tmp_path):
    settings = Settings([
        Rating("stars", "number", "higher", low=1, high=5),
        Rating("solved", "boolean", "higher", "conversation"),
    ])  # fmt: skip
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        serving(*tiny, feedback=store, monitoring=settings) as (url, server),
    ):
        script(server, "An answer")
        page, wrong = opened(browser, url)
        send(page, "Hi")
        status(page, "tokens/s")
        rate = page.get_by_role("button", name="Rate")
        rate.click()
        page.get_by_label("stars (higher is better)").fill("4.5")
        page.get_by_label("solved, of the conversation").select_option("no")
        assert page.evaluate(NAMELESS) == []
        page.screenshot(path=tmp_path / "rate.png")
        page.get_by_role("button", name="Save").click()
        status(page, "stored")
        (given,) = store.opinions()
        assert given.metrics == (("stars", 4.5), ("solved", 0.0)) and given.conversation_id
        rate.click()
        page.keyboard.press("Escape")
        page.locator("form.box").wait_for(state="detached")
        assert len(store.opinions()) == 1 and wrong == []


def test_an_answer_belongs_to_its_conversation(browser, tiny, tmp_path):
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        serving(*tiny, feedback=store, pause=0.03) as (url, server),
    ):
        script(server, "old " * 40, "new " * 20, "again " * 20)
        page, wrong = opened(browser, url)
        page.get_by_label("Keep my conversations").check()
        send(page, "First")
        page.get_by_text("old old").wait_for()
        page.get_by_role("button", name="New").click()  # while it is written
        send(page, "Second")
        page.get_by_text("new new").wait_for()
        status(page, "tokens/s")
        articles = page.get_by_role("article").all_inner_texts()
        assert len(articles) == 2 and "old" not in "".join(articles)
        (kept,) = store.answers().values()
        assert [m["content"] for m in kept.prompt] == ["Second"]

        page.get_by_role("button", name="Again").click()
        page.get_by_text("again again").wait_for()
        page.get_by_text("new new").wait_for()  # stays until the other one is whole
        page.keyboard.press("Escape")
        status(page, "stopped; the answer before it stays")
        assert page.get_by_role("article").count() == 2
        page.get_by_text("new new").wait_for()
        assert page.evaluate("document.activeElement.id") == "text" and wrong == []


def test_an_answer_that_is_not_complete(browser, tiny):
    with serving(*tiny) as (url, server):
        script(server, "word " * 60, "word " * 60)
        page, _ = opened(browser, url)
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Longest answer").fill("10")
        send(page, "Hi")
        page.get_by_text("Cut at 10 tokens").wait_for()
        page.get_by_role("button", name="Answer again with twice as many").click()
        page.get_by_text("Cut at 20 tokens").wait_for()
        assert page.get_by_role("article", name="Answer").count() == 1
        half = {"index": 0, "delta": {"content": "Half"}}
        page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(
                content_type="text/event-stream",
                body=f"data: {json.dumps({'id': 'x', 'choices': [half]})}\n\n",
            ),
        )
        send(page, "And now?")
        status(page, "the answer broke off")


def test_a_conversation_longer_than_the_context(browser, tiny):
    _, tokenizer = tiny
    text = "The tree sees the river. "
    text *= 170 // len(tokenizer.encode(text))
    with serving(*tiny) as (url, server):
        script(server, "One", "Two", "Three", "Three again")
        page, _ = opened(browser, url)
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Longest answer").fill("60")
        for number, said in (("1", "One"), ("2", "Two")):
            send(page, number + text)
            page.get_by_text(said, exact=True).wait_for()
            status(page, "token")
        send(page, "3" + text)
        forget = page.get_by_role("button", name="Forget the oldest turn")
        forget.click()
        page.get_by_text("Three", exact=True).wait_for()
        asked = [a[:1] for a in page.get_by_role("article", name="You").locator(".text")
                 .all_inner_texts()]  # fmt: skip
        assert asked == ["2", "3"] and page.get_by_text("One", exact=True).count() == 0
        page.get_by_role("button", name="New").click()
        send(page, text * 4)  # nothing to forget
        status(page, "model's context")
        assert forget.count() == 0


def test_stop_and_errors(browser, tiny):
    key = "a-key-of-this-server"
    with serving(*tiny, pause=0.05, keys=[key]) as (url, server):
        page, _ = opened(browser, url)
        status(page, "an API key is needed")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Tab")
        status(page, "^$")
        script(server, "word " * 60)
        send(page, "Hi")
        page.get_by_text("word word").wait_for()
        page.keyboard.press("Escape")
        status(page, "stopped")
        page.locator("#stop").wait_for(state="hidden")
        for _ in range(200):
            if not server.served.engine.stats().running:
                break
            page.wait_for_timeout(50)
        assert server.served.engine.stats().finished["cancelled"] == 1
        page.get_by_label("Temperature").fill("7")
        send(page, "Hi")
        status(page, "temperature: wanted a number from 0 to 2, got 7")


def test_rank(browser, tiny, tmp_path):
    base = tmp_path / "answers.sqlite"
    with RankingStore(base, create=True) as store:
        for i in range(2):
            texts = ("first", "second", f"third {HOSTILE}")
            answers = tuple([{"role": "assistant", "content": text}] for text in texts)
            store.add([Unranked([{"role": "user", "content": f"Which, {i}? {HOSTILE}"}], answers)])
    with serving(*tiny, ranking=base) as (url, _):
        page, wrong = opened(browser, url + "/rank")

        def order():
            return [t.split()[0] for t in page.locator("[role=listitem] .text").all_inner_texts()]

        def place(name, at):
            while (have := order().index(name)) != at:
                page.get_by_role("listitem").nth(have).focus()
                page.keyboard.press("ArrowLeft" if have > at else "ArrowRight")

        for rater in ("Ann", "Bob"):
            page.get_by_label("Your name").fill(rater)
            page.get_by_role("button", name="Start").click()
            page.get_by_role("listitem").first.wait_for()
            for at, name in enumerate(("third", "second", "first")):
                place(name, at)
            assert order() == ["third", "second", "first"]
            if rater == "Ann":
                page.screenshot(path=tmp_path / "rank.png", full_page=True)
                page.get_by_role("listitem").nth(2).focus()
                page.keyboard.press("=")
                assert page.locator(".place").all_inner_texts() == ["1.", "2.", "2."]
                page.get_by_role("listitem").nth(2).get_by_role("button", name="Correct").click()
                page.locator("form.box textarea").fill("as it should be")
                page.keyboard.press("Control+Enter")
                status(page, "Correction stored")
            page.get_by_role("listitem").first.focus()
            page.keyboard.press("Control+Enter")
            page.get_by_text(f"{rater}: 1 of 2 ranked").wait_for()
            page.keyboard.press("s")
            status(page, "Nothing left to rank")
        page.get_by_text("Krippendorff's alpha (ordinal)").wait_for()
        page.get_by_role("button", name="Start").click()
        assert page.evaluate("window.hacked") is None and page.locator("img").count() == 0
        assert page.evaluate(NAMELESS) == [] and wrong == []
        page.get_by_label("Your name").fill("Cid")
        page.get_by_role("button", name="Start").click()
        page.get_by_role("listitem").first.wait_for()
        before = order()
        page.get_by_role("listitem").nth(0).locator(".place").drag_to(
            page.get_by_role("listitem").nth(2)
        )
        assert order() == [*before[1:], before[0]]
        page.set_viewport_size({"width": 360, "height": 740})
        assert not page.evaluate(TOO_WIDE)
    with RankingStore(base) as store:
        counts = store.raters()
        assert (counts["Ann"].ranked, counts["Ann"].skipped, counts["Ann"].corrected) == (1, 1, 1)
        assert store.agreement().items == 1
        (ann,) = store.comparisons("Ann")
        said = {a[0]["content"].split()[0]: rank for a, rank in zip(ann.answers, ann.ranks)}
        assert said == {"third": 0, "second": 1, "first": 1}


def test_dashboard(browser, tiny, tmp_path):
    key = "a-key-of-this-server"
    stars = Rating("stars", "number", "higher", low=1, high=5)
    rules = Rules((
        Rule(f"refuses {HOSTILE}", "refusal", "1d", above=0.02, hold=1),
        Rule("slow", "whole_p95", "1d", above=500),
    ))  # fmt: skip
    models = (MODELS[0], f"new {HOSTILE}")
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        serving(*tiny, feedback=store, monitoring=Settings([stars], rules), keys=[key]) as (
            url, server,
        ),
    ):  # fmt: skip
        page, wrong = opened(browser, url + "/dashboard", viewport={"width": 1280, "height": 900})
        status(page, "an API key is needed")
        wrong.clear()  # the browser's line about the 401
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Tab")
        page.get_by_text("Too few to compare").wait_for()  # nothing was measured yet
        assert page.locator("figure").count() == 9

        ids = fill(store, 900, models=models, words=(COOKING, CODE))
        for id in ids[:20]:
            store.add(Opinion(id, metrics=(("stars", 4.0),)))
        server.monitor.alerts.check(time.time())
        page.get_by_role("button", name="Week").click()
        page.get_by_text("the prompts have changed").wait_for()
        firing = page.locator(".alert.firing")
        assert firing.count() == 1 and HOSTILE in firing.inner_text()
        heads = page.locator("#table thead th").all_inner_texts()
        assert heads[1:] == ["all", models[0], models[1]]
        row = page.locator("#table tbody tr", has_text="stars")
        assert row.locator("td").first.inner_text().startswith("4.00")
        assert "judge: refusal rules 1" in page.locator("#table").inner_text()
        assert page.locator("#charts svg polyline").count() > 8
        assert page.locator("#drift tbody tr").count() == 10
        assert page.get_by_role("button", name="Week").get_attribute("aria-pressed") == "true"
        chart = page.get_by_role("img", name=re.compile("^Refusals: "))
        box = chart.bounding_box()
        chart.hover(position={"x": box["width"] * 0.9, "y": 40})
        caption = page.locator("figure", has=chart).locator("figcaption .quiet")
        assert re.match(r"\d\d-\d\d \d\d:\d\d: ", caption.inner_text())

        page.get_by_label("Compare with").fill("2026-01-02")
        page.get_by_label("until").fill("2026-01-01")
        page.get_by_role("button", name="Compare", exact=True).click()
        status(page, "end: wanted a time after 2026-01-02")
        page.get_by_label("until").fill("2026-01-09")
        page.get_by_role("button", name="Compare", exact=True).click()
        page.get_by_text("2026-01-02 to 2026-01-09").wait_for()
        page.get_by_role("button", name="The server's reference").click()
        page.get_by_text("the first 500 prompts").wait_for()

        assert page.evaluate("window.hacked") is None and page.locator("img").count() == 0
        assert page.evaluate(NAMELESS) == []
        assert [line for line in wrong if "400" not in line] == []  # of the dates above
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate(PALE) == []
            page.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)
        page.set_viewport_size({"width": 360, "height": 740})
        page.wait_for_timeout(400)  # charts are drawn again
        assert not page.evaluate(TOO_WIDE)


@pytest.mark.parametrize(
    "ago, wanted, shown",
    [
        ([], "", "Hour"),
        ([300, 86_400], "", "Hour"),
        ([43_200, 200_000], "", "Day"),
        ([200_000], "", "Week"),
        ([2_000_000], "", "All"),
        ([300], "#week", "Week"),
        ([300], "#century", "Hour"),
    ],
)
def test_the_dashboard_opens_on_what_has_answers(browser, tiny, tmp_path, ago, wanted, shown):
    """The shortest period that has some, unless the address names one."""
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        serving(*tiny, feedback=store, monitoring=Settings()) as (url, _),
    ):
        for seed, seconds in enumerate(ago):
            fill(store, 20, days=0.001, now=time.time() - seconds, seed=seed)
        page, wrong = opened(browser, f"{url}/dashboard{wanted}")
        page.wait_for_load_state("networkidle")
        status(page, "updated")
        assert page.locator("#windows [aria-pressed=true]").all_inner_texts() == [shown]
        first = page.locator("#table tbody tr").first.locator("td").inner_text()
        assert (first == "0") == (not ago) and wrong == []
