"""The page in a real browser: the whole journey, what goes wrong on it, and what it must never do.

Skipped, saying so, where there is no Chromium.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import programs
import pytest
from conftest import make_base, make_config, make_tokenizer
from serve_helpers import Server, running, wait_for

from t2l.config import PromptConfig
from t2l.serve.guard import Guard
from t2l.serve.limits import Limits

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="the page is NOT tested: there is no Chromium; install one, as by `apt-get install chromium`",
)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
NASTY = "<img src=x onerror=\"document.title='owned'\"> & <b>bold</b>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompt = PromptConfig(description_in_prompt=True)
    return make_checkpoint(tmp_path_factory.mktemp("page") / "checkpoint", prompt=prompt)


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    """Answers never end by themselves, and take their time, so that there is something to stop."""
    model = make_base(make_config())
    model.generation_config.eos_token_id = 999
    model.register_forward_pre_hook(lambda *_: time.sleep(0.004))
    return model, make_tokenizer()


@pytest.fixture(scope="module")
def server(checkpoint: Path, base: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, limits = tmp_path_factory.mktemp("page-store"), Limits(description_bytes=90)
    with running(checkpoint, base, folder, limits=limits) as server:
        yield server


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """A fresh page that may not complain about anything."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: strange(request.url, server.url, complaints))
    page.goto(server.url)
    yield page
    context.close()
    # A request that is refused or cut off is reported by the browser itself, whatever the page makes of it.
    assert [text for text in complaints if "Failed to load resource" not in text] == []


def strange(url: str, own: str, complaints: list[str]) -> None:
    if not url.startswith((own, "data:", "blob:")):
        complaints.append(f"a request to {url}")


def describe(page: Any, text: str) -> str:
    page.get_by_label("What the adapter is for").fill(text)
    page.get_by_role("button", name="Write the adapter").click()
    current = "document.querySelector('#history [aria-current=true] span')?.textContent"
    page.wait_for_function(f"text => {current} === text", arg=text)
    return str(page.locator("#adapter-id").inner_text())


def ask(page: Any, text: str) -> list[str]:
    """The answers in the newest exchange when all have ended."""
    page.get_by_label("Input").fill(text)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_function("() => document.querySelector('#stop').hidden && !document.querySelector('.answer.busy')")
    return list(page.locator("#exchanges > li").first.locator(".answer p").all_inner_texts())


def served(server: Server, model: str, text: str, prompt_from: str, max_tokens: int) -> str:
    body = {"model": model, "prompt_from": prompt_from, "max_tokens": max_tokens, "temperature": 0}
    body["messages"] = [{"role": "user", "content": text}]
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    return str(answer.json()["choices"][0]["message"]["content"])


def shown(text: str) -> str:
    """As a browser gives text back: without control characters' effects."""
    return "".join(text.split())


