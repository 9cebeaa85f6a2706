"""The local page in a real browser: how it looks and works.

The browser is chromium (`apt install chromium`), or the one that PLAINGPT_TEST_BROWSER names.
"""

import json
import os
import shutil
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from conftest import save_checkpoint
from pages import EXAMPLES, Site, ended, slow_down, write

from plaingpt.checkpoint import store
from plaingpt.text.templates import CHAT_TEMPLATES
from tools import insight

PHONE = {"viewport": {"width": 400, "height": 700}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that continues texts."""
    return write(tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def site(folder):
    with closing(Site(folder, temperature=1.0)) as found:
        yield found


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("talk"), CHAT_TEMPLATES["chat"])
    with closing(Site(folder, temperature=1.0, seed=1)) as found:
        yield found


@pytest.fixture
def slow(monkeypatch):
    return slow_down(monkeypatch)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    named = os.environ.get("PLAINGPT_TEST_BROWSER")
    path = shutil.which(named or "chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("chromium is not installed")
    # It reaches only this machine.
    options = ["--no-proxy-server", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
    with playwright.sync_playwright() as started:
        sandbox = os.geteuid() != 0
        try:
            opened = started.chromium.launch(
                executable_path=path, args=options, chromium_sandbox=sandbox
            )
        except playwright.Error as error:
            if named:
                raise
            pytest.skip(f"{path} does not start: {str(error).splitlines()[0]}")
        yield opened


@pytest.fixture
def open_page(browser):
    """Open a site in a page of its own; an error on its console fails the test."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    contexts, problems = [], []

    def check(url, own):
        if not url.startswith((own, "data:")):
            problems.append(f"a request to {url}")

    def opened(site, script="", **options):
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(10_000)
        page = context.new_page()
        page.add_init_script(script)
        page.on("dialog", lambda dialog: dialog.accept())
        page.on("request", lambda request: check(request.url, site.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if line.type == "error" else 0)
        page.goto(site.url)
        playwright.expect(page.locator("#send")).to_be_enabled()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [line for line in problems if "status of 4" not in line] == []


def send(page, text: str) -> None:
    page.fill("#text", text)
    page.keyboard.press("Enter")


def start_writing(page, text: str) -> None:
    """Send a text with a temperature that keeps the model going, and wait for its first token."""
    page.click("summary")
    page.fill("#temperature", "1.5")
    send(page, text)
    page.wait_for_selector(".token")


def answered(page) -> None:
    page.wait_for_selector("#send:visible")


def write_on(page, text: str) -> list[str]:
    """Continue a text to its end; returns its tokens."""
    send(page, text)
    page.wait_for_selector(".actions")
    return tokens_of(page)


def tokens_of(page) -> list[str]:
    return page.locator(".token").all_text_contents()


def focused(page) -> str:
    return page.evaluate("document.activeElement.id")


def test_an_answer_that_fails_says_why(folder, open_page):
    with closing(Site(folder)) as site:
        page = open_page(site)
        write_on(page, "Once")
        site.model.transformer.ln_f.bias.data.fill_(float("nan"))
        write_on(page, "upon")
        page.wait_for_selector("#send:visible")
        assert "the model's logits are not finite" in page.inner_text("#problem")


def test_a_page_of_an_earlier_server_asks_to_be_reloaded(folder, open_page):
    with closing(Site(folder)) as site:
        page = open_page(site)
    with closing(Site(folder, port=site.port, temperature=0.5)) as site:
        send(page, "Once")
        page.wait_for_selector("#problem:has-text('reload the page')")
        assert page.input_value("#text") == "Once"
        page.reload()
        write_on(page, "Once")


def test_a_conversation_streams_into_the_page(talk, slow, open_page):
    page = open_page(talk)
    send(page, "Hello?")
    page.wait_for_selector(".answer .token")
    assert page.locator("#stop").is_visible()  # there is more to come
    answered(page)
    first = page.inner_text(".answer")
    assert len(first) > 3 and page.inner_text(".asked") == "Hello?"
    send(page, "And then?")
    answered(page)
    assert page.locator(".asked").count() == page.locator(".answer").count() == 2
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json))
    send(page, "And?")
    answered(page)
    roles = [message["role"] for message in sent[0]["messages"]]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
    assert sent[0]["messages"][1]["content"] == first.removesuffix(" ∎")
    page.locator(".prompt summary").first.click()
    page.wait_for_selector(".prompt .token")
    prompt = page.locator(".prompt").first.locator(".token").all_text_contents()
    assert "".join(prompt) == "### User:\nHello?\n\n### Assistant:\n"  # what the model read
    page.click("#reset")
    assert page.inner_text("#log") == ""


