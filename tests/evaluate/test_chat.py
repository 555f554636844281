"""The client of chat endpoints: cached answers, bounded retries, and a key that goes nowhere."""

import json
import os
import signal
import socket
import time
from email.utils import formatdate

import pytest
from scripted_server import Reply, completion, serving

from dpo.config_files import validate
from dpo.errors import InputError, StorageError
from dpo.evaluate.chat import MAX_FAILURES_IN_A_ROW, Answer, ChatEndpoint
from dpo.evaluation_config import EndpointConfig
from dpo.train.reference import cache_folder
from train.small_runs import forked

KEY = "sk-canary/0123+secret="


def chat(base_url, waits=None, **settings):
    start = {"model": "m", "base_url": base_url, "parallel": 1}
    config = validate(EndpointConfig, start | settings)
    return ChatEndpoint(config, pause=[].append if waits is None else waits.append)


def echo(asked):
    return completion(f"you said {asked.question}")


def in_turn(*replies):
    """Each reply once, then the last for ever."""
    return lambda asked: replies[min(asked.number, len(replies) - 1)]


def cached_files():
    return sorted((cache_folder() / "judge").glob("*.json"))


# -- the protocol and the cache -------------------------------------------------------------------


def test_a_question_is_one_message_at_temperature_0():
    with serving(echo) as server:
        (answer,) = chat(server.base_url, max_tokens=7).ask_all(["caf\u00e9 \ud800 \u2028"])
    (asked,) = server.asked
    assert asked.path == "/v1/chat/completions"
    assert asked.body == {
        "model": "m",
        "messages": [{"role": "user", "content": "caf\u00e9 \ud800 \u2028"}],
        "temperature": 0,
        "max_tokens": 7,
    }
    assert "Authorization" not in asked.headers
    assert answer.text == "you said caf\u00e9 \ud800 \u2028"


def test_what_was_answered_is_never_asked_again():
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    with serving(lambda asked: completion("yes", usage)) as server:
        first = chat(server.base_url).ask_all(["a", "b"])
        again = chat(server.base_url, parallel=3, max_attempts=2).ask_all(["b", "a", "c"])
    assert server.questions == ["a", "b", "c"]
    assert first[0] == Answer(text="yes", prompt_tokens=5, completion_tokens=2)
    assert [answer.cached for answer in again] == [True, True, False]
    assert (again[0].text, again[0].prompt_tokens) == ("yes", 5)


@pytest.mark.parametrize("changes", [{"model": "other"}, {"max_tokens": 3}])
def test_other_settings_are_never_answered_from_the_cache(changes):
    with serving(echo) as server:
        chat(server.base_url).ask_all(["a"])
        chat(server.base_url, **changes).ask_all(["a"])
        assert len(server.asked) == 2
        with serving(lambda asked: completion("another server")) as other:
            (answer,) = chat(other.base_url).ask_all(["a"])
    assert answer.text == "another server"


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b"[]", b'{"answer": {"text": null}}'])
def test_a_damaged_answer_is_asked_again_and_replaced(damage):
    with serving(echo) as server:
        chat(server.base_url).ask_all(["a"])
        (file,) = cached_files()
        whole = file.read_bytes()
        file.write_bytes(damage)
        (answer,) = chat(server.base_url).ask_all(["a"])
    assert (answer.text, answer.cached) == ("you said a", False)
    assert file.read_bytes() == whole
    assert cached_files() == [file]


def test_answers_come_in_the_order_of_the_questions_however_long_they_take():
    def slow_at_first(asked):
        return Reply(echo(asked).content, delay_seconds=0.3 if asked.question == "q0" else 0.0)

    questions = [f"q{i}" for i in range(12)]
    with serving(slow_at_first) as server:
        answers = chat(server.base_url, parallel=4).ask_all(questions)
    assert [answer.text for answer in answers] == [f"you said {q}" for q in questions]
    assert server.questions.index("q0") < 4


def test_nothing_said_is_an_answer():
    with serving(lambda asked: completion(None)) as server:
        (answer,) = chat(server.base_url).ask_all(["a"])
    assert (answer.text, answer.prompt_tokens) == ("", None)


@pytest.mark.parametrize("usage", [{"prompt_tokens": "5"}, {"prompt_tokens": -1}, {}])
def test_token_counts_that_are_none_are_unknown(usage):
    with serving(lambda asked: completion("x", usage)) as server:
        (answer,) = chat(server.base_url).ask_all(["a"])
    assert (answer.prompt_tokens, answer.completion_tokens) == (None, None)


