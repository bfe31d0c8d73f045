"""The teacher against a server on loopback that speaks just enough of the protocol, and fails on command."""

import json
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import write_catalogue

from recllm.errors import UserError
from recllm.rewriting import RewriteConfig, rewrite
from recllm.teacher import OpenAITeacher, Request, Sampling, TeacherConfig, VLLMTeacher

SECRET = "sk-very-secret-0123456789"


class Server(ThreadingHTTPServer):
    """`fail(text, attempt)`: a status to answer with, or None. `seen`: bodies, keys; `busiest`: most at a time.

    `answer(text)`: what is said; `reason(body)`: why it ends there.
    """

    daemon_threads = True

    def __init__(self, fail=lambda text, attempt: None, delay=0.0, answer=lambda text: f"written: {text}", reason=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.fail, self.delay, self.answer = fail, delay, answer
        self.reason = reason or (lambda body: "stop")
        self.lock, self.seen, self.attempts = threading.Lock(), [], Counter()
        self.running = self.busiest = 0

    def handle_error(self, request, client_address):
        pass  # the client went away: some tests want that

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with server.lock:
            server.seen.append((body, self.headers["Authorization"]))
            server.attempts[text] += 1
            attempt = server.attempts[text]
            server.running += 1
            server.busiest = max(server.busiest, server.running)
        time.sleep(server.delay)
        with server.lock:
            server.running -= 1
        if status := server.fail(text, attempt):
            echoed = f"no: {self.headers['Authorization']}"  # some servers repeat the key in what they say
            return self.reply(status, {"error": {"message": echoed, "type": "x"}})
        message = {"role": "assistant", "content": server.answer(text)}
        choice = {"index": 0, "finish_reason": server.reason(body), "message": message}
        return self.reply(
            200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        )

    def reply(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "5")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    running = []

    def start(**settings):
        server = Server(**settings)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def ask(number: int) -> Request:
    return Request(f"item {number}", ({"role": "user", "content": f"about {number}"},), "offline")


def written(teacher, requests) -> dict[str, str]:
    return {request.key: text for request, text in teacher.write(requests)}


def test_every_request_is_answered_and_the_settings_are_sent(serve):
    server = serve()
    sampling = Sampling(0.2, 0.9, 7, 3, {"chat_template_kwargs": {"enable_thinking": False}})
    answers = written(OpenAITeacher("m", sampling, server.url), [ask(number) for number in range(20)])
    assert answers == {f"item {number}": f"written: about {number}" for number in range(20)}
    body, authorization = server.seen[0]
    assert body | {"messages": None} == {
        "model": "m", "messages": None, "temperature": 0.2, "top_p": 0.9, "max_tokens": 7, "seed": 3,
        "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
    assert authorization == f"Bearer {SECRET}"


def test_concurrency_is_used_and_never_exceeded(serve):
    server = serve(delay=0.03)
    written(OpenAITeacher("m", base_url=server.url, concurrency=3), [ask(number) for number in range(12)])
    assert server.busiest == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_or_failing_server_is_tried_again(serve, status):
    server = serve(fail=lambda text, attempt: status if attempt < 3 else None)
    assert len(written(OpenAITeacher("m", base_url=server.url), [ask(1), ask(2)])) == 2
    assert set(server.attempts.values()) == {3}


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (401, r"refuses the API key \(401\).*environment variable OPENAI_API_KEY"),
        (403, r"refuses the API key \(403\)"),
        (404, "knows no model 'm'"),
        (400, r"refuses the request for 'item 1': .*\*\*\*"),
        (429, "still answers 429 after 2 retries"),
        (500, "still answers 500 after 2 retries.*run the same command again"),
    ],
)
def test_each_failure_is_one_sentence_without_the_key(serve, status, sentence):
    server = serve(fail=lambda text, attempt: status)
    with pytest.raises(UserError, match=sentence) as caught:
        written(OpenAITeacher("m", base_url=server.url, retries=2), [ask(1)])
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert SECRET not in repr(OpenAITeacher("m", base_url=server.url))