def test_reset_forgets_the_answer_that_is_being_drawn(talk, slow, open_page):
    page = open_page(talk)
    send(page, "Secret?")
    page.wait_for_selector(".answer .token")
    page.click("#reset")
    answered(page)
    with page.expect_request("**/answer") as asked:
        send(page, "Hello?")
    assert asked.value.post_data_json["messages"] == [{"role": "user", "content": "Hello?"}]
    assert "Secret" not in page.inner_text("#log")


def test_defaults_of_any_size_can_be_sent(folder, open_page):
    with closing(Site(folder, temperature=0.75, top_p=0.955)) as site:
        page = open_page(site)
        send(page, "Once")
        page.wait_for_selector(".token")
        page.click("summary")
        page.fill("#temperature", "-1")
        answered(page)
        send(page, "upon")
        page.wait_for_selector(".error")
        assert "temperature must be 0, or at least 0.001" in page.inner_text(".error")


def test_a_click_shows_what_was_considered(talk, open_page):
    page = open_page(talk)
    send(page, "Hello?")
    answered(page)
    token = page.locator(".answer .token").first
    token.click()
    rows = page.locator("#considered tr")
    assert rows.count() >= insight.ALTERNATIVES
    assert page.inner_text("#considered tr.chosen td:first-child").strip() == token.inner_text()
    assert page.inner_text("#considered tr:first-child td:last-child").endswith("%")
    page.keyboard.press("ArrowRight")
    second = page.locator(".answer .token").nth(1)
    assert second.get_attribute("aria-current") == "true"
    assert page.inner_text("#considered tr.chosen td:first-child").strip() == second.inner_text()


def test_a_text_is_continued_and_stopped(site, slow, open_page):
    page = open_page(site)
    start_writing(page, "Once upon")
    page.click("#stop")
    answered(page)
    assert 0 < page.locator(".token").count() < 30
    assert ended(slow) < 30
    before = page.inner_text(".continued")
    send(page, "")
    answered(page)
    assert page.inner_text(".continued").startswith(before)


def test_leaving_the_page_stops_the_work(site, slow, open_page):
    page = open_page(site)
    start_writing(page, "Once")
    page.close()
    assert ended(slow) < 30


def test_an_error_is_shown_and_the_question_kept(talk, open_page):
    page = open_page(talk)
    page.fill("#text", "long " * 300)
    page.keyboard.press("Enter")
    page.wait_for_selector(".error")
    assert "too long: " in page.inner_text(".error")
    assert page.input_value("#text").startswith("long ")
    assert page.locator(".asked").count() == 0
    send(page, "short")
    page.wait_for_selector(".answer .token")


def test_what_the_model_writes_is_text_not_markup(folder, tmp_path, open_page):
    model = store.load_model(folder)
    with torch.no_grad():  # it writes only <
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[ord("<")] * 1e4)
    markup = save_checkpoint(tmp_path, model)
    with closing(Site(markup)) as site:
        page = open_page(site)
        send(page, "<img src=x onerror=alert(1)>")
        answered(page)
        assert page.inner_text(".continued").startswith("<img src=x onerror=alert(1)><<<<")
        assert page.locator("img").count() == 0


