"""The chat page in Chromium, against a real HTTP server that speaks the gateway's contract.

The first half holds for any such server at `base_url`; the second tells it what to answer (page_server.py).
"""

import json
import re
from decimal import Decimal
from importlib.util import find_spec

import pytest

from fulmen.serving.page import FILES, HEADERS
from tests.serving.page.conftest import KEY
from tests.serving.page.page_server import CODE, CONTEXT, HTML, MAX_BODY_BYTES, MODEL, SECONDS

if find_spec("playwright"):
    from playwright.sync_api import expect


def send(page, text):
    page.locator("#question").fill(text)
    page.keyboard.press("Enter")


def answered(page, turn=0):
    """The turn's answer, once it has ended."""
    answer = page.locator(".answer").nth(turn)
    expect(answer).to_have_attribute("aria-busy", "false")
    return answer


KEEP_STREAMS = """() => {
    const ask = window.fetch;
    window.streams = [];
    window.fetch = async (...request) => {
        const response = await ask(...request);
        window.streams.push(response.clone().text());
        return response;
    };
}"""


def usages_of(page, messages):
    """Sends the messages one after the other; returns what the server said in `usage` about each."""
    page.evaluate(KEEP_STREAMS)
    for turn, text in enumerate(messages):
        send(page, text)
        answered(page, turn)
    streams = page.evaluate("Promise.all(window.streams)")
    chunks = [map(json.loads, re.findall(r"^data: (\{.*\})$", stream, re.MULTILINE)) for stream in streams]
    return [next(chunk["usage"] for chunk in stream if chunk.get("usage")) for stream in chunks]


def yuan(amount):
    text = f"{Decimal(amount).normalize():,f}"
    whole, _, fraction = text.partition(".")
    return f"¥{whole}.{fraction.ljust(2, '0')}"


# ---- without a browser -------------------------------------------------------------------------------------


def test_the_page_asks_only_for_files_that_are_served():
    names = {path: file.path.read_text(encoding="utf-8") for path, file in FILES.items()}
    asked = set(re.findall(r'(?:src|href)="(?!data:)([^"]+)"', names["/"]))
    for path, text in names.items():
        if path.endswith(".js"):
            asked |= set(re.findall(r'from "\./([^"]+)";$', text, re.MULTILINE))
    assert {f"/{name}" for name in asked} == set(FILES) - {"/"}


def test_nothing_is_inline_and_the_policy_says_so():
    html = FILES["/"].path.read_text(encoding="utf-8")
    assert not re.search(r"<style|<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=", html)
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
    assert HEADERS["Content-Security-Policy"].startswith("default-src 'none'")


# ---- any server --------------------------------------------------------------------------------------------


def test_figures_are_those_of_usage_and_add_up(page):
    usages = usages_of(page, ["Hello. " * 900, "And now?"])
    for turn, usage in enumerate(usages):
        field = {name: page.locator(".receipt").nth(turn).locator(f'[data-field="{name}"]') for name in (
            "hit", "miss", "output", "cost", "dense", "saving", "read", "inContext", "share")}  # fmt: skip
        fulmen = usage["fulmen"]
        expect(field["hit"]).to_have_text(f"{usage['prompt_cache_hit_tokens']:,}")
        expect(field["miss"]).to_have_text(f"{usage['prompt_cache_miss_tokens']:,}")
        expect(field["output"]).to_have_text(f"{usage['completion_tokens']:,}")
        expect(field["cost"]).to_have_text(yuan(fulmen["cost"]))
        expect(field["dense"]).to_have_text(f"dense {yuan(fulmen['dense_cost'])}")
        less = 100 * (1 - Decimal(fulmen["cost"]) / Decimal(fulmen["dense_cost"]))
        expect(field["saving"]).to_have_text(f"{less:.0f} % less")
        expect(field["read"]).to_have_text(f"{fulmen['tokens_read']:,}")
        expect(field["inContext"]).to_have_text(f"{fulmen['context_tokens']:,}")
        expect(field["share"]).to_have_text(f"{100 * fulmen['tokens_read'] / fulmen['context_tokens']:.2g} %")
    total = {
        name: page.locator(f'#panel [data-total="{name}"]')
        for name in ("hit", "miss", "output", "cost", "dense")
    }
    expect(total["hit"]).to_have_text(f"{sum(usage['prompt_cache_hit_tokens'] for usage in usages):,}")
    expect(total["miss"]).to_have_text(f"{sum(usage['prompt_cache_miss_tokens'] for usage in usages):,}")
    expect(total["output"]).to_have_text(f"{sum(usage['completion_tokens'] for usage in usages):,}")
    expect(total["cost"]).to_have_text(yuan(sum(Decimal(usage["fulmen"]["cost"]) for usage in usages)))
    dense = sum(Decimal(usage["fulmen"]["dense_cost"]) for usage in usages)
    expect(total["dense"]).to_have_text(f"dense {yuan(dense)},")
    expect(page.locator("#context")).to_have_text(
        re.compile(f"{usages[-1]['total_tokens']:,} of [0-9,]+ tokens")
    )