def test_the_whole_journey(page: Any, server: Server, tmp_path: Path) -> None:
    assert page.locator("#history-empty").is_visible() and not page.locator("#alert").is_visible()
    name = describe(page, "Say yes or no.")
    assert name in [entry["id"] for entry in httpx.get(f"{server.url}/v1/adapters").json()["data"]]
    assert page.locator("#adapter-seconds").inner_text().endswith(("ms", "s"))

    # Base and adapted side by side, and another description's adapter on request: each is what the server says.
    page.get_by_text("Options").click()
    page.get_by_label("Longest answer").fill("12")
    answers = ask(page, "Is it?")
    assert [shown(a) for a in answers] == [shown(served(server, m, "Is it?", name, 12)) for m in ("base", name)]
    page.get_by_label("Also ask the adapter of another description").check()
    page.get_by_label("The other description").fill("Count to ten.")
    answers = ask(page, "Is it?")
    other = httpx.post(f"{server.url}/v1/adapters", json={"description": "Count to ten."}).json()["id"]
    assert [shown(a) for a in answers] == [shown(served(server, m, "Is it?", name, 12)) for m in ("base", name, other)]
    assert page.locator("#exchanges > li").count() == 2

    # Where it acts: a row a module, a column a layer.
    assert page.locator("#norms tbody tr").count() == 2 and page.locator("#norms tbody td").count() == 6
    assert "q_proj, layer 0" in page.locator("#norms td").first.get_attribute("title")

    # Downloads.
    for button, suffix in (("Download for PEFT", "zip"), ("Download GGUF", "gguf")):
        with page.expect_download() as download:
            page.get_by_role("button", name=button).click()
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        assert path.name == f"{name}.{suffix}" and path.stat().st_size > 1000
    assert f"{name}/adapter_config.json" in zipfile.ZipFile(tmp_path / f"{name}.zip").namelist()

    # Another strength is another adapter; the slider goes by keys.
    page.get_by_label("Strength").press("ArrowLeft")
    page.get_by_role("button", name="Write the adapter").click()
    page.wait_for_function("name => document.querySelector('#adapter-id').textContent !== name", arg=name)
    weaker = page.locator("#adapter-id").inner_text()
    assert httpx.get(f"{server.url}/v1/adapters/{weaker}").json()["strength"] == 0.9
    assert page.locator("#adapter-strength").inner_text() == "0.9"
    page.locator("#history [aria-current=true]", has_text="strength 0.9").wait_for()
    httpx.delete(f"{server.url}/v1/adapters/{weaker}")  # another tab does, and this one need not complain
    page.get_by_role("button", name="Delete").click()
    page.locator("#adapter").wait_for(state="hidden")

    # What is there stays there, and can be deleted.
    page.reload()
    page.get_by_role("button", name="Say yes or no.").click()
    page.locator("#adapter").wait_for()
    assert page.get_by_label("Strength").input_value() == "1"
    page.get_by_role("button", name="Delete").click()
    page.locator("#adapter").wait_for(state="hidden")
    assert httpx.get(f"{server.url}/v1/adapters/{name}").status_code == 404
    assert page.get_by_role("button", name="Say yes or no.").count() == 0


def test_errors_are_shown_and_go_away(page: Any) -> None:
    page.get_by_label("What the adapter is for").fill("x" * 91)
    page.get_by_role("button", name="Write the adapter").click()
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "91 bytes; this server reads at most 90" in alert.inner_text()
    page.get_by_role("button", name="Dismiss the error").press("Enter")
    assert not alert.is_visible()
    assert page.get_by_role("button", name="Write the adapter").is_enabled()
    page.route("**/v1/adapters", lambda route: route.abort())
    page.get_by_label("What the adapter is for").fill("fine")
    page.get_by_role("button", name="Write the adapter").click()
    alert.wait_for()
    assert "cannot be reached" in alert.inner_text()


def test_an_answer_that_breaks_off_keeps_what_was_said(page: Any) -> None:
    """A connection that is lost, and a server that says that it stops, are told beside the text so far."""
    describe(page, "Break off.")
    said = 'data: {"choices": [{"index": 0, "delta": {"content": "Half an"}, "finish_reason": null}]}\n\n'
    stopping = 'data: {"error": {"message": "the server is shutting down"}}\n\ndata: [DONE]\n\n'
    for rest, told in (("", "was lost"), (stopping, "shutting down")):
        broken = {"content_type": "text/event-stream", "body": said + rest}
        page.route("**/v1/chat/completions", partial(lambda route, answer: route.fulfill(**answer), answer=broken))
        assert ask(page, "Well?") == ["Half an", "Half an"]
        assert told in page.get_by_role("alert").inner_text()
        assert ", failed" in page.locator(".answer small").first.inner_text()
        page.unroute("**/v1/chat/completions")


def test_a_long_answer_is_stopped(page: Any, server: Server) -> None:
    describe(page, "Go on and on.")
    for stop in (lambda: page.keyboard.press("Escape"), lambda: page.get_by_role("button", name="Stop").click()):
        page.get_by_label("Input").fill("Please do.")
        page.get_by_role("button", name="Ask", exact=True).click()
        page.wait_for_function("() => document.querySelector('.answer.busy p')?.innerText.length > 5")
        stop()
        page.wait_for_function("() => !document.querySelector('.answer.busy')")
        assert "stopped" in page.locator(".answer small").first.inner_text()
        wait_for(lambda: server.service.engine.state["running"] == 0)


def test_what_users_write_is_text(page: Any) -> None:
    describe(page, NASTY)
    page.get_by_text("Options").click()
    page.get_by_label("Longest answer").fill("3")
    ask(page, NASTY)
    assert page.locator(".question").first.inner_text() == NASTY
    assert page.locator("main img, aside img, main b:not(.facts b), aside b").count() == 0
    assert page.title() == "Text-to-LoRA"