def test_an_answer_that_cannot_be_kept_is_one_sentence():
    cache_folder().mkdir(parents=True, exist_ok=True)
    (cache_folder() / "judge").write_text("")
    with serving(echo) as server, pytest.raises(StorageError, match="in the way"):
        chat(server.base_url).ask_all(["a"])
    assert server.asked == []


def test_a_killed_run_asks_again_only_what_was_in_flight():
    """The server kills the process that asks at its third question."""

    def deadly(asked):
        if asked.number == 2:
            os.kill(int(asked.question.split()[0]), signal.SIGKILL)
        return echo(asked)

    with serving(deadly) as server:

        def work():
            chat(server.base_url).ask_all([f"{os.getpid()} {i}" for i in range(5)])

        assert forked(work) == -signal.SIGKILL
        assert [q.split()[1] for q in server.questions] == ["0", "1", "2"]
        assert len(cached_files()) == 2
        child = server.questions[0].split()[0]
        answers = chat(server.base_url).ask_all([f"{child} {i}" for i in range(5)])
        assert [q.split()[1] for q in server.questions[3:]] == ["2", "3", "4"]
    assert [answer.cached for answer in answers] == [True, True, False, False, False]


# -- what is tried again --------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 529])
def test_what_passes_by_itself_is_tried_again_after_longer_and_longer(status):
    waits = []
    with serving(in_turn(*[Reply("busy", status)] * 3, completion("yes"))) as server:
        (answer,) = chat(server.base_url, waits).ask_all(["a"])
    assert (answer.text, answer.num_retries, waits) == ("yes", 3, [1.0, 2.0, 4.0])
    assert server.questions == ["a"] * 4


def test_a_server_that_asks_to_wait_longer_is_waited_for():
    waits = []
    date = formatdate(time.time() + 60, usegmt=True)
    replies = [Reply("", 429, {"Retry-After": value}) for value in ("7", "0.5", date, "soon", "-3")]
    with serving(in_turn(*replies, completion("yes"))) as server:
        (answer,) = chat(server.base_url, waits).ask_all(["a"])
    assert answer.text == "yes"
    assert waits == [7.0, 2.0, pytest.approx(59.5, abs=2), 8.0, 16.0]


def test_a_wait_beyond_the_bound_fails_at_once():
    waits = []
    with serving(lambda asked: Reply("", 429, {"Retry-After": "3600"})) as server:
        (answer,) = chat(server.base_url, waits).ask_all(["a"])
    assert (answer.text, answer.failure, waits) == (None, "status 429", [])
    assert len(server.asked) == 1


def test_tries_are_bounded_and_a_failure_is_asked_again_next_time():
    waits = []
    with serving(lambda asked: Reply("down", 503)) as server:
        endpoint = chat(server.base_url, waits, max_attempts=3)
        (answer,) = endpoint.ask_all(["a"])
        assert (answer.text, answer.num_retries, len(server.asked)) == (None, 2, 3)
        assert answer.failure == "status 503 (down)"
        assert cached_files() == []
        endpoint.ask_all(["a"])
    assert len(server.asked) == 6
    assert waits == [1.0, 2.0] * 2


@pytest.mark.parametrize("status", [400, 413, 422, 302])
def test_what_does_not_pass_is_not_tried_again(status):
    content = json.dumps({"error": {"message": "too \x1b[31m long\n"}})
    with serving(lambda asked: Reply(content, status, {"Location": "/other"})) as server:
        (answer,) = chat(server.base_url).ask_all(["a"])
    assert (answer.text, answer.failure) == (None, f"status {status} (too [31m long)")
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"<html>proxy</html>",
        b"",
        b"\xff",
        b"{}",
        b"[]",
        b"null",
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": 3}}]}',
        b'{"choices": [{"message": null}]}',
        b"[" * 100_000,
    ],
)
def test_an_answer_that_is_not_in_the_protocol_is_tried_again(content):
    with serving(in_turn(Reply(content), completion("yes"))) as server:
        (answer,) = chat(server.base_url).ask_all(["a"])
    assert (answer.text, answer.num_retries) == ("yes", 1)