def test_a_phone_scrolls_down_only(open_page):
    page = open_page(viewport={"width": 375, "height": 700}, has_touch=True)
    document = {"name": f"{'long-name-' * 9}.txt", "mimeType": "text/plain", "buffer": b"word" * 90_000}
    page.locator("#file").set_input_files(document)
    expect(page.locator("#attachments li")).to_have_count(1)
    assert too_wide(page) == []
    send(page, "A" * 300 + " " + "Hello. " * 900)
    answered(page)
    assert too_wide(page) == []
    page.get_by_role("button", name="Cost and settings").click()
    expect(page.get_by_label("Temperature")).to_be_in_viewport()
    assert too_wide(page) == []
    page.keyboard.press("Escape")
    expect(page.get_by_label("Temperature")).to_be_hidden()


def too_wide(page):
    return page.evaluate(
        "[...document.querySelectorAll('html, body, #scroll, #panel')]"
        ".filter(e => e.scrollWidth > e.clientWidth).map(e => e.outerHTML.slice(0, 80))"
    )


def test_light_and_dark_follow_the_system_until_told(open_page):
    background = "getComputedStyle(document.body).backgroundColor"
    light, dark = open_page(color_scheme="light"), open_page(color_scheme="dark")
    colors = light.evaluate(background), dark.evaluate(background)
    assert colors[0] != colors[1]
    dark.get_by_role("button", name="Switch between light and dark").click()
    assert dark.evaluate(background) == colors[0]
    dark.reload()
    assert dark.evaluate(background) == colors[0]


def test_text_has_the_contrast_that_reading_needs(page):
    """WCAG AA: 4.5 to 1 for ink, soft and error text on what they stand on; 3 to 1 for the parts of a bar."""
    pairs = [(ink, ground, 4.5) for ink in ("ink", "soft") for ground in ("paper", "card", "tint")]
    pairs += [
        ("bad", "bad-tint", 4.5),
        ("bad", "card", 4.5),
        *((part, "card", 3) for part in ("hit", "miss", "output")),
    ]
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for ink, ground, least in pairs:
            levels = sorted(luminance(page, name) for name in (ink, ground))
            assert (levels[1] + 0.05) / (levels[0] + 0.05) >= least, (scheme, ink, ground)


def luminance(page, name):
    page.locator("body").evaluate("(body, name) => { body.style.color = `var(--${name})`; }", name)
    color = page.evaluate("getComputedStyle(document.body).color")
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_keyboard_alone_reaches_and_does_everything(page):
    page.keyboard.type("first")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second")
    assert page.locator(".turn").count() == 0
    page.keyboard.press("Enter")
    answered(page)
    expect(page.locator(".question .text")).to_have_text("first\nsecond")
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    wanted = {
        "new-chat",
        "theme",
        "scroll",
        "quiet copy",
        "question",
        "attach",
        "send",
        "temperature",
        "max-tokens",
        "key",
    }
    assert wanted <= reached


def test_every_control_has_a_name(page):
    send(page, "Hello")
    answered(page)
    page.locator("#file").set_input_files({"name": "a.txt", "mimeType": "text/plain", "buffer": b"text"})
    expect(page.get_by_role("button", name="Remove a.txt")).to_be_visible()
    nameless = page.evaluate(
        "[...document.querySelectorAll('button, textarea, input:not([type=file])')].filter("
        "e => !e.ariaLabel && !e.labels?.[0]?.textContent.trim() && !e.textContent.trim())"
        ".map(e => e.outerHTML)"
    )
    assert nameless == []


