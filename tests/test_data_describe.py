"""More descriptions from a chat endpoint, a real HTTP server here."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from data_helpers import own_rows, t2l, write_jsonl

from t2l import endpoint
from t2l.errors import ConfigError, DataError, DownloadError
from t2l.tasks import Example, Task, load_descriptions, load_own, load_splits

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
from t2l.data import describe  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_cache")


TRAIN, TEST = sorted(load_splits().train)[:2], min(load_splits().test)


class Stub:
    """A chat endpoint on this machine: each request takes the next of `answers`, the last one for ever."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append((self.path, dict(self.headers), body))
                answer = stub.answers.pop(0) if len(stub.answers) > 1 else stub.answers[0]
                if answer == "hang up":
                    self.connection.close()
                    return
                status, headers, text = answer
                if callable(text):
                    text = text(len(stub.requests), self.headers)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                """Hanging up is no error here."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    yield server
    server.close()


def says(text: str | Callable[[int, Any], str]) -> tuple[int, dict[str, str], Any]:
    def body(number: int, headers: Any) -> str:
        content = text(number, headers) if callable(text) else text
        return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})

    return 200, {}, body


FRESH = says(lambda n, _: "Here they are:\n```json\n" + json.dumps([f"Wording {n}-{i}." for i in range(4)]) + "\n```")
KEY = "sk-very-secret-0123456789"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    hidden = [own_rows("one", 1, split="test")[0] | {"input": "a hidden test input"}]
    return write_jsonl(tmp_path / "own.jsonl", own_rows("one") + own_rows("two") + own_rows("three") + hidden)


def test_describe_writes_a_line_for_each_task(
    stub: Stub, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(endpoint.KEY_VARIABLE, KEY)
    stub.answers = [FRESH]
    out = tmp_path / "new" / "more.jsonl"
    command = ("data", "describe", own, "--out", out, "--n", 4, "--endpoint", stub.url + "/v1", "--model", "tiny")
    result = t2l(*command)
    assert result.exit_code == 0, result.output
    assert load_descriptions(out) == {
        name: tuple(f"Wording {number}-{i}." for i in range(4))
        for number, name in enumerate(["one", "three", "two"], 1)
    }
    path, headers, body = stub.requests[0]
    assert (path, headers["Authorization"], body["model"]) == ("/v1/chat/completions", f"Bearer {KEY}", "tiny")
    asked = body["messages"][1]["content"]
    assert "Say yes or no." in asked and "Input: one 0 apples" in asked and "4 further descriptions" in asked
    assert "hidden test input" not in asked
    assert KEY not in result.output and KEY not in out.read_text()
    again = t2l(*command)
    assert again.exit_code == 1 and "pass --resume" in again.stderr
    assert t2l(*command, "--resume").exit_code == 0 and len(stub.requests) == 3


def test_unusable_answers_are_asked_again_and_named(stub: Stub, own: Path, tmp_path: Path) -> None:
    (task, *_) = load_own(own)
    opened = endpoint.open_endpoint(stub.url, "tiny")
    mixed = json.dumps(["say YES or no!", "Good one.", "good  one", " ", "x" * 1001, "Another."])
    stub.answers = [says("I cannot do that."), says(mixed), says('["Third."]')]
    said: list[str] = []
    describe.describe([task], tmp_path / "a.jsonl", opened, number=3, say=said.append)
    assert load_descriptions(tmp_path / "a.jsonl")["one"] == ("Good one.", "Another.", "Third.")
    assert "no JSON list: “I cannot do that.”" in said[0]
    assert "Write 1 further" in stub.requests[2][2]["messages"][1]["content"]

    stub.answers = [says('[{"a": 1}]')]
    with pytest.raises(DataError, match=r"one: no usable descriptions after 3 answers: the answer is no JSON list"):
        describe.describe([task], tmp_path / "b.jsonl", opened, number=3)
    stub.answers = [(200, {}, '{"error": "no such model"}')]
    with pytest.raises(DownloadError, match=r"does not answer like a completion endpoint .*no such model"):
        describe.describe([task], tmp_path / "b.jsonl", opened)
    assert not (tmp_path / "b.jsonl").exists()
    stub.answers = [says('["Only one."]')]
    describe.describe([task], tmp_path / "c.jsonl", opened, number=3, say=said.append)
    assert said[-2] == "one: only 1 of 3 descriptions could be used"


def test_limits_and_failures_are_waited_out(stub: Stub, own: Path, tmp_path: Path) -> None:
    (task, *_) = load_own(own)
    stub.answers = [(429, {"Retry-After": "7"}, "slow down"), (503, {}, "busy"), "hang up", FRESH]
    pauses: list[float] = []
    opened = endpoint.open_endpoint(stub.url, "tiny")
    describe.describe([task], tmp_path / "a.jsonl", opened, number=4, sleep=pauses.append)
    assert pauses == [7.0, 4.0, 8.0]
    stub.answers = [(500, {}, "broken")]
    with pytest.raises(DownloadError, match=r"no answer after 6 attempts: HTTP 500: broken"):
        describe.describe([task], tmp_path / "b.jsonl", opened, sleep=pauses.append)


def test_a_server_that_dies_midway_and_resume(stub: Stub, own: Path, tmp_path: Path) -> None:
    out = tmp_path / "more.jsonl"
    tasks = load_own(own)
    stub.answers = [FRESH, FRESH, "hang up"]
    opened = endpoint.open_endpoint(stub.url, "tiny")
    with pytest.raises(DownloadError, match=r"two: .* 2 of 3 tasks are in .*; go on with --resume"):
        describe.describe(tasks, out, opened, number=4, sleep=lambda _: None)
    before = out.read_bytes()
    with out.open("ab") as file:
        file.write(b'{"task": "two", "descr')  # as a crash in the middle of a line leaves it
    stub.answers = [FRESH]
    assert describe.describe(tasks, out, opened, number=4, resume=True) == 1
    assert out.read_bytes().startswith(before) and list(load_descriptions(out)) == ["one", "three", "two"]


def test_time_outs(stub: Stub, own: Path, tmp_path: Path) -> None:
    (task, *_) = load_own(own)
    waiting = threading.Event()
    stub.answers = [says(lambda *_: str(waiting.wait(5)))]
    opened = endpoint.open_endpoint(stub.url, "tiny", timeout=0.05)
    try:
        with pytest.raises(DownloadError, match=r"after 6 attempts: TimeoutError"):
            describe.describe([task], tmp_path / "a.jsonl", opened, sleep=lambda _: None)
    finally:
        waiting.set()


@pytest.mark.parametrize("status", [401, 302])
def test_the_key_stays_where_it_is(
    status: int, stub: Stub, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(endpoint.KEY_VARIABLE, KEY)
    quoting = (status, {"Location": stub.url + "/elsewhere"}, lambda _, headers: "Bad key: " + headers["Authorization"])
    stub.answers = [quoting]
    out = tmp_path / "more.jsonl"
    result = t2l("data", "describe", own, "--out", out, "--endpoint", stub.url, "--model", "tiny")
    assert result.exit_code == 1 and f"HTTP {status}: Bad key: Bearer [key]" in result.stderr
    assert KEY not in result.output and not out.exists()
    assert [path for path, _, _ in stub.requests] == ["/v1/chat/completions"]  # no redirect was followed
    assert KEY not in repr(endpoint.open_endpoint(stub.url, "tiny"))


def test_endpoints_that_would_give_the_key_away(monkeypatch: pytest.MonkeyPatch) -> None:
    assert endpoint.open_endpoint("http://example.org", "m").root == "http://example.org/v1"
    assert endpoint.open_endpoint("https://h/x/chat/completions/", "m").root == "https://h/x"
    for url in ("ftp://h", "h:80", f"https://me:{KEY}@h/v1", "https://h/v1?key=x"):
        with pytest.raises(ConfigError, match="--endpoint"):
            endpoint.open_endpoint(url, "m")
    monkeypatch.setenv(endpoint.KEY_VARIABLE, KEY)
    with pytest.raises(ConfigError, match=r"unencrypted to example\.org"):
        endpoint.open_endpoint("http://example.org", "m")
    monkeypatch.setenv(endpoint.KEY_VARIABLE, KEY + "\nX-Other: 1")
    with pytest.raises(ConfigError) as caught:
        endpoint.open_endpoint("https://example.org", "m")
    assert KEY not in str(caught.value)


def test_a_task_without_descriptions_or_examples_can_be_asked_about() -> None:
    messages = describe.make_messages(Task("bare", (), {"train": (Example("1", "x" * 5000, ("y",)),)}), (), 2)
    assert len(messages[1]["content"]) < 1500