def test_a_token_of_markup_is_text_wherever_it_is_shown(talk, open_page):
    markup = "<img src=x onerror=alert(1)>"
    token = {"id": 60, "text": markup, "token": markup, "probability": 0.5}
    token |= {"alternatives": [[60, markup, 0.5], [61, markup, 0.4]], "end": "length"}
    start = {"prompt": [[60, markup]], "forgotten": 0, "seed": 1}
    reply = json.dumps(start) + "\n" + json.dumps(token) + "\n"
    page = open_page(talk)
    page.route("**/answer", lambda route: route.fulfill(body=reply))
    send(page, markup)
    page.wait_for_selector(".actions")
    page.click(".prompt summary")
    page.wait_for_selector(".prompt .token")
    page.click(".answer .token")
    page.click("#attend")
    page.wait_for_selector(".head")
    assert page.locator("body").inner_text().count("onerror") >= 6
    page.click("#past")
    assert page.inner_text("#entries").count("onerror") == 2
    assert page.locator("img").count() == 0


@pytest.mark.parametrize("scheme, paper", [("light", "253, 253, 251"), ("dark", "22, 24, 26")])
@pytest.mark.parametrize("width, columns", [(375, 1), (1280, 2)])
def test_light_and_dark_narrow_and_wide(talk, open_page, tmp_path, scheme, paper, width, columns):
    page = open_page(talk, color_scheme=scheme, viewport={"width": width, "height": 700})
    send(page, "Hello?")
    answered(page)
    page.locator(".answer .token").nth(2).click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == f"rgb({paper})"
    columns_there = page.evaluate("getComputedStyle(document.body).gridTemplateColumns").split()
    assert len(columns_there) == columns
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # fits
    for part in ("#text", "#considered", "#log", "#send"):
        box = page.locator(part).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width, part
        assert box["y"] >= 0 and box["y"] < 700, part
    shots = Path(os.environ.get("PLAINGPT_TEST_SHOTS", tmp_path))
    page.screenshot(path=shots / f"{scheme}_{width}.png")


# --- starting, settings, and other versions of a text


@pytest.mark.parametrize("kind", ["site", "talk"])
def test_an_example_starts_with_one_click(kind, request, open_page):
    page = open_page(request.getfixturevalue(kind))
    buttons = page.locator("#examples button")
    assert buttons.all_text_contents() == EXAMPLES
    assert page.locator("#examples b").count() == 0
    buttons.first.click()
    page.wait_for_selector(".actions")
    assert not page.locator("#welcome").is_visible()
    assert page.inner_text("#log").startswith(EXAMPLES[0])
    page.click("#reset")
    assert page.locator("#welcome").is_visible()


def test_settings_are_sent_and_kept_with_each_answer(site, open_page):
    page = open_page(site)
    page.click("#settings summary")
    wanted = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": None}
    wanted["repetition_penalty"] = 1.1
    for name, value in wanted.items():
        page.fill(f"#{name}", "" if value is None else str(value))
    with page.expect_request("**/answer") as asked:
        first = write_on(page, "Once")
    assert wanted.items() <= asked.value.post_data_json.items()
    line = page.locator(".actions button").last
    shown = "temperature 1.5 · top-k 40 · top-p 0.9 · min-p 0.01 · repetition-penalty 1.1 · seed "
    assert shown in line.inner_text()
    page.fill("#top_k", "")
    page.fill("#repetition_penalty", "")
    with page.expect_request("**/answer") as asked:
        page.click("text=Regenerate")
    answered(page)
    assert asked.value.post_data_json["repetition_penalty"] == 1
    assert "penalty" not in page.locator(".actions button").last.inner_text()
    assert tokens_of(page) != first  # another seed
    page.click("#past")  # the first version
    page.locator("#entries button").nth(1).click()
    assert tokens_of(page) == first
    page.locator(".actions button").last.click()
    assert page.input_value("#top_k") == "40" and page.input_value("#seed").isdigit()
    assert page.input_value("#repetition_penalty") == "1.1"
    page.click("text=Regenerate")
    answered(page)
    assert tokens_of(page) == first
    page.fill("#top_k", "0")
    page.click("text=Regenerate")
    page.wait_for_selector(".error:visible")
    assert "top_k must be at least 1, not 0" in page.inner_text(".error")
    assert tokens_of(page) == first  # as before


