"""The pages to chat, to rank and of the dashboard, in headless Chromium: what a person does there,
with the mouse and with keys, and that text from models and users stays text.
"""

import json
import re
import shutil
import time

import markdown_cases
import pytest
from feedback_measurements import CODE, COOKING, MODELS, fill_measurements
from markdown_cases import AROUND, AS_HTML, EXAMPLES, GROWN, HARMLESS, LONG, SHOWN
from serve_app import run_server, script, serve_model, tiny_model

from fastlm.data.preferences import UnrankedAnswers
from fastlm.evals.judge.items import JudgeItem, make_items
from fastlm.evals.judge.label_store import LabelStore
from fastlm.evals.judge.rubric import Rubric
from fastlm.serve.feedback import Feedback
from fastlm.serve.feedback_store import FeedbackStore
from fastlm.serve.label_server import LabelServer
from fastlm.serve.monitor import monitor
from fastlm.serve.monitor.alerts import AlertConfig, AlertRule
from fastlm.serve.monitor.monitor import MonitorConfig
from fastlm.serve.ranking import RankingStore
from fastlm.serve.ratings import Rating

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="expected a browser (Debian: chromium), found none"
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
  if (found.length < 15) throw new Error(`expected the texts of the page, found ${found.length}`);
  return found.filter(([, , ratio]) => ratio < 4.5);
}"""
SLOW = "() => (window.now = (window.now ?? 0) + 1000)"  # a second passes whenever the page looks
TOO_WIDE = "() => document.documentElement.scrollWidth > document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--host-resolver-rules=MAP elsewhere.test 127.0.0.1"]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tab(browser):
    """The page of all tests: a new one costs three times as much as an address in this one. Each
    server has a port, and so a storage, of its own. ``wrong`` is what its console says that is
    wrong, and requests to elsewhere.
    """
    page, page.wrong = browser.new_context().new_page(), []
    page.set_default_timeout(120_000)  # a machine may be busy
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("console", lambda m: page.wrong.append(m.text) if m.type in ("error", "warning") else 0)
    page.on("request", lambda r: 0 if r.url.startswith(page.origin) else page.wrong.append(r.url))
    return page


@pytest.fixture
def opened(tab):
    """Opens an address, and returns the page and what its console says that is wrong."""

    def opened(url, width=1280):
        tab.origin = "/".join(url.split("/")[:3])
        tab.wrong.clear()
        tab.set_viewport_size({"width": width, "height": 900})
        tab.goto(url)
        return tab, tab.wrong

    yield opened
    tab.unroute_all()
    tab.emulate_media(color_scheme="light")
    tab.origin = "about:"
    tab.goto("about:blank")


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


def send(page, text):
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def says(locator, text):
    from playwright.sync_api import expect

    expect(locator).to_have_text(text, timeout=120_000)


def set_clock(page, function):
    """Let the page read the time, in ms, from a function of JavaScript."""
    page.evaluate(f"() => {{ performance.now = {function}; }}")


def status(page, pattern):
    says(page.locator("#status"), re.compile(pattern))


def more(page, item, at=-1):
    """Choose from the menu of an answer."""
    page.get_by_role("button", name="More about this answer").nth(at).click()
    page.get_by_role("menuitem", name=item).click()


def test_chat(opened, tiny, tmp_path):
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        serve_model(*tiny, feedback=store) as (url, server),
    ):
        script(
            server, f"Hello. {HOSTILE}\n```\ncode <b>\n```", "Second", "Third", "Fourth", "Fifth"
        )
        page, wrong = opened(url)
        examples = page.locator("#examples button")
        examples.last.click()
        assert page.get_by_label("Message", exact=True).input_value() == examples.last.inner_text()
        assert examples.count() == 2 and page.evaluate("document.activeElement.id") == "text"
        send(page, f"Hi {HOSTILE}")
        status(page, r"^\d+ tokens in \d+\.\d s")
        assert page.get_by_text(re.compile("tokens in")).count() == 1
        assert not examples.first.is_visible()
        first = page.get_by_role("article", name="Answer")
        assert HOSTILE in first.locator(".text").inner_text()
        assert first.locator("pre").inner_text() == "code <b>\n"
        assert page.locator("img").count() == 0 and page.evaluate("window.hacked") is None

        consent = page.get_by_label("Store my conversations")
        assert consent.is_visible() and not consent.is_checked()  # no settings to open
        box, line = (page.locator(stored).bounding_box() for stored in ("#text", "#consent-label"))
        assert line["y"] - (box["y"] + box["height"]) >= 4  # the outline of the focus is beside it
        good, bad = (
            page.get_by_role("button", name=f"{stored} answer") for stored in ("Good", "Bad")
        )
        good.click()
        status(page, "stored; the text of the answer is not stored, since there is no consent")
        assert good.get_attribute("aria-pressed") == "true"
        assert bad.get_attribute("aria-pressed") == "false"
        page.get_by_role("button", name="More about this answer").focus()
        for key in ("Enter", "ArrowDown", "ArrowUp", "Enter"):  # Comment, Correct, Comment
            page.keyboard.press(key)
        page.keyboard.type("Write to ann@mail.org")
        page.keyboard.press("Control+Enter")
        page.locator("form.box").wait_for(state="detached")
        more(page, "Correct")
        page.locator("form.box textarea").fill("What it should be")
        page.get_by_role("button", name="Save").click()
        # wait_for_function polls by eval, which the page's Content-Security-Policy refuses
        says(page.locator(".assistant .text").first, "What it should be")
        thumb, comment, corrected = store.all_feedback()
        assert (thumb.thumb, comment.comment) == ("up", "Write to <EMAIL_1>")
        assert corrected.corrected == "What it should be" and not store.responses()

        page.get_by_role("button", name="Regenerate").click()
        page.get_by_text("Second").wait_for()
        status(page, "tokens? in")
        assert page.evaluate("document.activeElement.id") == "text"
        assert page.get_by_text("What it should be").count() == 0
        question = page.get_by_role("article", name="You")
        question.get_by_role("button", name="Edit").click()
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
        page.keyboard.press("Alt+2")
        status(page, "stored, with the conversation")
        picked = store.all_feedback()[-1]
        assert picked.choice == 1 and picked.preferred_over == ((picked.response_id, 0),)
        stored_response = store.responses()[picked.response_id]
        assert [m["role"] for m in stored_response.prompt] == [
            "system",
            "user",
            "assistant",
            "user",
        ]
        assert [c[0]["content"] for c in stored_response.choices] == ["Fourth", "Fifth"]
        assert page.evaluate(NAMELESS) == [] and wrong == []

        older = page.get_by_role("article", name="Answer").first
        page.mouse.move(0, 0)
        opacity = "e => getComputedStyle(e).opacity"  # of what can be done with an older answer
        assert older.locator(".tools").evaluate(opacity) == "0"
        older.hover()
        assert older.locator(".tools").evaluate(opacity) == "1"
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate(PALE) == []
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.get_by_role("button", name="Theme").click()  # auto, then light
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
        for width in (390, 360):
            page.set_viewport_size({"width": width, "height": 740})
            assert not page.evaluate(TOO_WIDE)
            buttons = page.locator("header button").all()
            assert len({button.bounding_box()["y"] for button in buttons}) == 1  # on one line
        page.get_by_role("button", name="New").click()
        assert page.locator("article").count() == 0 and examples.first.is_visible()


def test_markdown(opened, tiny):
    """What models write, as elements; nothing runs, and the time is linear in the length."""
    with serve_model(*tiny) as (url, _):
        page, wrong = opened(url)
        page.evaluate("async () => { window.markdown = await import('/page/markdown.js'); }")
        assert {text: page.evaluate(AS_HTML, text) for text in EXAMPLES} == EXAMPLES

        took = "async (given) => (await import('/page/common.js')).timing(...given)"
        assert page.evaluate(took, [19, 1, 0.03, 0.02]) == "19 tokens in 0.0 s"  # no rate: too few
        assert page.evaluate(took, [400, 1, 0.9, 0.8]) == "400 tokens in 0.9 s"  # in too short
        assert page.evaluate(took, [402, 2, 4.26, 4]) == "402 tokens in 4.3 s, 100.0 tokens/s"

        # as it grows: what is there stays, and is what it would be at once
        grown = page.evaluate(GROWN, "A first paragraph.\n\n" + "\n\n".join(EXAMPLES))
        assert grown == []

        hostile = [
            around.replace("TEXT", text) for text in markdown_cases.HOSTILE for around in AROUND
        ]
        page.evaluate(SHOWN, hostile)
        assert page.evaluate(HARMLESS) == [] and page.evaluate("window.hacked") is None

        metrics = page.context.new_cdp_session(page)
        metrics.send("Performance.enable")

        def seconds():
            times = metrics.send("Performance.getMetrics")["metrics"]
            return next(start["value"] for start in times if start["name"] == "ThreadTime")

        slow = {}
        for part in LONG:
            before = seconds()
            page.evaluate(SHOWN, [part * (200_000 // len(part))])
            slow[part] = seconds() - before
        assert max(slow.values()) < 2 and wrong == [], slow


def test_consent_after_the_answer(opened, tiny, tmp_path):
    """The next feedback sends the text, once; withdrawn consent stays withdrawn, and is told."""
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        serve_model(*tiny, feedback=store) as (url, server),
    ):
        script(server, "An answer")
        page, wrong = opened(url)
        send(page, "Hi")
        status(page, "tokens? in")
        bodies = []
        page.on("request", lambda request: bodies.append(request.post_data or ""))
        page.get_by_label("Store my conversations").check()
        page.get_by_role("button", name="Good answer").click()
        status(page, "stored, with the conversation")
        (stored,) = store.responses().values()
        assert stored.choices == [[{"role": "assistant", "content": "An answer"}]]
        store.forget(stored.response_id)
        page.get_by_role("button", name="Bad answer").click()
        status(page, "not stored, since its consent was withdrawn")
        page.get_by_role("button", name="Good answer").click()
        status(page, "not stored, since its consent was withdrawn")
        assert ["An answer" in body for body in bodies] == [True, False, False]  # sent once
        assert not store.responses() and wrong == []


def test_numbers_for_an_answer(opened, tiny, tmp_path):
    settings = MonitorConfig([
        Rating("stars", "number", "higher", low=1, high=5),
        Rating("solved", "boolean", "higher", "conversation"),
    ])  # fmt: skip
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        serve_model(*tiny, feedback=store, monitoring=settings) as (url, server),
    ):
        script(server, "An answer")
        page, wrong = opened(url)
        send(page, "Hi")
        status(page, "tokens? in")
        more(page, "Rate")
        page.get_by_label("stars (higher is better)").fill("4.5")
        page.get_by_label("solved, of the conversation").select_option("no")
        assert page.evaluate(NAMELESS) == []
        page.get_by_role("button", name="Save").click()
        status(page, "stored")
        (feedback,) = store.all_feedback()
        assert feedback.metrics == (("stars", 4.5), ("solved", 0.0)) and feedback.conversation_id
        more(page, "Rate")
        page.keyboard.press("Escape")
        page.locator("form.box").wait_for(state="detached")
        assert len(store.all_feedback()) == 1 and wrong == []


def test_an_answer_belongs_to_its_conversation(opened, tiny, tmp_path):
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        serve_model(*tiny, feedback=store, pause=0.03) as (url, server),
    ):
        script(server, "old " * 40, "new " * 20, "again " * 20)
        page, wrong = opened(url)
        page.get_by_label("Store my conversations").check()
        send(page, "First")
        page.get_by_text("old old").wait_for()
        page.get_by_role("button", name="New").click()  # while it is written
        send(page, "Second")
        page.get_by_text("new new").wait_for()
        status(page, "tokens? in")
        articles = page.get_by_role("article").all_inner_texts()
        assert len(articles) == 2 and "old" not in "".join(articles)
        (stored,) = store.responses().values()
        assert [m["content"] for m in stored.prompt] == ["Second"]

        page.get_by_role("button", name="Regenerate").click()
        page.get_by_text("again again").wait_for()
        page.get_by_text("new new").wait_for()  # stays until the other one is whole
        page.keyboard.press("Escape")
        status(page, "stopped; the previous answer stays")
        assert page.get_by_role("article").count() == 2
        page.get_by_text("new new").wait_for()
        assert page.evaluate("document.activeElement.id") == "text" and wrong == []


def test_an_answer_that_is_not_complete(opened, tiny):
    with serve_model(*tiny) as (url, server):
        script(server, "word " * 60, "word " * 60)
        page, _ = opened(url)
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Maximum answer length").fill("10")
        send(page, "Hi")
        page.get_by_text("Truncated at 10 tokens").wait_for()
        page.get_by_role("button", name="Answer again with twice as many").click()
        page.get_by_text("Truncated at 20 tokens").wait_for()
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
        status(page, "the answer is incomplete")


def test_a_conversation_longer_than_the_context(opened, tiny):
    _, tokenizer = tiny
    text = "The tree sees the river. "
    text *= 170 // len(tokenizer.encode(text))
    with serve_model(*tiny) as (url, server):
        script(server, "One", "Two", "Three", "Three again")
        page, _ = opened(url)
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Maximum answer length").fill("60")
        for number, request_texts in (("1", "One"), ("2", "Two")):
            send(page, number + text)
            page.get_by_text(request_texts, exact=True).wait_for()
            status(page, "token")
        send(page, "3" + text)
        forget = page.get_by_role("button", name="Forget the oldest turn")
        forget.click()
        page.get_by_text("Three", exact=True).wait_for()
        messages = [a[:1] for a in page.get_by_role("article", name="You").locator(".text")
                 .all_inner_texts()]  # fmt: skip
        assert messages == ["2", "3"] and page.get_by_text("One", exact=True).count() == 0
        page.get_by_role("button", name="New").click()
        send(page, text * 4)  # nothing to forget
        status(page, "model's context")
        assert forget.count() == 0


def test_stop_and_errors(opened, tiny):
    key = "a-key-of-this-server"
    with serve_model(*tiny, pause=0.05, keys=[key]) as (url, server):
        page, _ = opened(url)
        status(page, r"an API key is needed \(Settings\)")
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
            if not server.served_model.engine.stats().running:
                break
            page.wait_for_timeout(50)
        assert server.served_model.engine.stats().finished["cancelled"] == 1
        page.get_by_label("Temperature").fill("7")
        send(page, "Hi")
        status(page, "temperature: expected less than or equal to 2, got 7")


def titles(page):
    return page.locator("#list .title").all_inner_texts()


def test_conversations_are_kept_in_the_browser(opened, tiny):
    with serve_model(*tiny, keys=["a-key-of-this-server"]) as (url, server):
        script(server, *(f"Answer {i}" for i in range(1, 5)))
        page, _ = opened(url)
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("API key").fill("a-key-of-this-server")
        page.keyboard.press("Tab")
        status(page, "^$")
        send(page, f"First {HOSTILE}\nof two lines")
        page.get_by_text("Answer 1").wait_for()
        status(page, "tokens? in")
        page.get_by_role("button", name="New").click()
        send(page, "Second")
        page.get_by_text("Answer 2").wait_for()
        status(page, "tokens? in")
        assert titles(page) == ["Second", f"First {HOSTILE}"[:59] + "…"]

        messages = []

        def note(request):
            messages.append(request)

        page.on("request", note)
        page.reload()
        page.get_by_text("Answer 2").wait_for()
        status(page, "^$")
        page.locator("#list .title").nth(1).click()
        page.get_by_text("Answer 1").wait_for()
        assert page.get_by_role("article", name="You").locator(".text").inner_text() == (
            f"First {HOSTILE}\nof two lines"
        )
        page.get_by_role("button", name="More about Second").click()
        page.get_by_role("menuitem", name="Rename").click()
        page.get_by_label("Name of the conversation").fill(f"Renamed {HOSTILE}")
        page.keyboard.press("Enter")
        assert titles(page)[0] == f"Renamed {HOSTILE}"
        assert page.evaluate("window.hacked") is None and page.locator("img").count() == 0
        assert page.evaluate(NAMELESS) == []
        page.remove_listener("request", note)
        assert [r.url for r in messages if r.method != "GET"] == []  # nothing leaves the browser
        assert "Second" not in "".join(r.url for r in messages)
        storage = page.evaluate("JSON.stringify(localStorage)")
        assert "Answer 1" in storage and "a-key-of-this-server" not in storage

        send(page, "And then?")  # the first conversation continues and becomes the newest
        page.get_by_text("Answer 3").wait_for()
        status(page, "tokens? in")
        assert titles(page)[0].startswith("First")
        # reloaded while an answer is written: the message is not lost
        page.route("**/v1/chat/completions", lambda route: None)
        send(page, "Unanswered")
        status(page, "writing")
        page.reload()
        page.unroute_all()  # not before: the request would go on to the server
        status(page, "The last message has no answer yet")
        assert page.get_by_label("Message", exact=True).input_value() == "Unanswered"
        assert page.get_by_role("article").count() == 4
        page.keyboard.press("Enter")
        page.get_by_text("Answer 4").wait_for()
        status(page, "tokens? in")

        page.evaluate(
            "localStorage.setItem('full',"
            " 'x'.repeat(5 * 2**20 - JSON.stringify(localStorage).length - 200))"
        )
        page.get_by_role("article", name="You").last.hover()
        page.get_by_role("button", name="More about this answer").last.click()
        page.get_by_role("menuitem", name="Correct").click()
        page.locator("form.box textarea").fill("longer " * 100)
        page.keyboard.press("Control+Enter")
        status(page, "Not stored: this browser's storage is full")
        page.evaluate("localStorage.removeItem('full')")

        questions = []
        page.on("dialog", lambda dialog: (questions.append(dialog.message), dialog.accept()))
        page.get_by_role("button", name="More about First").click()
        page.get_by_role("menuitem", name="Delete").click()  # the one that is open
        assert page.get_by_role("article").count() == 0 and titles(page) == [f"Renamed {HOSTILE}"]
        assert "Answer 1" not in page.evaluate("JSON.stringify(localStorage)")
        # another page of this browser
        page.locator("#list .title").click()
        page.get_by_text("Answer 2").wait_for()
        other = page.context.new_page()
        other.goto(page.url)
        other.get_by_text("Answer 2").wait_for()
        other.evaluate(
            "Object.keys(localStorage).filter((key) => key.includes('conversation'))"
            ".forEach((key) => localStorage.removeItem(key))"
        )
        page.get_by_text("Answer 2").wait_for(state="detached")
        other.close()
        assert titles(page) == [] and len(questions) == 1 and "First" in questions[0]


def test_a_server_that_does_not_answer(opened, tiny):
    with serve_model(*tiny) as (url, server):
        script(server, "Answer 1", "Answer 2")
        page, wrong = opened(f"{url}/page/icon.svg")
        page.route("**/v1/**", lambda route: route.abort())
        opened(url)
        status(page, "The server does not answer. Is it running?")
        page.unroute_all()
        retry = page.get_by_role("button", name="Try again")
        retry.click()
        status(page, "^$")
        page.route("**/v1/**", lambda route: route.abort())
        send(page, "Hi")
        status(page, "The server does not answer. Is it running?")
        assert page.get_by_label("Message", exact=True).input_value() == "Hi"
        assert page.get_by_role("article").count() == 0
        page.unroute_all()
        retry.click()
        page.get_by_text("Answer 1").wait_for()
        assert page.get_by_role("article").count() == 2
        page.route("**/v1/**", lambda route: route.fulfill(status=502, body="<html>Bad gateway"))
        page.get_by_role("button", name="Regenerate").click()
        status(page, "Bad Gateway")
        page.unroute_all()
        retry.click()
        page.get_by_text("Answer 2").wait_for()
        assert page.get_by_text("Answer 1").count() == 0
        assert all("Failed to load resource" in line for line in wrong), wrong


def test_a_page_by_http_from_another_machine(opened, tiny):
    """Browsers have neither crypto.randomUUID nor a clipboard there."""
    with serve_model(*tiny) as (url, server):
        script(server, "An answer\n```\nx = 1\n```")
        page, wrong = opened(url.replace("127.0.0.1", "elsewhere.test"))
        assert not page.evaluate("isSecureContext")
        send(page, "Hi")
        page.get_by_text("An answer").wait_for()
        for name, copied in (("Copy answer", "An answer\n```\nx = 1\n```"), ("Copy", "x = 1")):
            page.get_by_role("button", name=name, exact=True).click()
            page.get_by_text("Copied").wait_for()
            page.get_by_label("Message", exact=True).fill("")
            page.keyboard.press("Control+V")
            assert page.get_by_label("Message", exact=True).input_value() == copied
            page.get_by_text("Copied").wait_for(state="detached")
        assert wrong == []


def test_rank(opened, tiny, tmp_path):
    base = tmp_path / "answers.sqlite"
    with RankingStore(base) as store:
        for i in range(2):
            texts = ("first", "second", f"third {HOSTILE}")
            answers = tuple([{"role": "assistant", "content": text}] for text in texts)
            prompt = [{"role": "user", "content": f"Which, {i}? {HOSTILE}"}]
            store.add_items([UnrankedAnswers(prompt, answers)])
    with RankingStore(base) as store, serve_model(*tiny, ranking=store) as (url, _):
        page, wrong = opened(url + "/rank")
        set_clock(page, SLOW)

        def order():
            return [t.split()[0] for t in page.locator("[role=listitem] .text").all_inner_texts()]

        def positions(name, at):
            while (have := order().index(name)) != at:
                page.get_by_role("listitem").nth(have).focus()
                page.keyboard.press("ArrowLeft" if have > at else "ArrowRight")

        for rater in ("Ann", "Bob"):
            page.get_by_label("Your name").fill(rater)
            page.get_by_role("button", name="Start").click()
            page.get_by_role("listitem").first.wait_for()
            for at, name in enumerate(("third", "second", "first")):
                positions(name, at)
            assert order() == ["third", "second", "first"]
            if rater == "Ann":
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
            status(page, "There is nothing left to rank")
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
        ranks = {a[0]["content"].split()[0]: rank for a, rank in zip(ann.answers, ann.ranks)}
        assert ranks == {"third": 0, "second": 1, "first": 1}


def test_label(opened, tmp_path):
    messages = [{"role": "user", "content": f"Which? {HOSTILE}"}]
    rows = [JudgeItem("", messages, (f"good {i} {HOSTILE}", f"bad {i}")) for i in range(8)]
    rubric, path = Rubric.read("pair", None, 4), tmp_path / "labels.jsonl"
    store = LabelStore(make_items(rows), rubric, path)
    key = "a-key-of-this-server"
    with run_server(LabelServer(store, keys=[key])) as url:
        page, wrong = opened(url + "/")
        set_clock(page, SLOW)
        page.get_by_label("Your name").fill("Ann")
        page.get_by_role("button", name="Start").click()
        status(page, "^an API key is needed$")
        wrong.clear()  # the browser's line about the 401
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Start").click()

        def answers(done):
            page.get_by_text(f"Ann: {done}", exact=True).wait_for()
            return page.locator("[role=listitem] .text").all_inner_texts()

        expected = []
        for i, (press, better) in enumerate([("1", 0), ("2", 1), ("=", None)]):
            first, second = answers(f"{i} of 8 labelled, 0 skipped")
            page.keyboard.press(press)
            label = "tie" if better is None else "A" if (first, second)[better][0] == "g" else "B"
            expected.append(label)
        first, _ = answers("3 of 8 labelled, 0 skipped")
        page.keyboard.press("s")
        answers("3 of 8 labelled, 1 skipped")
        page.keyboard.press("b")
        page.get_by_role("listitem").first.get_by_text(first, exact=True).wait_for()
        page.get_by_role("button", name="Equal").click()
        first, _ = answers("4 of 8 labelled, 0 skipped")
        page.get_by_role("button", name="1 is better").click()
        answers("5 of 8 labelled, 0 skipped")
        labels = [json.loads(line)["label"] for line in path.read_text().splitlines()]
        assert labels == [*expected, None, "tie", "A" if first[0] == "g" else "B"]
        assert page.get_by_label("Rubric").inner_text() == rubric.text
        assert page.evaluate("window.hacked") is None and page.locator("img").count() == 0
        page.set_viewport_size({"width": 360, "height": 740})
        assert not page.evaluate(TOO_WIDE)
        assert page.evaluate(NAMELESS) == [] and page.evaluate(PALE) == [] and wrong == []
        page.set_viewport_size({"width": 1280, "height": 720})
        for done in range(5, 8):
            answers(f"{done} of 8 labelled, 0 skipped")
            page.keyboard.press("1")
        status(page, "There is nothing left to label")


CALLS = [{"type": "function", "function": {"name": "stop_3*4*", "arguments": {"city": "Rom"}}}]


def test_label_conversations_from_1_to_10(opened, tmp_path):
    messages = [
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": "", "tool_calls": CALLS},
        {"role": "tool", "content": f"at 3 {HOSTILE}"},
        {"role": "assistant", "content": "I looked.", "tool_calls": CALLS},
        {"role": "user", "content": "And then?"},
    ]
    rows = [JudgeItem("", messages, (f"answer {i}",), turn=2) for i in range(6)]
    rubric, path = Rubric.read("1-10", None), tmp_path / "labels.jsonl"
    with run_server(LabelServer(LabelStore(make_items(rows), rubric, path))) as url:
        page, wrong = opened(url + "/")
        set_clock(page, SLOW)

        def type_keys(*keys):
            for key in keys:
                page.keyboard.press(key)

        def labelled(n):
            page.get_by_text(f"Ann: {n} of 6 labelled, 0 skipped", exact=True).wait_for()

        page.get_by_label("Your name").fill("Ann")
        type_keys("Enter")
        labelled(0)
        # what `message_text` says
        texts = page.locator("#prompt .text").all_text_contents()
        contents = [m["content"] for m in messages]
        assert [text[: len(content)] for text, content in zip(texts, contents)] == contents
        ends = [text[len(content) :] for text, content in zip(texts, contents)]
        assert [json.loads(end) if end else None for end in ends] == [None, CALLS] * 2 + [None]
        assert page.evaluate(PALE) == []

        type_keys("1")
        status(page, "^1: Enter stores it.$")
        type_keys("0")
        status(page, "^10: Enter stores it.$")
        assert not path.read_text()
        type_keys("Enter")
        labelled(1)
        type_keys("Enter", "0", "Enter", "7", "Backspace", "Enter", "7", "8", "Enter")
        labelled(2)
        page.get_by_role("button", name="Skip").focus()  # Enter is about the grade
        type_keys("1", "Enter")
        labelled(3)
        page.get_by_role("button", name="10", exact=True).click()
        labelled(4)
        labels = [json.loads(line)["label"] for line in path.read_text().splitlines()]
        assert labels == [10, 8, 1, 10] and wrong == []


def test_a_label_is_about_the_answer_on_the_page(opened, tmp_path):
    rows = [JudgeItem("", [{"role": "user", "content": "Hi"}], (f"answer {i}",)) for i in range(8)]
    items = {item.id: item.answers[0] for item in make_items(rows)}
    path = tmp_path / "labels.jsonl"
    store = LabelStore(make_items(rows), Rubric.read("pass", None, 4), path)
    with run_server(LabelServer(store)) as url:
        page, wrong = opened(url + "/")

        def labelled(rater, n):
            page.get_by_text(f"{rater}: {n} of 8 labelled, 0 skipped", exact=True).wait_for()

        def stored():
            rows = map(json.loads, path.read_text().splitlines())
            return [(row["rater"], items[row["id"]], row["label"]) for row in rows]

        def hold(name):
            """Return the list of the requests of this name that wait from now on."""
            held = []
            page.route(f"**/v1/label/{name}", lambda route: held.append(route))
            return held

        def press_and_wait(key, held):
            page.keyboard.press(key)
            while not held:
                page.wait_for_timeout(10)

        page.get_by_label("Your name").fill("Ann")
        page.get_by_role("button", name="Start").click()
        labelled("Ann", 0)
        page.keyboard.down("p")
        labelled("Ann", 1)
        for _ in range(3):  # the key is held
            page.keyboard.down("p")
        page.keyboard.up("p")
        page.keyboard.press("f")
        labelled("Ann", 2)
        assert stored() == [("Ann", "answer 0", "pass"), ("Ann", "answer 1", "fail")]

        # Back, while a label is stored that the server then refuses
        held = hold("label")
        press_and_wait("p", held)
        page.keyboard.press("b")
        page.wait_for_timeout(200)
        held[0].fulfill(status=500, json={"error": {"message": "no disk", "code": None}})
        status(page, "Not stored: no disk")
        page.unroute_all()
        answer = page.locator("[role=listitem] .text").inner_text()
        page.keyboard.press("f")
        labelled("Ann", 3)
        assert stored()[2:] == [("Ann", answer, "fail")]

        # another rater, while an item is loaded
        set_clock(page, "() => 1000")
        held = hold("next")
        press_and_wait("p", held)
        page.get_by_label("Your name").fill("Bob")
        page.get_by_role("button", name="Start").click()
        status(page, "Wait for the last request")
        page.wait_for_timeout(200)
        assert len(held) == 1
        held[0].continue_()
        page.unroute_all()
        labelled("Ann", 4)
        set_clock(page, "() => 1499")
        page.get_by_role("button", name="Pass").click()  # the second click of a double click
        status(page, "The item has just appeared")
        page.get_by_role("button", name="Back").click()
        assert len(stored()) == 4
        set_clock(page, "() => 1500")
        page.get_by_role("button", name="Pass").click()
        labelled("Ann", 5)
        page.get_by_role("button", name="Start").click()
        labelled("Bob", 0)
        page.keyboard.press("p")
        labelled("Bob", 1)
        assert stored()[4:] == [("Ann", "answer 4", "pass"), ("Bob", "answer 0", "pass")]
        assert all("Failed to load resource" in line for line in wrong), wrong


def test_dashboard(opened, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "CACHE_SECONDS", 0)  # what is there is seen at once
    key = "a-key-of-this-server"
    stars = Rating("stars", "number", "higher", low=1, high=5)
    alerts = AlertConfig((
        AlertRule(f"refuses {HOSTILE}", "refusal", "1d", above=0.02, consecutive_checks=1),
        AlertRule("slow", "latency_p95", "1d", above=500),
    ))  # fmt: skip
    models = (MODELS[0], f"new {HOSTILE}")
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        serve_model(
            *tiny, feedback=store, monitoring=MonitorConfig([stars], alerts), keys=[key]
        ) as (url, server),
    ):
        page, wrong = opened(url + "/dashboard")
        status(page, "an API key is needed")
        wrong.clear()  # the browser's line about the 401
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Tab")
        page.get_by_text("Too few to compare").wait_for()  # nothing was measured yet
        assert page.locator("figure").count() == 9

        ids = fill_measurements(store, 900, models=models, words=(COOKING, CODE))
        for id in ids[:20]:
            store.add(Feedback(id, metrics=(("stars", 4.0),)))
        server.monitor.alerts.check(time.time())
        page.get_by_role("button", name="Week").click()
        page.get_by_text("the prompts have changed").wait_for()
        firing = page.locator(".alert.firing")
        firing.wait_for()  # one: a reading from before the alert may be shown first
        assert HOSTILE in firing.inner_text()
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
        status(page, "end: expected a time after 2026-01-02")
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
        page.set_viewport_size({"width": 360, "height": 740})
        page.wait_for_timeout(400)  # charts are drawn again
        assert not page.evaluate(TOO_WIDE)


@pytest.mark.parametrize(
    "ago, expected, expected_window",
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
def test_the_dashboard_opens_on_what_has_answers(
    opened, tiny, tmp_path, ago, expected, expected_window
):
    """The shortest period that has some, unless the address names one."""
    with (
        FeedbackStore(tmp_path / "f.sqlite") as store,
        serve_model(*tiny, feedback=store, monitoring=MonitorConfig()) as (url, _),
    ):
        for seed, seconds in enumerate(ago):
            fill_measurements(store, 20, days=0.001, now=time.time() - seconds, seed=seed)
        page, wrong = opened(f"{url}/dashboard{expected}")
        page.wait_for_load_state("networkidle")
        status(page, "updated")
        assert page.locator("#windows [aria-pressed=true]").all_inner_texts() == [expected_window]
        first = page.locator("#table tbody tr").first.locator("td").inner_text()
        assert (first == "0") == (not ago) and wrong == []