# ---- what the server is told to do -------------------------------------------------------------------------


def test_text_shows_while_the_rest_is_still_to_come(page, server):
    send(page, "hold")
    text = page.locator(".answer > .text")
    expect(text).to_have_text("The first half,")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_hidden()
    server.release.set()
    answered(page)
    expect(text).to_have_text("The first half, and the second.")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_a_letter_that_comes_in_two_pieces_is_one(page, server):
    send(page, "cut")
    expect(page.locator(".answer > .text")).to_have_text("Whole,")
    server.release.set()
    expect(answered(page).locator(".text")).to_have_text("Whole, cut in an ü.")


@pytest.mark.parametrize("by", ["button", "key"])
def test_stop_hangs_up_and_keeps_what_came(page, server, by):
    send(page, "hold")
    expect(page.locator(".answer > .text")).to_have_text("The first half,")
    if by == "key":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    expect(page.locator(".note")).to_contain_text("Stopped")
    assert server.dropped.wait(SECONDS)
    expect(page.locator('[data-total="uncounted"]')).to_have_text("Cut short and not counted: 1")
    expect(page.locator("#error")).to_be_hidden()
    send(page, "go on")
    answered(page, 1)
    assert [message["content"] for message in server.requests[-1]["messages"]] == [
        "hold",
        "The first half, ",
        "go on",
    ]


ERRORS = {
    400: "400: said by the server",
    401: "401: The API key is missing or wrong: enter it under Settings, then send again.",
    402: "402: The balance of this API key is used up: top it up, then send again.",
    422: "422: said by the server",
    429: "429: Too many requests at once with this API key: wait for another answer to end, then send again.",
    500: "500: The server failed at this request: send it again, or tell whoever runs the server.",
    503: "503: The server is busy or starting: wait a moment, then send again.",
}


def test_an_error_is_one_line_and_the_question_is_not_lost(page, server):
    alert = page.get_by_role("alert")
    for status, line in ERRORS.items():
        send(page, f"fail {status}")
        expect(alert).to_have_text(line)
        expect(page.locator("#question")).to_have_value(f"fail {status}")
        assert page.locator(".turn").count() == 0
    send(page, "Hello")
    answered(page)
    expect(alert).to_be_hidden()
    assert [message["content"] for message in server.requests[-1]["messages"]] == ["Hello"]


def test_a_wrong_key_leads_to_its_field(open_page):
    page = open_page(viewport={"width": 375, "height": 700})
    send(page, "fail 401")
    expect(page.get_by_label("API key")).to_be_focused()
    expect(page.get_by_label("API key")).to_be_in_viewport()


def test_the_key_goes_to_the_server_and_stays_in_the_tab(page, server):
    send(page, "Hello")
    answered(page)
    assert server.keys == [f"Bearer {KEY}"]
    assert page.evaluate("JSON.stringify({...localStorage}) + document.cookie") == "{}"
    page.reload()
    expect(page.get_by_label("API key")).to_have_value(KEY)


def test_settings_go_with_the_request_and_wrong_ones_do_not(page, server):
    send(page, "Hello")
    answered(page)
    assert server.requests[-1]["max_tokens"] == 512
    assert "temperature" not in server.requests[-1]
    assert server.requests[-1]["model"] == MODEL
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Max tokens").fill("7")
    send(page, "Hello")
    answered(page, 1)
    assert (server.requests[-1]["temperature"], server.requests[-1]["max_tokens"]) == (0, 7)
    page.get_by_label("Max tokens").fill("-1")
    send(page, "Hello")
    expect(page.get_by_label("Max tokens")).to_be_focused()
    assert len(server.requests) == 2


def test_html_in_an_answer_is_text(page):
    send(page, "html")
    answer = answered(page)
    expect(answer.locator(".text")).to_have_text(re.sub(r"\s+", " ", HTML))
    assert answer.locator(".text :is(img, script, b)").count() == 0
    assert page.title() == f"{MODEL} · fulmen"


def test_code_keeps_its_spaces_and_copy_gives_what_was_written(open_page):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    send(page, "code")
    answer = answered(page)
    code = CODE.split("```")[1].removeprefix("python\n").removesuffix("\n")
    assert answer.locator("pre").text_content() == code
    assert answer.locator(".text > p").all_text_contents() == ["Here it is:", "That is all."]
    for button, wanted in ((".code .copy", code), (".foot .copy", CODE)):
        answer.locator(button).click()
        expect(answer.locator(button)).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == wanted