def test_by_keyboard_alone(page: Any) -> None:
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the link that skips to the description
    page.keyboard.type("Name a fruit.")
    for _ in range(8):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "describe-button":
            break
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.activeElement.id === 'input'")  # the next thing to do
    page.keyboard.type("Which one?")
    page.keyboard.press("Control+Enter")
    page.locator(".answer").first.wait_for()
    page.wait_for_function("() => document.querySelector('#snippet').innerText.includes('Which one?')")
    page.keyboard.press("Escape")
    page.wait_for_function("() => !document.querySelector('.answer.busy')")
    page.get_by_role("tab", name="curl").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.innerText") == "OpenAI client"
    assert "from openai import OpenAI" in page.locator("#snippet").inner_text()
    assert page.locator(".own h3").inner_text() == "This adapter"
    page.get_by_label("What the adapter is for").fill("Name a tree.")
    page.keyboard.press("Control+Enter")
    page.locator("#history [aria-current=true]", has_text="Name a tree.").wait_for()
    assert page.locator(".own h3").inner_text() == "Adapter of “Name a fruit.”"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_sticks_out(scheme: str, browser: Any, server: Server) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page = context.new_page()
    page.goto(server.url)
    describe(page, "Name a colour, and say it in one word that everybody knows.")
    page.get_by_text("Options").click()
    page.get_by_label("Longest answer").fill("5")
    ask(page, "w" * 200)
    for index in range(5):
        page.get_by_role("tab").nth(index).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.locator("#history button").first.click()
    page.wait_for_function("() => document.querySelector('#adapter').getBoundingClientRect().top >= 0")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    lightness = sum(int(part) for part in ground.removeprefix("rgb(").rstrip(")").split(","))
    assert (lightness > 600) == (scheme == "light")
    context.close()


def test_copied_programs_run(page: Any, server: Server, tmp_path: Path) -> None:
    """curl, the OpenAI client and Transformers give the same answer; the input is full of what shells read."""
    text = 'It\'s "fine": $HOME `x` \\n é'
    name = describe(page, "Say what it's like.")
    page.get_by_label("Input").fill(text)
    page.get_by_label("Input").blur()
    page.wait_for_function("() => document.querySelector('#snippet').innerText.includes('$HOME')")
    for writes, said in (("resolve", "Copied"), ("reject", "Selected, to be copied")):
        page.evaluate(f"() => {{ navigator.clipboard.writeText = () => Promise.{writes}(); }}")
        page.locator("#copy").click()
        page.locator("#copy", has_text=said).wait_for()
    expected = served(server, name, text, name, 64)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}

    def run(title: str, run: Callable[..., Any] = programs.run, *command: str) -> str:
        page.get_by_role("tab", name=title).click()
        code = page.locator("#snippet").text_content()
        done = run([*command, "-c", code], cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    answer = run("curl", partial(subprocess.run, capture_output=True, text=True), "bash")
    assert json.loads(answer)["choices"][0]["message"]["content"] == expected
    assert run("OpenAI client").removesuffix("\n") == expected
    # This one ends at the model's own end token, which the server's copy of the model was told not to know.
    printed = run("Transformers").strip()
    assert printed and expected.strip().startswith(printed)
    for title, words in (("vLLM", "--max-lora-rank 8"), ("llama.cpp", "--lora ")):
        page.get_by_role("tab", name=title).click()
        code = str(page.locator("#snippet").text_content())
        assert words in code and subprocess.run(["bash", "-n", "-c", code]).returncode == 0


def test_a_token_is_asked_for(checkpoint: Path, browser: Any, tmp_path: Path) -> None:
    base = make_base(make_config()), make_tokenizer()
    with running(checkpoint, base, tmp_path, guard=Guard(token="s3cret")) as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(server.url)
        page.get_by_label("Token", exact=True).fill("s3cret")
        page.get_by_role("button", name="Use it").click()
        page.locator("#token-form").wait_for(state="hidden")
        name = describe(page, "Say it.")
        assert "$T2L_TOKEN" in page.locator("#snippet").inner_text() and name.startswith("t2l-")
        context.close()
