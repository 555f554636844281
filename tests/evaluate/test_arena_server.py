"""The arena's server over HTTP: who is answered, who is refused, and the command around it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest

from arena_folders import NAMES, evaluation_folder, scored, write_evaluation
from dpo.errors import InputError, StorageError
from dpo.evaluate.arena.judgements import JudgementFile, read_judgements
from dpo.evaluate.arena.pairs import deal, make_pairs, read_answers
from dpo.evaluate.arena.server import MAX_BODY_BYTES, ArenaServer
from dpo.evaluate.arena.session import Session
from train.small_runs import dpo


@pytest.fixture
def arena(tmp_path):
    """A server at work on four pairs; `get` and `post` ask it as its own page does."""
    folder = evaluation_folder(tmp_path / "e")
    file = JudgementFile(folder / "judgements.jsonl")
    pairs = deal(make_pairs(read_answers([folder]), *NAMES), seed=0)
    with ArenaServer(Session(pairs, file, annotator="ann", seed=0)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        host = server.hosts[0]

        def ask(path, *, method="GET", body=None, headers=None, token=None):
            """Status, headers and text of the answer."""
            connection = http.client.HTTPConnection(*host.split(":"), timeout=10)
            address = f"/{server.token if token is None else token}/{path}"
            connection.request(method, address, body=body, headers=headers or {})
            answer = connection.getresponse()
            text = answer.read().decode()
            connection.close()
            return answer.status, answer.headers, text

        def post(path, value, **headers):
            own = {"Origin": f"http://{host}", "Content-Type": "application/json"}
            sent = {name: text for name, text in {**own, **headers}.items() if text is not None}
            return ask(path, method="POST", body=json.dumps(value), headers=sent)

        yield SimpleNamespace(server=server, host=host, ask=ask, post=post, file=file)
        server.shutdown()
        thread.join()
    file.close()


def shown(arena):
    return json.loads(arena.ask("state")[2])["pair"]["id"]


# -- what is answered ------------------------------------------------------------------------------


def test_the_page_is_served_at_the_address_that_is_printed(arena):
    with urllib.request.urlopen(arena.server.url, timeout=10) as answer:
        assert answer.status == 200
        page = answer.read().decode()
    for name in re.findall(r'(?:href|src)="([^"]+)"', page):
        if name != "data:,":
            assert arena.ask(name)[0] == 200


def test_a_verdict_and_its_undoing_are_on_the_disk_when_they_are_answered(arena):
    pair = shown(arena)
    status, _, text = arena.post("judge", {"pair": pair, "choice": "left"})
    assert status == 200
    assert json.loads(text)["done"] == 1
    assert [x.pair for x in read_judgements([arena.file.path])] == [pair]
    status, _, text = arena.post("undo", {})
    assert status == 200
    assert json.loads(text)["pair"]["id"] == pair
    assert read_judgements([arena.file.path]) == []


def test_no_name_is_in_anything_that_is_served_before_the_end(arena):
    for number in range(4):
        for path in ("", "page.js", "page.css", "state"):
            _, headers, text = arena.ask(path)
            assert not any(name in text + str(headers) for name in NAMES), (number, path)
        _, _, text = arena.post("judge", {"pair": shown(arena), "choice": "tie"})
    assert all(name in text for name in NAMES)


def test_only_this_machine_can_connect(arena):
    assert arena.server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("path", ["", "page.js", "state", "nothing"])
def test_every_answer_forbids_what_the_page_does_not_need(arena, path):
    _, headers, _ = arena.ask(path)
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "same-origin"
    assert headers["Cache-Control"] == "no-store"
    assert "Access-Control-Allow-Origin" not in headers


def test_the_page_names_no_other_host(arena):
    text = "".join(arena.ask(path)[2] for path in ("", "page.js", "page.css"))
    assert "//" not in re.sub(r"(?m)^// .*|; // .*", "", text)


# -- who is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "wrong", "%C3%A9", "x" * 22])
def test_a_wrong_token_is_refused(arena, token):
    for path in ("", "state"):
        status, _, text = arena.ask(path, token=token)
        assert status == 403
        assert "Question" not in text
    body = json.dumps({"pair": shown(arena), "choice": "left"})
    headers = {"Origin": f"http://{arena.host}", "Content-Type": "application/json"}
    assert arena.ask("judge", method="POST", body=body, headers=headers, token=token)[0] == 403
    assert not read_judgements([arena.file.path])


def test_the_address_without_a_token_is_refused(arena):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://{arena.host}/", timeout=10)
    assert caught.value.code == 403
    caught.value.close()


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "[::1]:80", ""])
def test_another_host_is_refused(arena, host):
    assert arena.ask("state", headers={"Host": host})[0] == 403
    pair = shown(arena)
    headers = {"Host": host, "Origin": f"http://{host}"}
    assert arena.post("judge", {"pair": pair, "choice": "left"}, **headers)[0] == 403
    assert not read_judgements([arena.file.path])


def test_localhost_is_this_machine_too(arena):
    host = f"localhost:{arena.server.server_port}"
    assert arena.ask("state", headers={"Host": host})[0] == 200


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [
        ("Origin", None, 403),
        ("Origin", "http://evil.example", 403),
        ("Origin", "null", 403),
        ("Origin", "http://127.0.0.1", 403),
        ("Content-Type", None, 415),
        ("Content-Type", "text/plain", 415),
        ("Content-Type", "application/x-www-form-urlencoded", 415),
    ],
)
def test_what_another_page_can_send_changes_nothing(arena, header, value, status):
    for path, body in (("judge", {"pair": shown(arena), "choice": "left"}), ("undo", {})):
        assert arena.post(path, body, **{header: value})[0] == status
    assert not read_judgements([arena.file.path])


@pytest.mark.parametrize(
    "path",
    [
        "../server.py",
        "../../../../../../etc/passwd",
        "..%2fserver.py",
        "%2e%2e/server.py",
        "page.html",
        "/etc/passwd",
        "page.js?x",
        "state/",
        "..\\server.py",
    ],
)
def test_there_is_nothing_but_the_page(arena, path):
    status, _, text = arena.ask(path)
    assert status == 404
    assert json.loads(text) == {"error": "there is nothing here."}


@pytest.mark.parametrize(
    ("length", "status"),
    [
        (str(MAX_BODY_BYTES + 1), 413),
        ("9" * 30, 413),
        ("-1", 411),
        ("a", 411),
        ("٣", 411),
        (None, 411),
    ],
)
def test_a_body_that_is_too_long_or_of_no_length_is_refused_unread(arena, length, status):
    connection = http.client.HTTPConnection(*arena.host.split(":"), timeout=10)
    connection.putrequest("POST", f"/{arena.server.token}/judge")
    connection.putheader("Origin", f"http://{arena.host}")
    connection.putheader("Content-Type", "application/json")
    if length is not None:
        connection.putheader("Content-Length", length.encode())
    connection.endheaders()  # and no body: the answer comes without it
    assert connection.getresponse().status == status
    connection.close()


@pytest.mark.parametrize(
    "body",
    [
        *(None, [], 1, "left", {}, {"choice": "left"}, {"pair": 1, "choice": "left"}),
        *({"pair": "x", "choice": "up"}, {"pair": "x", "choice": ["left"]}),
    ],
)
def test_what_is_no_judgement_is_refused(arena, body):
    assert arena.post("judge", body)[0] == 400


@pytest.mark.parametrize("body", ["{", "[" * 1000, "\ud800"])
def test_what_is_no_json_is_refused(arena, body):
    headers = {"Origin": f"http://{arena.host}", "Content-Type": "application/json"}
    sent = body.encode(errors="surrogatepass")
    assert arena.ask("judge", method="POST", body=sent, headers=headers)[0] == 400


def test_a_pair_judged_in_another_window_is_said(arena):
    pair = shown(arena)
    assert arena.post("judge", {"pair": pair, "choice": "left"})[0] == 200
    status, _, text = arena.post("judge", {"pair": pair, "choice": "right"})
    assert status == 409
    assert "no longer" in json.loads(text)["error"]
    assert [x.pair for x in read_judgements([arena.file.path])] == [pair]


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "HEAD"])
def test_other_methods_do_not_exist(arena, method):
    assert arena.ask("state", method=method)[0] == 501


def test_a_port_that_is_taken_is_one_sentence(arena):
    with pytest.raises(InputError, match=r"--port \d+: cannot be had: Address already"):
        ArenaServer(arena.server.session, port=arena.server.server_port)


def test_a_browser_that_went_away_is_no_traceback_and_a_bug_is_one(arena, capsys):
    for error, says in ((BrokenPipeError(), ""), (RuntimeError("a bug"), "a bug")):
        try:
            raise error
        except type(error):
            arena.server.handle_error(None, None)
        said = capsys.readouterr().err
        assert says in said
        assert bool(said) == bool(says)


def test_a_file_that_cannot_be_written_is_said_and_the_pair_stays(arena, monkeypatch):
    pair = shown(arena)

    def full(event):
        raise StorageError("judgements.jsonl cannot be written: the disk is full.")

    monkeypatch.setattr(arena.file, "append", full)
    status, _, text = arena.post("judge", {"pair": pair, "choice": "left"})
    assert status == 507
    assert "the disk is full" in json.loads(text)["error"]
    assert shown(arena) == pair


def test_a_file_that_is_gone_at_the_end_is_said(arena):
    for _ in range(3):
        arena.post("judge", {"pair": shown(arena), "choice": "left"})
    last = shown(arena)
    arena.file.path.unlink()
    status, _, text = arena.post("judge", {"pair": last, "choice": "left"})
    assert status == 409
    assert "cannot be read" in json.loads(text)["error"]


# -- the command -----------------------------------------------------------------------------------


def test_ctrl_c_ends_the_command_cleanly_with_the_summary(tmp_path):
    folder = evaluation_folder(tmp_path / "e")
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo.cli", "arena", str(folder), "--annotator", "ann"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    try:
        said = ""
        while (found := re.search(r"Open (http://\S+)", said)) is None:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            said += line
        url = found.group(1)
        with urllib.request.urlopen(f"{url}state", timeout=10) as answer:
            pair = json.load(answer)["pair"]["id"]
        request = urllib.request.Request(
            f"{url}judge",
            data=json.dumps({"pair": pair, "choice": "tie"}).encode(),
            headers={"Origin": url[: url.index("/", 7)], "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert json.load(answer)["done"] == 1
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "Win rate of first-model against second-model  nothing decided" in out
    assert "0 won, 0 lost, 1 tied, on 1 prompts" in out
    assert len(read_judgements([folder / "judgements.jsonl"])) == 1


@pytest.fixture
def stopped_at_once(monkeypatch):
    """Ctrl-C comes before anybody judged."""

    def interrupted(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(ArenaServer, "serve_forever", interrupted)


def test_what_is_left_to_judge_and_what_is_left_out_is_said(tmp_path, stopped_at_once):
    folder = write_evaluation(
        tmp_path / "e",
        [
            *(scored(NAMES[0], i, f"x{i}") for i in range(5)),
            *(scored(NAMES[1], i, "x0" if i == 0 else f"y{i}") for i in range(3)),
        ],
    )
    said = dpo("arena", folder)
    assert said.code == 0, said.all
    assert "2 pairs to judge, 0 judged before, 1 with identical answers" in said.out
    assert "2 answers of the two have no counterpart" in said.err
    assert (folder / "judgements.jsonl").is_file()
    again = dpo("arena", folder, "--max-prompts", "1", "--out", tmp_path / "new" / "j.jsonl")
    assert re.search("[01] pairs to judge", again.out)
    assert (tmp_path / "new" / "j.jsonl").is_file()


def test_neither_name_is_printed_before_the_summary(tmp_path, stopped_at_once):
    said = dpo("arena", evaluation_folder(tmp_path / "e"))
    before, summary = said.out.split("Win rate of")
    assert not any(name in before for name in NAMES)
    assert all(name in summary for name in NAMES)


def test_summary_of_files_on_the_command_line(tmp_path):
    folder = write_evaluation(tmp_path / "e", [scored(name, 0, name) for name in NAMES])
    for annotator in ("ann", "bob"):
        file = JudgementFile(tmp_path / f"{annotator}.jsonl")
        pairs = make_pairs(read_answers([folder]), *NAMES)
        session = Session(pairs, file, annotator=annotator, seed=0)
        session.judge(pairs[0].id, "left" if pairs[0].left(0) == "a" else "right")
        file.close()
    said = dpo("arena", "--summary", tmp_path / "ann.jsonl", tmp_path / "bob.jsonl")
    assert said.code == 0
    assert "Win rate of first-model against second-model 100.0% [" in said.out
    assert "ann and bob agree 100.0% of 1 pairs" in said.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{}/missing"], "there is no such folder"),
        (["{}/e", "--a", "nobody"], "--a: nobody is called 'nobody'"),
        (["{}/e", "--temperature", "0.3"], "--temperature 0.3:"),
        (["{}/e", "--out", "{}/e/scored.jsonl"], "scored.jsonl:1: not a line of dpo arena"),
        (["{}/e", "--out", "{}/notes.txt"], "expected a name that ends in .jsonl"),
        (["--summary", "{}/e/scored.jsonl"], "scored.jsonl:1: not a line of dpo arena"),
        (["--summary", "{}/missing.jsonl"], "cannot be read"),
        (["--summary", "{}/j.jsonl", "--max-prompts", "3"], "--max-prompts: has no effect"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, words, says):
    evaluation_folder(tmp_path / "e")
    before = (tmp_path / "e" / "scored.jsonl").read_bytes()
    said = dpo("arena", *(word.format(tmp_path) for word in words))
    assert said.code == 2
    assert says in said.err
    assert len(said.err.splitlines()) == 1
    assert (tmp_path / "e" / "scored.jsonl").read_bytes() == before