def test_a_server_that_is_not_there_or_too_slow(serve, monkeypatch):
    closed = Server()
    closed.server_close()
    with pytest.raises(UserError, match="cannot be reached"):
        written(OpenAITeacher("m", base_url=closed.url, retries=0), [ask(1)])
    with pytest.raises(UserError, match=r"gave no answer within 0.05 s"):
        written(OpenAITeacher("m", base_url=serve(delay=0.5).url, retries=0, timeout=0.05), [ask(1)])


def test_without_a_key_only_a_server_of_ones_own_is_asked(serve, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UserError, match="environment variable OPENAI_API_KEY is not set"):
        written(OpenAITeacher("m"), [ask(1)])
    assert written(OpenAITeacher("m", base_url=serve().url), [ask(1)]) == {"item 1": "written: about 1"}


def test_what_came_before_a_failure_is_delivered_and_stopping_early_is_clean(serve):
    server = serve(fail=lambda text, attempt: 400 if text == "about 3" else None)
    teacher, got = OpenAITeacher("m", base_url=server.url, concurrency=1), []
    with pytest.raises(UserError, match="item 3"):
        got.extend(request.key for request, _ in teacher.write([ask(number) for number in range(6)]))
    assert got == ["item 0", "item 1", "item 2"]

    threads = threading.active_count()
    stream = OpenAITeacher("m", base_url=serve(delay=0.02).url, concurrency=2).write(ask(n) for n in range(1000))
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if "_run" in thread.name]
    assert threading.active_count() <= threads + 4  # the server's own connections


def test_rewriting_through_a_server_keeps_the_key_out_of_every_file_and_message(serve, tmp_path, capfd):
    items = [{"item": "a", "title": "Cup"}, {"item": "b", "title": "Pot"}]
    write_catalogue(tmp_path, items, {"u": ["a"]})
    server = serve(answer=lambda text: "" if "Pot" in text else "<think>well</think>A fine cup.")
    table = rewrite(
        RewriteConfig(str(tmp_path)), TeacherConfig("openai", teacher_model="m", base_url=server.url, concurrency=2)
    )
    assert table["text"].to_list() == ["A fine cup.", "Pot."]  # an empty answer: the offline text stands in
    out = capfd.readouterr()
    assert "1 answers were empty" in out.err
    assert len(server.seen) == 2
    assert SECRET not in out.out + out.err
    assert all(SECRET.encode() not in path.read_bytes() for path in tmp_path.iterdir())


def test_answers_cut_off_or_of_thoughts_alone_are_asked_again_and_never_become_text(serve, tmp_path, capfd):
    items = [{"item": item, "title": title} for item, title in (("a", "Cup"), ("b", "Pot"), ("c", "Hose"))]
    write_catalogue(tmp_path, items, {"u": ["a"]})

    def answer(text):
        return "A fine cup." if "Cup" in text else "<think>a</think>" if "Pot" in text else "<think>The user wants"

    def reason(body):
        return "length" if "Hose" in body["messages"][-1]["content"] and body["max_tokens"] < 1000 else "stop"

    server = serve(answer=answer, reason=reason)
    config = RewriteConfig(str(tmp_path))
    teacher = {"teacher": "openai", "teacher_model": "m", "base_url": server.url}
    for asked in (3, 5):  # only the two without a text are asked again
        assert rewrite(config, TeacherConfig(**teacher))["text"].to_list() == ["A fine cup.", "Pot.", "Hose."]
        assert len(server.seen) == asked
        assert "2 answers were empty or cut off" in " ".join(capfd.readouterr().err.split())
    assert len((tmp_path / "texts.cache.jsonl").read_text().splitlines()) == 1

    server.answer = lambda text: "<think>hm</think>At last."
    table = rewrite(config, TeacherConfig(**teacher, max_tokens=4096))  # more room: what is answered stays
    assert table["text"].to_list() == ["A fine cup.", "At last.", "At last."]
    assert len(server.seen) == 7
    rewrite(config, TeacherConfig(**teacher))
    assert len(server.seen) == 7


def test_a_whole_answer_that_was_cut_off_is_not_taken_either(serve):
    server = serve(answer=lambda text: "A thought without a", reason=lambda body: "length")
    assert written(OpenAITeacher("m", base_url=server.url), [ask(1)]) == {"item 1": ""}


def test_vllm_is_asked_for_by_name_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"requirements-gpu\.txt"):
        list(VLLMTeacher("m").write([ask(1)]))