def test_a_document_goes_first_and_once(page, server):
    text = "A line of a document.\n" * 200
    page.evaluate(
        "text => { const data = new DataTransfer(); data.setData('text/plain', text);"
        "const paste = new ClipboardEvent('paste', {clipboardData: data});"
        "document.getElementById('question').dispatchEvent(paste); }",
        text,
    )
    page.locator("#file").set_input_files(
        {"name": "b.txt", "mimeType": "text/plain", "buffer": b"From a file"}
    )
    expect(page.locator("#attachments li")).to_have_count(2)
    send(page, "What is it?")
    answered(page)
    assert server.requests[0]["messages"] == [
        {"role": "user", "content": f"{text}\n\nFrom a file\n\nWhat is it?"}
    ]
    expect(page.locator("#attachments li")).to_have_count(0)
    send(page, "And?")
    answered(page, 1)
    assert server.requests[1]["messages"][-1]["content"] == "And?"


def test_a_file_that_is_no_text_is_refused(page):
    page.locator("#file").set_input_files({"name": "a.bin", "mimeType": "x/y", "buffer": b"\xff\xfe\x00\x80"})
    expect(page.get_by_role("alert")).to_contain_text("a.bin is not plain text in UTF-8")
    expect(page.locator("#attachments li")).to_have_count(0)


def test_what_the_server_would_refuse_is_refused_before_it_is_sent(page, server):
    """A file by itself, and files that only together are too much for one request."""
    attached, alert = page.locator("#attachments li"), page.get_by_role("alert")

    def attach(name, size):
        file = {"name": name, "mimeType": "text/plain", "buffer": b"a" * size}
        page.locator("#file").set_input_files(file)

    attach("large.txt", MAX_BODY_BYTES + 1)
    expect(alert).to_contain_text("large.txt is larger than 3 MB")
    expect(attached).to_have_count(0)
    for count in (1, 2):
        attach(f"{count}.txt", MAX_BODY_BYTES * 2 // 3)
        expect(attached).to_have_count(count)
    send(page, "What is it?")
    expect(alert).to_contain_text("All in all that is more than 3 MB")
    expect(attached).to_have_count(2)
    assert server.requests == []


def test_a_document_longer_than_the_context_is_marked(page):
    page.locator("#file").set_input_files(
        {"name": "a.txt", "mimeType": "text/plain", "buffer": b"word" * (CONTEXT + 100)}
    )
    expect(page.locator("#attachments .too-long")).to_contain_text("about 8,300 tokens, too long")


def test_an_answer_that_breaks_off_stays_and_says_so(page):
    send(page, "break")
    expect(page.locator(".note")).to_contain_text("broke off")
    expect(page.locator(".answer > .text")).to_have_text("It began")
    expect(page.get_by_role("alert")).to_contain_text("The connection was lost")


def test_a_new_chat_forgets_the_old_one_even_while_it_answers(page, server):
    send(page, "hold")
    expect(page.locator(".answer > .text")).to_have_text("The first half,")
    page.get_by_role("button", name="New chat").click()
    assert server.dropped.wait(SECONDS)
    expect(page.locator("#welcome")).to_be_visible()
    send(page, "Hello")
    answered(page)
    assert [message["content"] for message in server.requests[-1]["messages"]] == ["Hello"]
    assert page.locator(".turn").count() == 1
    expect(page.locator('[data-total="uncounted"]')).to_have_text("")


def test_a_reader_who_scrolled_up_is_left_there(page, server):
    send(page, "long")
    answered(page)
    view = page.locator("#scroll")
    assert view.evaluate("e => e.scrollHeight - e.scrollTop - e.clientHeight") < 2
    send(page, "hold")
    expect(page.locator(".answer > .text").nth(1)).to_have_text("The first half,")
    view.evaluate("e => e.scrollTop = 100")
    server.release.set()
    answered(page, 1)
    assert view.evaluate("e => e.scrollTop") == 100


def test_a_server_that_is_gone_is_named(page, server):
    server.shutdown()
    server.server_close()
    send(page, "Hello")
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached")
    expect(page.locator("#question")).to_have_value("Hello")