def test_a_text_goes_on_from_any_token(site, open_page):
    page = open_page(site)
    first = write_on(page, "Once")
    page.locator(".token").nth(9).click()
    other = page.locator("#considered tr:not(.chosen) .choice").nth(3)
    chosen = other.inner_text()
    other.click()
    assert page.locator(".token").nth(9).inner_text() == chosen
    answered(page)
    now = tokens_of(page)
    assert now[:10] == [*first[:9], chosen] and len(now) > 10
    assert page.inner_text("#considered tr.chosen td:first-child") == chosen
    page.locator(".token").nth(2).click()  # within the prompt
    page.click("#go-on")
    answered(page)
    assert tokens_of(page)[:3] == first[:3] and tokens_of(page) != now
    page.locator(".token").nth(6).click()
    page.click("#again")
    answered(page)
    assert not page.locator("#panel").is_visible()
    page.click("#past")  # all versions are there
    assert page.locator("#entries button").count() == 4
    page.locator("#entries button").nth(3).click()
    assert tokens_of(page) == first


def test_an_answer_goes_on_from_any_token(talk, open_page):
    page = open_page(talk)
    for question in ("Hello?", "And?"):
        send(page, question)
        page.wait_for_selector("text=Regenerate")
    answers = page.locator(".answer")
    before = answers.nth(0).locator(".token").all_text_contents()
    answers.nth(0).locator(".token").nth(1).click()
    page.locator("#considered tr:not(.chosen) .choice").nth(5).click()
    answered(page)
    assert page.locator(".asked").all_inner_texts() == ["Hello?"]  # the rest followed from it
    after = page.locator(".answer .token").all_text_contents()
    assert after[0] == before[0] and after[1] != before[1]
    page.click("text=What the model read")
    page.locator(".prompt .token").nth(3).click()
    page.wait_for_selector("#considered tr")
    assert page.locator("#considered .choice").first.is_disabled()
    assert not page.locator("#go-on").is_visible()
    page.click("text=Edit")
    assert page.input_value("#text") == "Hello?" and page.inner_text("#log") == ""


