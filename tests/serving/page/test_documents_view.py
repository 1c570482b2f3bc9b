"""The page's view of the served documents, in Chromium, against a server that answers from a script."""

import re
from importlib.util import find_spec

import pytest

from tests.serving.page.conftest import KEY
from tests.serving.page.page_server import AFTER, BEFORE, HTML, MODEL, QUOTE, SECONDS

if find_spec("playwright"):
    from playwright.sync_api import expect


@pytest.fixture
def view(page):
    """The page with the documents' view open."""
    page.get_by_role("button", name="Documents").click()
    expect(page.locator("#document-question")).to_be_focused()
    return page


def ask(page, text):
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def answered(page, turn=0):
    answer = page.locator("#documents .answer").nth(turn)
    expect(answer).to_have_attribute("aria-busy", "false")
    return answer


def test_steps_and_the_bill_show_while_the_rest_is_still_to_come(view, server):
    ask(view, "hold")
    answer = view.locator("#documents .answer")
    step = answer.locator(".step")
    expect(step).to_have_count(1)
    expect(step).to_have_text(
        re.compile(r"search\s+query: ships\s+2 passages, best first \(1,234 characters\)")
    )
    expect(answer.locator("summary")).to_have_text("1 step")
    expect(answer.locator('[data-field="hit"]')).to_have_text("600")
    expect(answer.locator('[data-field="cost"]')).to_have_text("¥0.0005")
    expect(view.locator('[data-total="cost"]')).to_have_text("¥0.0005")
    expect(view.get_by_role("button", name="Stop")).to_be_visible()
    server.release.set()
    answered(view)
    expect(answer.locator(".step")).to_have_count(2)
    expect(answer.locator('[data-field="hit"]')).to_have_text("1,800")
    expect(answer.locator('[data-field="miss"]')).to_have_text("1,200")
    expect(answer.locator('[data-field="cost"]')).to_have_text("¥0.0015")
    expect(answer.locator('[data-field="dense"]')).to_have_text("dense ¥0.006")
    expect(answer.locator('[data-field="saving"]')).to_have_text("75 % less")
    expect(answer.locator('[data-field="listed"]')).to_have_text("¥0.00285")
    expect(answer.locator(".note")).to_contain_text("1 quote left out")
    assert (server.questions, server.keys) == (
        [{"question": "hold", "max_new_tokens": 512}],
        [f"Bearer {KEY}"],
    )


def test_a_citation_opens_its_place_and_nothing_of_a_document_is_markup(view):
    ask(view, "What?")
    answer = answered(view)
    expect(answer.locator(".text")).to_have_text(f"Forty-two {HTML}")
    expect(answer.locator(".citation .place")).to_have_text("a/guide.md:61")
    answer.locator(".citation").focus()
    view.keyboard.press("Enter")
    excerpt = view.get_by_role("dialog")
    expect(excerpt).to_be_visible()
    expect(excerpt.locator("#excerpt-lines")).to_have_text("Lines 61 to 62")
    assert excerpt.locator("pre").text_content() == BEFORE + QUOTE + AFTER
    assert excerpt.locator("mark").text_content() == QUOTE
    expect(excerpt.locator("mark")).to_be_in_viewport()
    view.keyboard.press("Escape")
    expect(excerpt).to_be_hidden()
    expect(answer.locator(".citation")).to_be_focused()
    answer.locator("summary").click()
    expect(answer.locator(".step").nth(1)).to_be_visible()
    expect(answer.locator(".step").nth(1)).to_contain_text(HTML)
    assert view.locator("#documents .answer :is(img, script)").count() == 0
    assert view.locator("#excerpt :is(img, script)").count() == 0
    assert view.title() == f"{MODEL} · fulmen"


@pytest.mark.parametrize("by", ["button", "key"])
def test_stop_hangs_up_and_keeps_the_steps(view, server, by):
    ask(view, "hold")
    expect(view.locator("#documents .step")).to_have_count(1)
    if by == "key":
        view.keyboard.press("Escape")
    else:
        view.get_by_role("button", name="Stop").click()
    expect(answered(view).locator(".note")).to_contain_text("Stopped")
    assert server.dropped.wait(SECONDS)
    expect(view.locator("#document-error")).to_be_hidden()
    expect(view.locator('[data-total="uncounted"]')).to_have_text("Cut short and not counted: 1")


def test_an_error_is_one_line_and_the_question_is_not_lost(view):
    alert = view.get_by_role("alert")
    for script, line in (("fail 422", "422: said by the server"), ("fail 402", "402: The balance")):
        ask(view, script)
        expect(alert).to_contain_text(line)
        expect(view.locator("#document-question")).to_have_value(script)
        assert view.locator("#documents .turn").count() == 0
        view.locator("#document-question").clear()
    for turn, (script, note, line) in enumerate(
        (
            ("error", "There is no answer", "no answer in 2 steps; ask otherwise"),
            ("break", "broke off", "The connection was lost"),
        )
    ):
        ask(view, script)
        expect(answered(view, turn).locator(".note")).to_contain_text(note)
        expect(alert).to_contain_text(line)
    expect(view.locator('[data-total="uncounted"]')).to_have_text("Cut short and not counted: 1")
    expect(view.locator('[data-total="hit"]')).to_have_text("1,800")


def test_each_view_keeps_what_it_has(view):
    ask(view, "What?")
    answered(view)
    view.get_by_role("button", name="Chat").click()
    expect(view.locator("#question")).to_be_focused()
    expect(view.locator('[data-total="cost"]')).to_have_text("¥0.00")
    view.get_by_role("button", name="Documents").click()
    expect(view.locator('[data-total="cost"]')).to_have_text("¥0.0015")
    expect(view.locator("#documents .turn")).to_have_count(1)
    view.reload()
    expect(view.locator("#document-question")).to_be_focused()
    expect(view.locator("#document-folder")).to_have_text("3 documents in harbour")


def test_a_phone_scrolls_down_only(open_page):
    page = open_page(viewport={"width": 360, "height": 640}, has_touch=True)
    page.get_by_role("button", name="Documents").click()
    ask(page, "A" * 300)
    answered(page)
    page.locator("#documents summary").click()
    assert too_wide(page) == []
    page.locator(".citation").click()
    expect(page.locator("mark")).to_be_in_viewport()
    assert too_wide(page) == []


def too_wide(page):
    return page.evaluate(
        "[...document.querySelectorAll('html, body, .top, #document-scroll, #excerpt, #excerpt-text')]"
        ".filter(e => e.scrollWidth > e.clientWidth).map(e => e.outerHTML.slice(0, 80))"
    )