def test_a_server_that_is_silent_is_given_up_after_the_timeout():
    slow = Reply(completion("late").content, delay_seconds=20)
    with serving(in_turn(slow, completion("yes"))) as server:
        (answer,) = chat(server.base_url, timeout_seconds=0.2).ask_all(["a"])
        assert (answer.text, answer.num_retries) == ("yes", 1)
    with serving(lambda asked: slow) as server:
        (answer,) = chat(server.base_url, timeout_seconds=0.2, max_attempts=2).ask_all(["a"])
    assert answer.failure == "no answer within 0.2 seconds"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_where_no_server_is_a_few_questions_find_out():
    endpoint = chat(f"http://127.0.0.1:{free_port()}/v1", max_attempts=1)
    with pytest.raises(InputError, match="5 questions in a row had no answer") as caught:
        endpoint.ask_all([str(i) for i in range(100)])
    assert "refused" in str(caught.value)


def test_failures_here_and_there_do_not_stop_the_others():
    def every_third(asked):
        return Reply("no", 400) if int(asked.question) % 3 == 0 else echo(asked)

    with serving(every_third) as server:
        answers = chat(server.base_url).ask_all([str(i) for i in range(20)])
    assert [a.text is None for a in answers] == [i % 3 == 0 for i in range(20)]


def test_what_was_answered_before_the_end_is_kept():
    def until_three(asked):
        return echo(asked) if int(asked.question) < 3 else Reply("no", 400)

    with serving(until_three) as server:
        with pytest.raises(InputError, match="the same command goes on from there"):
            chat(server.base_url).ask_all([str(i) for i in range(50)])
        assert len(server.asked) - 3 - MAX_FAILURES_IN_A_ROW in (0, 1)  # one was in flight
    assert len(cached_files()) == 3


@pytest.mark.parametrize(
    ("status", "hint"),
    [(401, "is the key right"), (403, "may this key"), (404, "are base_url and model")],
)
def test_what_every_question_would_get_stops_at_the_first(status, hint):
    with serving(lambda asked: Reply('{"detail": "no"}', status)) as server:
        with pytest.raises(InputError, match=rf"status {status} \(no\); {hint}"):
            chat(server.base_url).ask_all([str(i) for i in range(50)])
        assert len(server.asked) == 1


# -- the key --------------------------------------------------------------------------------------


def everything_on_disk(folder):
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


def test_the_key_is_sent_and_nowhere_else(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    caplog.set_level("DEBUG")

    def indiscreet(asked):
        said = f"your key is {asked.headers['Authorization']}"
        return Reply(said, 400) if asked.question == "bad" else completion(said)

    with serving(indiscreet) as server:
        answers = chat(server.base_url, key_variable="MY_KEY").ask_all(["good", "bad"])
        with serving(lambda asked: Reply(asked.headers["Authorization"], 401)) as other:
            endpoint = chat(other.base_url, key_variable="MY_KEY")
            with pytest.raises(InputError) as caught:
                endpoint.ask_all(["good"])
    assert [asked.headers["Authorization"] for asked in server.asked] == [f"Bearer {KEY}"] * 2
    assert answers[0].text == "your key is Bearer [key]"
    assert answers[1].failure == "status 400 (your key is Bearer [key])"
    said = f"{caught.value} {caplog.text} {answers}".encode()
    assert KEY.encode() not in said + everything_on_disk(cache_folder())
    assert len(cached_files()) == 1


def test_a_long_message_shows_no_part_of_the_key(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)

    def wordy(asked):
        return Reply("x" * 190 + asked.headers["Authorization"].split()[1], 400)

    with serving(wordy) as server:
        (answer,) = chat(server.base_url, key_variable="MY_KEY").ask_all(["a"])
    assert answer.failure == f"status 400 ({'x' * 190}[key])"


def test_a_redirect_does_not_carry_the_key_away(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(echo) as elsewhere:
        to = {"Location": f"{elsewhere.base_url}/chat/completions"}
        for status in (301, 302, 303, 307, 308):
            with serving(lambda asked, status=status: Reply("", status, to)) as server:
                (answer,) = chat(server.base_url, key_variable="MY_KEY").ask_all(["a"])
            assert (answer.text, len(server.asked)) == (None, 1)
        assert elsewhere.asked == []


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_variable_without_a_key_is_refused(monkeypatch, value):
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(InputError, match=r"endpoint\.key_variable: there is no environment var"):
        chat("http://localhost:1", key_variable="MY_KEY")


@pytest.mark.parametrize("value", ["two words", "line\nbreak", "caf\u00e9", "\x1b"])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(monkeypatch, value):
    monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(InputError, match="the variable holds no key") as caught:
        chat("http://localhost:1", key_variable="MY_KEY")
    assert value not in str(caught.value)


def test_a_proxy_of_the_environment_is_not_used_to_this_machine(monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(echo) as server:
        (answer,) = chat(server.base_url).ask_all(["a"])
    assert answer.text == "you said a"