def test_copy_and_edit(site, open_page):
    page = open_page(site, permissions=["clipboard-read", "clipboard-write"])
    write_on(page, "Once")
    text = page.locator(".continued").inner_text().removesuffix(" ∎")
    page.click("text=Copy")
    page.wait_for_selector("text=Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == text
    page.click("text=Edit")
    assert page.input_value("#text") == text and page.inner_text("#log") == ""
    page.evaluate("void (navigator.clipboard.writeText = () => Promise.reject(new Error('no')))")
    write_on(page, "Twice")
    page.click("text=Copy")
    page.wait_for_selector("text=does not let this page copy")


# --- what surprised it, and where it looked


def test_the_tokens_of_a_prompt_show_their_surprise(site, open_page):
    page = open_page(site)
    asked = []
    page.on("request", lambda request: asked.append(request.url.rpartition("/")[2]))
    write_on(page, "Once upon")
    assert asked == ["answer"]
    token = page.locator(".token.given").nth(1)
    assert token.get_attribute("title") is None
    token.click()
    page.wait_for_selector("#considered tr")
    assert asked == ["answer", "score"]
    assert "bits of surprise" in page.inner_text("#hint")
    assert page.inner_text("#considered tr.chosen").startswith("n")
    page.check("#shade")
    assert page.locator("#legend").is_visible()
    titles = page.eval_on_selector_all(".token", "all => all.map(token => token.title)")
    assert titles[0] == "the first token" and all("bits" in title for title in titles[1:])
    shade = "getComputedStyle(document.querySelectorAll('.token')[1]).backgroundColor"
    assert page.evaluate(shade) != "rgba(0, 0, 0, 0)"
    page.locator(".token").first.click()
    assert "The first token" in page.inner_text("#hint") and asked == ["answer", "score"]


def test_attention_is_drawn_when_asked_for(site, open_page):
    page = open_page(site)
    asked = []
    page.on("request", lambda request: asked.append(request.url.rpartition("/")[2]))
    tokens = write_on(page, "Once upon")
    page.locator(".token").nth(12).click()
    assert "attention" not in asked and not page.locator("#attention").is_visible()
    with page.expect_response("**/attention") as answer:
        page.click("#attend")
    weights = answer.value.json()["weights"]
    page.wait_for_selector(".head")
    cells = page.locator(".head")
    assert cells.count() == 4 and len(weights[1][1]) == 13
    assert page.locator(".head[aria-pressed=true]").count() == 1
    cells.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    last = cells.last
    assert last.get_attribute("aria-pressed") == "true"
    assert last.evaluate("cell => cell === document.activeElement")
    assert page.inner_text("#head-title").startswith("Layer 2, head 2: ")
    assert page.locator("#looks span").all_text_contents() == tokens[:13]
    share = float(last.get_attribute("aria-label").split()[-1].removesuffix("%"))
    assert share == pytest.approx(100 * max(weights[1][1]), abs=0.51)
    page.locator(".token").nth(3).click()  # another token: what is drawn would be stale
    assert not page.locator("#attention").is_visible()


# --- the history


def test_the_history_survives_a_reload_and_can_be_cleared(site, open_page):
    page = open_page(site)
    write_on(page, "Once")
    page.click("#reset")
    second = write_on(page, "Twice")
    page.reload()
    page.wait_for_selector(".actions")
    assert tokens_of(page) == second
    page.click("#past")
    assert "this machine only" in page.inner_text("#kept")
    entries = page.locator("#entries button")
    assert entries.count() == 2 and entries.nth(1).inner_text().startswith("Once")
    entries.nth(1).click()
    assert "".join(tokens_of(page)).startswith("Once")
    page.locator(".token").nth(6).click()  # alternatives are asked for again
    page.wait_for_selector("#considered tr.chosen")
    page.click("#past")
    page.click("#clear")
    assert page.inner_text("#entries") == "Nothing yet."
    page.reload()
    page.wait_for_selector("#welcome:visible")
    assert page.evaluate("localStorage.length") == 0


BLOCKED = """Object.defineProperty(window, "localStorage",
    { get() { throw new DOMException("blocked", "SecurityError") } })"""
FULL = """Storage.prototype.setItem =
    () => { throw new DOMException("full", "QuotaExceededError") }"""


@pytest.mark.parametrize("script", [BLOCKED, FULL], ids=["blocked", "full"])
def test_without_storage_the_history_lasts_as_long_as_the_page(site, open_page, script):
    page = open_page(site, script)
    write_on(page, "Once")
    page.click("#reset")
    write_on(page, "Twice")
    page.click("#past")
    assert "the history ends when the page is closed" in page.inner_text("#kept")
    page.locator("#entries button").nth(1).click()
    assert "".join(tokens_of(page)).startswith("Once")


def test_a_damaged_history_is_left_out(site, open_page):
    other = {"tokenizer": "another", "chat": False, "turns": []}
    page = open_page(site)
    for content in ("{", "3", json.dumps([1, None, {"turns": 3}, other])):
        page.evaluate(stored(content))
        page.reload()
        page.wait_for_selector("#welcome:visible")
        page.click("#past")
        assert page.inner_text("#entries") == "Nothing yet."
    write_on(page, "Once")
    assert page.locator("#entries button").count() == 1


def stored(content: str) -> str:
    return f"localStorage.setItem('plaingpt.history', {json.dumps(content)})"


# --- small screens, the keyboard, long texts


def test_the_panel_closes_on_a_phone(talk, open_page):
    page = open_page(talk, **PHONE)
    send(page, "Hello?")
    page.wait_for_selector(".actions")
    token = page.locator(".answer .token").nth(2)
    for close in (lambda: page.click("#close"), lambda: page.keyboard.press("Escape")):
        token.press("Enter")
        assert page.locator("#panel").is_visible() and focused(page) == "panel-title"
        assert page.locator("#log").bounding_box()["height"] > 100
        close()
        assert not page.locator("#panel").is_visible()
        assert token.evaluate("span => span === document.activeElement")
    page.click("#past")
    page.keyboard.press("Escape")
    assert focused(page) == "past"
    token.click()
    page.click("#reset")
    assert not page.locator("#panel").is_visible()


def test_nothing_stale_appears_after_reset(site, slow, open_page):
    page = open_page(site)
    send(page, "Secret")
    page.wait_for_selector(".token:nth-child(9)")
    page.locator(".token").nth(7).click()
    page.click("#reset")
    assert page.inner_text("#log") == page.inner_text("#problem") == ""
    send(page, "Next")  # at once
    page.wait_for_selector(".actions")
    assert "".join(tokens_of(page)).startswith("Next")
    assert "Secret" not in page.inner_text("body")
    assert len(slow) < 2 * 30  # the first answer was not finished
    page.click("#past")  # but it is not lost
    assert page.locator("#entries button").nth(1).inner_text().startswith("Secret")


def test_everything_works_with_the_keyboard_alone(site, open_page):
    page = open_page(site)
    press, focus = page.keyboard.press, "document.activeElement."
    page.keyboard.type("Once upon")
    press("Enter")
    page.wait_for_selector(".actions")
    while "token" not in page.evaluate(focus + "className"):
        press("Shift+Tab")  # from the text box back to the text
    for key in ("ArrowRight", "ArrowRight", "Enter"):
        press(key)
    page.wait_for_selector(".choice")
    assert focused(page) == "panel-title"
    while "choice" not in page.evaluate(focus + "className"):
        press("Tab")
    chosen = page.evaluate(focus + "textContent")
    press("Enter")
    answered(page)
    assert tokens_of(page)[2] == chosen
    unnamed = page.eval_on_selector_all(
        "button, input, textarea, summary",
        """all => all.filter(each => each.checkVisibility() && !(each.ariaLabel ||
            each.textContent.trim() || each.labels?.[0]?.textContent.trim()))""",
    )
    assert unnamed == []


def test_nothing_moves_for_those_who_prefer_it(site, slow, open_page):
    moves = "getComputedStyle(document.querySelector('.waiting'), '::after').animationName"
    for motion, name in (("reduce", "none"), ("no-preference", "blink")):
        page = open_page(site, reduced_motion=motion)
        send(page, "Once")
        page.wait_for_selector(".waiting")
        assert page.evaluate(moves) == name


def test_long_texts_stay_fast(site, open_page):
    ids = list(b"words and words ") * 300  # 4,800 tokens
    packed = {"ids": ids, "texts": list(bytes(ids).decode())}
    about = site.ask("", "/model", "GET")[1][0]
    turn = {"given": packed, "drawn": {"ids": [], "texts": []}, "from": 0}
    turn["settings"] = {"temperature": 1, "max_new_tokens": 5}
    entry = {"id": "long", "time": 0, "turns": [turn]}
    entry |= {name: about[name] for name in ("tokenizer", "chat")}
    page = open_page(site, stored(json.dumps([entry])))
    page.click("#past")
    began = time.monotonic()
    page.click("#entries button")
    page.wait_for_selector(".actions")
    page.locator(".token").last.click()
    page.wait_for_selector("#considered tr")
    page.keyboard.press("ArrowLeft")
    send(page, " and")
    page.wait_for_selector("text=no longer sees the first 4,")
    assert page.locator(".token").count() > 4800
    assert time.monotonic() - began < 5
