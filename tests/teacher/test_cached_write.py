import json

import pytest

from recllm.errors import UserError
from recllm.teacher import OfflineTeacher, OpenAITeacher, Request, Sampling, TeacherConfig, cached_write, estimate


def ask(key: str, offline: str = "") -> Request:
    return Request(key, ({"role": "user", "content": f"about {key}"},), offline or f"text of {key}")


class Recorder(OfflineTeacher):
    """Answers backwards, counts what it was asked, and stops after `limit` answers."""

    def __init__(self, limit=10**9):
        object.__setattr__(self, "asked", [])
        object.__setattr__(self, "limit", limit)

    def write(self, requests):
        for request in reversed(list(requests)):
            if len(self.asked) == self.limit:
                raise KeyboardInterrupt
            self.asked.append(request.key)
            yield request, request.offline


def test_results_come_in_the_order_of_the_requests(tmp_path):
    teacher = Recorder()
    assert cached_write(teacher, [ask("a"), ask("b"), ask("c")], tmp_path / "c.jsonl") == [
        "text of a", "text of b", "text of c",
    ]  # fmt: skip
    assert teacher.asked == ["c", "b", "a"]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    requests = [ask(str(number)) for number in range(10)]
    with pytest.raises(KeyboardInterrupt):
        cached_write(Recorder(limit=4), requests, tmp_path / "c.jsonl")
    second = Recorder()
    texts = cached_write(second, requests, tmp_path / "c.jsonl")
    assert second.asked == ["5", "4", "3", "2", "1", "0"]
    assert texts == [request.offline for request in requests]
    third = Recorder()
    assert cached_write(third, requests, tmp_path / "c.jsonl") == texts
    assert third.asked == []


def test_a_cache_cut_anywhere_is_read_and_mended(tmp_path):
    requests = [ask("a"), ask("b"), ask("ü")]
    cached_write(OfflineTeacher(), requests, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for length in range(len(whole) + 1):
        cache = tmp_path / f"{length}.jsonl"
        cache.write_bytes(whole[:length])
        assert cached_write(OfflineTeacher(), requests, cache) == [request.offline for request in requests]
        assert cache.read_bytes() == whole


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    cached_write(OfflineTeacher(), [ask("a"), ask("b")], tmp_path / "c.jsonl")
    first, second = (tmp_path / "c.jsonl").read_text().splitlines()
    (tmp_path / "c.jsonl").write_text(f"{first}\n{second[:-3]}\n{second}\n")
    with pytest.raises(UserError, match=r"c\.jsonl, line 2: not a line of the teacher's cache"):
        cached_write(OfflineTeacher(), [ask("a")], tmp_path / "c.jsonl")


def test_an_empty_answer_is_asked_again(tmp_path):
    assert cached_write(OfflineTeacher(), [ask("a", " ")], tmp_path / "c.jsonl") == [""]
    assert (tmp_path / "c.jsonl").read_bytes() == b""


def test_the_stage_says_which_answers_are_empty_and_the_cache_keeps_them_as_they_came(tmp_path):
    def read(answer):
        return "" if answer == "hm" else answer.upper()

    requests, cache = [ask("a", "hm"), ask("b", "yes")], tmp_path / "c.jsonl"
    cached_write(Recorder(), requests, cache)  # kept by a stage that reads another way
    teacher = Recorder()
    assert cached_write(teacher, requests, cache, read=read) == ["", "YES"]
    assert teacher.asked == ["a"]
    assert [json.loads(line)["text"] for line in cache.read_text().splitlines()] == ["yes", "hm"]
    assert estimate(teacher, requests, cache, read=read).cached == 1


def test_equal_requests_are_asked_once(tmp_path):
    teacher = Recorder()
    assert cached_write(teacher, [ask("a"), ask("b"), ask("a")], tmp_path / "c.jsonl")[2] == "text of a"
    assert sorted(teacher.asked) == ["a", "b"]


def test_the_cache_key_changes_with_model_settings_and_messages():
    request = ask("a")
    keys = {
        OpenAITeacher("m").cache_key(request),
        OpenAITeacher("n").cache_key(request),
        OpenAITeacher("m", Sampling(temperature=0.1)).cache_key(request),
        OpenAITeacher("m", Sampling(extra={"top_k": 3})).cache_key(request),
        OpenAITeacher("m").cache_key(ask("b")),
    }
    assert len(keys) == 5
    same = OpenAITeacher("m", concurrency=1, base_url="http://elsewhere", retries=1)
    assert OpenAITeacher("m", Sampling(max_tokens=9)).cache_key(request) == OpenAITeacher("m").cache_key(request)
    assert same.cache_key(Request("other key", request.messages, "other")) == OpenAITeacher("m").cache_key(request)


def test_estimate_counts_what_is_missing(tmp_path):
    requests = [Request(key, ({"role": "user", "content": "x" * 400},), key * 80) for key in "ab"]
    both = estimate(OfflineTeacher(), requests, tmp_path / "c.jsonl", input_price=1.0, output_price=10.0)
    assert (both.requests, both.cached, both.tokens_in, both.tokens_out) == (2, 0, 200, 40)  # four bytes a token
    assert both.cost == pytest.approx((200 * 1 + 40 * 10) / 1e6)
    cached_write(OfflineTeacher(), requests[:1], tmp_path / "c.jsonl")
    one = estimate(OfflineTeacher(), requests, tmp_path / "c.jsonl", concurrency=2)
    assert (one.cached, one.tokens_in, one.seconds) == (1, 100, 20 / 40 / 2)
    assert "2 requests, 1 of them answered already" in str(one)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"teacher": "openai"}, "needs a model"),
        ({"concurrency": 0}, "out of range"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"extra_body": "{"}, "extra_body is not JSON"),
        ({"extra_body": "[1]"}, "not a JSON object"),
    ],
)
def test_bad_settings_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        TeacherConfig(**settings)


def test_what_is_not_to_be_sent():
    sampling = TeacherConfig(temperature=-1, max_tokens=0, teacher_seed=-1, extra_body='{"a": 1}').sampling()
    assert (sampling.given(), sampling.extra) == ({}, {"a": 1})
    assert json.loads(json.dumps(TeacherConfig().sampling().given())) == {
        "temperature": 0.7,
        "max_tokens": 512,
        "seed": 0,
    }
