"""The pages in headless Chromium.

Whole characters, ratings once, two raters, keyboard only, hostile text shown as text.
"""

import importlib
import json
import os
import shutil
from pathlib import Path

import pytest

import serve
from test_serve import out, serving    # noqa: F401, the fixture too

expect = pytest.importorskip("playwright.sync_api").expect
SHOTS = os.environ.get("SHOTS")         # a folder: the screens are kept there, to be looked at
HOSTILE = ["<img src=x onerror=alert(1)>", "<script>alert(1)</script>",
           "</textarea>&amp;\u202e\x07\x1b[31m", "🐈‍⬛é中" * 4]


@pytest.fixture(scope="module")
def browser():
    playwright = importlib.import_module("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not path:
        pytest.skip("no Chromium here")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def page_at(browser, url, **options):
    """A page that fails the test on any script error, dialog or refused resource."""
    page = browser.new_context(locale="en-US", **options).new_page()
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("dialog", lambda dialog: page.faults.append(dialog.message))
    page.on("console", lambda message: page.faults.append(message.text) if message.type == "error"
            and "status of 4" not in message.text else None)
    page.goto(url)
    return page


def shot(page, name):
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


def say(page, text, settings=()):
    if settings:
        page.get_by_text("Settings").click()
        for id, value in settings:
            page.fill(f"#{id}", value)
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.locator(".retry").wait_for()


def lines(path):
    return ([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists()
            else [])


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_request_and_its_echo_are_text(browser, out, monkeypatch, text):
    """The model is made to say what it was told."""
    monkeypatch.setattr(serve.Choice, "push", echo_of(text))
    with serving(out) as address:
        page = page_at(browser, address)
        say(page, text)
        assert page.locator(".turn.user .text").text_content() == text
        assert page.locator(".turn.assistant .text").text_content() == text
        page.goto(address + "/compare.html")
        page.fill("#text", text)
        page.press("#text", "Enter")
        page.get_by_text("reward").first.wait_for()
        assert page.locator("#columns .text").count() == 2 and page.faults == []


def echo_of(text):
    real = serve.Choice.push

    def push(choice, id, logprob, last, stop_ids):
        real(choice, id, logprob, last, stop_ids)
        choice.reason = "stop" if choice.n_tokens > len(text) else None
        choice.text = choice.text if choice.logprobs else text
        if choice.n_tokens == 1 and logprob:
            choice.logprobs = [(0, ord("x"), -1.0, [])]
        return text[choice.n_tokens - 1:choice.n_tokens] if choice.n_tokens <= len(text) else ""
    return push


def test_streamed_text_is_whole_at_every_moment(browser, out):
    """A watcher notes every state of the reply: none has half a character, each continues the one before."""
    with serving(out) as address:
        page = page_at(browser, address)
        page.evaluate("""() => { window.seen = []; new MutationObserver(() => {
                const last = [...document.querySelectorAll('.turn.assistant .text')].at(-1);
                if (last) window.seen.push(last.textContent);
            }).observe(document.body, {subtree: true, childList: true, characterData: true}); }""")
        for turn in range(3):
            page.evaluate("window.seen = []")
            page.fill("#text", "猫说 🐈")
            page.press("#text", "Enter")
            page.locator(".turn.assistant .tools").nth(turn).wait_for()
            seen = [state for state in page.evaluate("window.seen") if state]
            final = page.locator(".turn.assistant .text").nth(turn).text_content()
            assert all(final.startswith(state) for state in seen)
        shot(page, "chat")
        assert page.faults == []


def test_a_thumb_lands_once_however_often_it_is_pressed(browser, out, tmp_path):
    with serving(out, thumbs=str(tmp_path / "thumbs.jsonl")) as address:
        page = page_at(browser, address)
        say(page, "hello", [("system", "Be brief."), ("max_tokens", "12")])
        up = page.get_by_label("Good reply")
        up.evaluate("button => { button.click(); button.click(); button.click(); }")
        page.get_by_text("noted").wait_for()
        up.click()
        page.get_by_label("Bad reply").click()
        expect(page.get_by_label("Bad reply")).to_have_attribute("aria-pressed", "true")
        found = lines(tmp_path / "thumbs.jsonl")
        assert [r["thumb"] for r in found] == [1, -1]
        assert found[0]["messages"] == [{"role": "system", "content": "Be brief."},
                                        {"role": "user", "content": "hello"}]
        assert found[0]["reply"] == page.locator(".turn.assistant .text").text_content() and page.faults == []


def test_stop_stops_and_retry_asks_again_and_old_turns_are_forgotten(browser, out):
    with serving(out) as address:
        page = page_at(browser, address)
        page.route("**/v1/chat/completions", lambda route: None)       # no answer comes
        page.fill("#text", "hello")
        page.press("#text", "Enter")
        page.click("#stop")
        page.get_by_text("stopped").wait_for()
        page.unroute("**/v1/chat/completions")
        page.locator(".retry").click()
        page.locator(".retry").wait_for()
        assert page.locator(".turn.assistant").count() == 1
        for turn in range(4):
            say(page, "cat " * 12)
            page.locator(".turn.assistant .tools").nth(turn + 1).wait_for()
        assert page.get_by_text("oldest turns").count() >= 1 and page.faults == []


def test_ranking_with_the_keyboard_alone_lands_once_and_can_be_undone(browser, out, tmp_path):
    with serving(out, ratings=str(tmp_path / "r.jsonl")) as address:
        page = page_at(browser, f"{address}/rate.html")
        page.keyboard.type("ada")
        page.keyboard.press("Enter")
        page.locator("#replies li").nth(2).wait_for()
        assert page.locator("#replies script").count() == 0
        shot(page, "rate")
        shown = page.locator("#replies li .text").all_text_contents()
        page.keyboard.type("31=2")
        assert page.locator("#order").text_content() == "3 > 1 = 2"
        page.evaluate("for (let i = 0; i < 3; i++) document.body.dispatchEvent("
                      "new KeyboardEvent('keydown', {key: 'Enter', bubbles: true}))")
        page.get_by_text("1 / 3").wait_for()
        page.keyboard.press("u")
        page.keyboard.type("2")
        page.keyboard.press("Backspace")
        page.keyboard.type("123")
        page.keyboard.press("Enter")
        expect(page.locator("#prompt")).to_contain_text("Say 1")
        page.keyboard.press("1")
        page.keyboard.press("Enter")
        assert "Rank all" in page.locator("#note").text_content()
        found, ids = lines(tmp_path / "r.jsonl"), [f"r{text.split()[1]}" for text in shown]
        assert [r["ranking"] for r in found] == [[[ids[2]], [ids[0], ids[1]]], [[ids[0]], [ids[1]], [ids[2]]]]
        assert ({r["annotator"] for r in found} == {"ada"} and {r["sample"] for r in found} == {"s0"}
                and page.faults == [])


def test_two_raters_at_once_by_choice_and_marks(browser, out, tmp_path):
    with serving(out, ratings=str(tmp_path / "r.jsonl")) as address:
        pages = []
        for name, kind in ("ada", "choice"), ("bo", "rubric"):
            page = page_at(browser, f"{address}/rate.html")
            page.fill("#annotator", name)
            page.select_option("#kind", kind)
            page.press("#annotator", "Enter")
            page.locator("#replies li").first.wait_for()
            pages.append(page)
        for i in range(3):
            pages[0].keyboard.type("=" if i else "2")
            pages[0].keyboard.press("Enter")
            for box in pages[1].locator('#replies input[value="4"]').all():
                box.check()
            if i == 0:
                shot(pages[1], "rubric")
            pages[1].click("#next")
            for page in pages if i < 2 else ():
                expect(page.locator("#count")).to_contain_text(f"{i + 1} / 3")
        for page in pages:
            page.get_by_text("Everything is judged").wait_for()
            assert page.faults == []
    found = lines(tmp_path / "r.jsonl")
    assert sorted((r["annotator"], r["sample"]) for r in found) == [
        (a, f"s{i}") for a in ("ada", "bo") for i in range(3)]
    assert all(len(r["scores"]) == 3 for r in found if r["kind"] == "rubric")


def test_the_pages_speak_chinese_and_fit_a_phone(browser, out):
    with serving(out) as address:
        for name in "", "compare.html", "rate.html":
            page = page_at(browser, f"{address}/{name}", viewport={"width": 360, "height": 740},
                           color_scheme="dark")
            page.locator("header button").click()
            assert page.evaluate("document.documentElement.lang") == "zh"
            assert page.locator("header a[aria-current]").text_content() in ("聊天", "比较", "评分")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert page.locator("[data-say]:empty").count() == 0 and page.faults == []


def test_a_key_that_is_missing_is_said(browser, out):
    with serving(out, api_key="secret") as address:
        page = page_at(browser, f"{address}/rate.html")
        page.fill("#annotator", "ada")
        page.press("#annotator", "Enter")
        page.get_by_text("wrong or missing API key").wait_for()
        page.fill("#key", "secret")
        page.press("#annotator", "Enter")
        page.locator("#replies li").first.wait_for()


def test_a_megabyte_is_refused_in_a_line(browser, out):
    with serving(out) as address:
        page = page_at(browser, address)
        say(page, "x" * 1_100_000)
        assert "larger than" in page.locator(".error").text_content() and page.faults == []
