"""What servers may answer, to the one client of them: a JSON value or an error of ours that names the address, soon."""

import json
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from damage import documented, outcome

from t2l.endpoint import Endpoint, call, choice

BODY = json.dumps({"choices": [{"message": {"content": "Paris"}}]}).encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
SOUND = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
ANSWERS = {
    "nothing": b"",
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "zeros": bytes(100_000),
    "a status that is none": b"HTTP/1.1 abc OK\r\n\r\n",
    "a status of four digits": b"HTTP/1.1 9999 OK\r\n\r\n",
    "version 9": b"HTTP/9.9 200 OK\r\n\r\n" + BODY,
    "a long status line": b"HTTP/1.1 200 " + b"x" * 100_000,
    "a long header": HEAD + b"X: " + b"x" * 100_000 + b"\r\n\r\n",
    "many headers": HEAD + b"X: y\r\n" * 10_000 + b"\r\n",
    "headers without an end": HEAD,
    "more promised": HEAD + b"Content-Length: 9999\r\n\r\n" + BODY,
    "endless promised": HEAD + b"Content-Length: %d\r\n\r\n" % 10**30 + BODY,
    "less than nothing promised": HEAD + b"Content-Length: -5\r\n\r\n" + BODY,
    "no number promised": HEAD + b"Content-Length: x\r\n\r\n" + BODY,
    "a chunk that is none": CHUNKED + b"zz\r\n" + BODY,
    "a chunk of 2^63": CHUNKED + b"7fffffffffffffff\r\n" + BODY,
    "a chunk of less than nothing": CHUNKED + b"-1\r\n" + BODY,
    "chunks without an end": CHUNKED + b"%x\r\n" % len(BODY) + BODY,
    "gzip that is none": HEAD + b"Content-Encoding: gzip\r\n\r\n\x1f\x8b\x08\x00" + BODY,
    "a redirect": b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n",
    "a redirect to itself": b"HTTP/1.1 307 Here\r\nLocation: /\r\nContent-Length: 0\r\n\r\n",
    "a wait that is none": b"HTTP/1.1 429 Slow\r\nRetry-After: 1e99\r\nContent-Length: 0\r\n\r\n",
    "an error page": b"HTTP/1.1 500 No\r\nContent-Length: 9999\r\n\r\n" + b"\xff" * 50,
    "too much": HEAD + b"\r\n" + b"[" + b"1," * 2_000_000,
    "deep": HEAD + b"\r\n" + b"[" * 100_000,
    "NaN": HEAD + b'\r\n{"choices": [NaN]}',
    "no UTF-8": HEAD + b'\r\n"\xff\xfe"',
    "half a surrogate": HEAD + b'\r\n"\\ud800"',
    "an unmeant pickle": HEAD + b"\r\n\x80\x04K\x01.",
}


@contextmanager
def answering(content: bytes, *, reset: bool = False, slowly: bool = False, timeout: float = 1.0) -> Iterator[Endpoint]:
    """A server that says the same to everybody, and breaks off."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection, suppress(OSError):
                        connection.recv(65536)
                        if reset:  # no goodbye
                            linger = struct.pack("ii", 1, 0)
                            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                        connection.sendall(content)
                        while slowly:
                            time.sleep(0.05)
                            connection.sendall(b" ")
                        if not reset:
                            connection.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield Endpoint(f"http://127.0.0.1:{server.getsockname()[1]}/v1", "m", timeout=timeout)
        server.shutdown(socket.SHUT_RDWR)
    thread.join(timeout=5)


def asked(endpoint: Endpoint) -> tuple[str, object]:
    """What comes of asking, which is sound: a text, or an error that names the address."""

    def ask() -> str:
        return choice(call(endpoint, "chat/completions", {"x": 1}, sleep=lambda seconds: None), endpoint, "message")

    kind, found = outcome(ask)
    assert kind != "raw", found
    assert kind == "value" or "127.0.0.1" in str(found), found
    return kind, found


def test_a_sound_answer_is_read() -> None:
    with answering(SOUND) as endpoint:
        assert asked(endpoint)[0] == "value"


@pytest.mark.parametrize("what", ANSWERS)
def test_answers_that_are_none_are_refused(what: str) -> None:
    with answering(ANSWERS[what]) as endpoint:
        kind, _ = asked(endpoint)
    readable = (
        "more promised",
        "endless promised",
        "less than nothing promised",
        "no number promised",
        "chunks without an end",
        "version 9",
    )
    assert kind == "refused" or what in readable


def test_answers_cut_off_or_changed_anywhere_are_refused_or_read() -> None:
    """Cut off at every byte, with a reset or a goodbye; and at every byte four times with a bit turned."""
    draw, found = random.Random(0), []
    for end in range(len(SOUND)):
        with answering(SOUND[:end], reset=end % 2 == 0) as endpoint:
            found.append(asked(endpoint)[0])
    assert set(found) == {"refused"}
    for place in 4 * list(range(len(SOUND))):
        turned = bytearray(SOUND)
        turned[place] ^= 1 << draw.randrange(8)
        with answering(bytes(turned)) as endpoint:
            found.append(asked(endpoint)[0])
    fast, full, refused = documented("HTTP client")
    assert len(found) >= fast == full and found.count("refused") >= refused


def test_an_answer_that_never_ends_is_given_up() -> None:
    with answering(HEAD + b"\r\n[", slowly=True, timeout=0.2) as endpoint:
        assert asked(endpoint)[0] == "refused"
