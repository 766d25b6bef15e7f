import json
import socket
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from reelflow.conditioning.rewriting import IMAGE_TO_VIDEO, TEXT_TO_VIDEO, ChatRewriter
from reelflow.errors import ConfigError


def said(text) -> tuple[int, bytes]:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class Server(ThreadingHTTPServer):
    """Gives the prepared answers one after the other, the last again and again, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, bytes]] = []
        self.asked: list[tuple[str, dict, dict]] = []
        self.late = False
        self.over = threading.Event()

    def handle_error(self, *_: object) -> None:
        """Say nothing of those who did not wait."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, dict(self.headers), body))
        if self.server.late:
            self.server.over.wait(20)
        answers = self.server.answers
        status, content = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def rewrite(server, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return ChatRewriter(f"http://127.0.0.1:{server.server_port}/v1/", "tiny", backoff=0.0, retries=2, timeout=5.0)


def test_the_model_is_told_the_purpose_and_its_answer_is_the_prompt(server, rewrite, monkeypatch):
    server.answers = [said(" A long\nand  detailed prompt. ")]
    monkeypatch.setenv("SOME_KEY", "secret")
    asking = replace(rewrite, key_variable="SOME_KEY", max_words=80, purpose=IMAGE_TO_VIDEO)
    assert asking("короткий") == "A long and detailed prompt."
    ((path, headers, body),) = server.asked
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body["model"] == "tiny"
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert "at most 80 words" in body["messages"][0]["content"]
    assert body["messages"][1]["content"] == "короткий"


@pytest.mark.parametrize("trouble", [(429, b"slow down"), (500, b"fault"), (200, b"<html>"), said(""), (200, b"[1]")])
def test_trouble_that_passes_is_sat_out(server, rewrite, caplog, trouble):
    server.answers = [trouble, trouble, said("better")]
    assert rewrite("a kite") == "better"
    assert len(server.asked) == 3
    assert not caplog.messages


@pytest.mark.parametrize(
    ("answer", "attempts", "reason"),
    [
        ((503, b""), 3, "status 503"),
        ((429, b""), 3, "status 429"),
        ((401, b"no"), 1, "status 401"),
        ((200, b"\xff"), 3, "no chat completion"),
        (said(None), 3, "an empty answer"),
    ],
)
def test_trouble_that_stays_leaves_the_prompt_and_a_reason(server, rewrite, caplog, answer, attempts, reason):
    server.answers = [answer]
    assert rewrite("a kite") == "a kite"
    assert len(server.asked) == attempts
    assert [reason in message for message in caplog.messages] == [True]


def test_a_late_answer_is_not_waited_for(server, rewrite, caplog):
    server.answers, server.late = [said("late")], True
    assert replace(rewrite, timeout=0.1, retries=1)("a kite") == "a kite"
    assert len(server.asked) == 2
    assert "timed out" in caplog.messages[0]


def test_a_server_that_is_not_there_leaves_the_prompt(rewrite, caplog):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert replace(rewrite, url=f"http://127.0.0.1:{port}")("a kite") == "a kite"
    assert "refused" in caplog.messages[0]


def test_waits_double(server, rewrite, monkeypatch):
    server.answers, waits = [(500, b"")], []
    monkeypatch.setattr("reelflow.conditioning.chat.sleep", waits.append)
    replace(rewrite, backoff=0.5, retries=3)("a kite")
    assert waits == [0.5, 1.0, 2.0]


def test_an_empty_prompt_asks_nobody(server, rewrite):
    assert rewrite("  ") == "  "
    assert not server.asked


def test_a_key_that_is_not_set_is_refused_before_asking(server, rewrite):
    with pytest.raises(ConfigError, match="NO_SUCH_KEY"):
        replace(rewrite, key_variable="NO_SUCH_KEY")("a kite")
    assert not server.asked


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": "localhost:80"}, "must begin with http"),
        ({"purpose": " "}, "purpose must tell"),
        ({"max_words": 0}, "max_words must be at least 1"),
        ({"retries": -1}, "retries must be at least 0"),
        ({"timeout": 0.0}, "timeout must be"),
        ({"backoff": float("nan")}, "backoff must be"),
    ],
)
def test_impossible_rewriters_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ChatRewriter(**{"url": "http://localhost:1/v1", "model": "m", **change})


def test_both_purposes_say_how_long():
    assert all("{words}" in purpose for purpose in (TEXT_TO_VIDEO, IMAGE_TO_VIDEO))
