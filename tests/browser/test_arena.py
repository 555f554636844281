"""The arena's page in a real browser: keys in, lines of judgements out, and nothing of the models'
text acts.
"""

from __future__ import annotations

import json
import re
import threading
from types import SimpleNamespace

import pytest

from arena_folders import NAMES, evaluation_folder, scored, write_evaluation
from dpo.evaluate.arena.judgements import JudgementFile, read_judgements
from dpo.evaluate.arena.pairs import deal, make_pairs, read_answers
from dpo.evaluate.arena.server import ArenaServer
from dpo.evaluate.arena.session import Session

pytestmark = pytest.mark.browser

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 800}


@pytest.fixture
def sit_down(tmp_path, chromium):
    """Opens the page on a folder; closes all at the end."""
    opened = []

    def sit(folder=None, *, seed=0, size=DESK, **options):
        folder = folder or evaluation_folder(tmp_path / "e")
        file = JudgementFile(folder / "judgements.jsonl")
        pairs = deal(make_pairs(read_answers([folder]), *NAMES), seed=seed)
        server = ArenaServer(Session(pairs, file, annotator="ann", seed=seed))
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        context = chromium.new_context(viewport=size, **options)
        page = context.new_page()
        asked, complaints = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))

        def stop():
            if thread.is_alive():
                server.shutdown()
                thread.join()
                server.server_close()
                file.close()

        def leave():
            context.close()
            stop()

        opened.append(leave)
        page.goto(server.url)
        page.locator("#choices").wait_for()
        return SimpleNamespace(
            page=page,
            path=file.path,
            server=server,
            asked=asked,
            complaints=complaints,
            stop=stop,
            leave=leave,
        )

    yield sit
    for leave in opened:
        leave()


def press(arena, key, *, expect):
    """Press a key and wait until the page says how far it is."""
    arena.page.keyboard.press(key)
    wait_for(arena.page, expect)


def wait_for(page, count):
    page.locator("#count", has_text=re.compile(f"^{count}$")).wait_for()


def test_keys_become_lines(sit_down):
    arena = sit_down()
    shown = []
    for number, key in enumerate(("ArrowLeft", "2", "ArrowDown", "s"), 1):
        shown.append({x: arena.page.inner_text(f"#{x}") for x in ("prompt", "left", "right")})
        press(arena, key, expect=f"{number + 1} of 4" if number < 4 else "4 judged")
    lines = [json.loads(line) for line in arena.path.read_text().splitlines()]
    assert len(lines) == 4
    for line, seen in zip(lines, shown, strict=True):
        number = seen["prompt"].removeprefix("Question ").removesuffix("?")
        of_a, of_b = f"Answer x{number}.", f"Answer y{number}."
        expected = (of_a, of_b) if line["left"] == "a" else (of_b, of_a)
        assert (seen["left"], seen["right"]) == expected
    first, second, third, fourth = lines
    assert first["verdict"] == ("win" if first["left"] == "a" else "loss")
    assert second["verdict"] == ("loss" if second["left"] == "a" else "win")
    assert (third["verdict"], fourth["verdict"]) == ("tie", "skip")
    assert all(line["seconds"] >= 0 and line["annotator"] == "ann" for line in lines)
    assert arena.complaints == []


@pytest.mark.parametrize(
    ("key", "choice"),
    [
        *(("1", "left"), ("ArrowLeft", "left"), ("2", "right"), ("ArrowRight", "right")),
        *(("0", "tie"), ("ArrowDown", "tie"), ("s", "skip")),
    ],
)
def test_every_key_says_what_it_says(sit_down, key, choice):
    arena = sit_down()
    press(arena, key, expect="2 of 4")
    (line,) = [json.loads(line) for line in arena.path.read_text().splitlines()]
    side = {"left": line["left"], "right": "b" if line["left"] == "a" else "a"}.get(choice)
    assert line["verdict"] == {"a": "win", "b": "loss", None: choice}[side]


def test_u_takes_the_last_back_and_a_reload_goes_on(sit_down):
    arena = sit_down()
    first = arena.page.inner_text("#prompt")
    press(arena, "1", expect="2 of 4")
    press(arena, "u", expect="1 of 4")
    assert arena.page.inner_text("#prompt") == first
    assert read_judgements([arena.path]) == []
    press(arena, "2", expect="2 of 4")
    second = arena.page.inner_text("#prompt")
    arena.page.reload()
    wait_for(arena.page, "2 of 4")
    assert arena.page.inner_text("#prompt") == second
    arena.leave()
    again = sit_down(arena.path.parent)
    assert again.page.inner_text("#count") == "2 of 4"
    assert again.page.inner_text("#prompt") == second


def test_a_key_held_down_or_pressed_with_another_is_no_second_verdict(sit_down):
    arena = sit_down()
    arena.page.keyboard.down("1")
    wait_for(arena.page, "2 of 4")
    arena.page.keyboard.down("1")  # it repeats
    arena.page.keyboard.up("1")
    for other in ("Control+0", "Alt+2", "x", "Enter"):
        arena.page.keyboard.press(other)
    press(arena, "0", expect="3 of 4")
    verdicts = [x.verdict for x in read_judgements([arena.path])]
    assert len(verdicts) == 2
    assert verdicts[1] == "tie"


def test_the_names_come_with_the_numbers_at_the_end(sit_down):
    arena = sit_down()
    for expect in ("2 of 4", "3 of 4", "4 of 4"):
        assert not any(name in arena.page.content() for name in NAMES)
        press(arena, "1", expect=expect)
    assert not any(name in arena.page.content() for name in NAMES)
    press(arena, "1", expect="4 judged")
    assert arena.page.inner_text("h1") == "All judged"
    assert "Win rate of first-model against second-model" in arena.page.inner_text("#summary")
    lines = arena.path.read_bytes()
    arena.page.keyboard.press("1")  # there is nothing left to judge
    press(arena, "u", expect="4 of 4")
    assert arena.path.read_bytes().count(b"\n") == lines.count(b"\n") + 1
    assert arena.page.is_visible("#judging")


def test_buttons_do_what_keys_do_and_are_called_so(sit_down):
    arena = sit_down()
    page = arena.page
    assert page.get_by_role("button", name="Undo").get_attribute("aria-disabled") == "true"
    page.get_by_role("button", name="1 is better").click()
    wait_for(page, "2 of 4")
    assert page.get_by_role("status").inner_text() == "2 of 4"
    assert page.evaluate("document.activeElement.id") == "title"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the first button
    wait_for(page, "3 of 4")
    page.get_by_role("button", name="Undo").click()
    wait_for(page, "2 of 4")
    first, second = [json.loads(line) for line in arena.path.read_text().splitlines()][:2]
    assert first["verdict"] == ("win" if first["left"] == "a" else "loss")
    assert second["verdict"] == ("win" if second["left"] == "a" else "loss")


HOSTILE = (
    "<script>window.acted = 1</script><img src=x onerror='window.acted = 1'>"
    "<style>body { display: none }</style></p></main><h1>Mine</h1>&amp;\u202edésrever\x00"
)


def test_hostile_text_is_only_text(sit_down, tmp_path):
    records = [
        scored(name, 0, f"{letter} {HOSTILE}", prompt=HOSTILE)
        for name, letter in zip(NAMES, "xy", strict=True)
    ]
    arena = sit_down(write_evaluation(tmp_path / "hostile", records))
    page = arena.page
    seen = HOSTILE.replace("\u202e", "\\u202e").replace("\x00", "\\x00")
    assert page.text_content("#prompt") == seen
    assert {page.text_content("#left"), page.text_content("#right")} == {f"x {seen}", f"y {seen}"}
    assert page.evaluate("window.acted") is None
    assert page.evaluate("document.scripts.length") == 1
    assert page.locator("h1, img, style").count() == 1
    assert page.is_visible("#prompt")
    press(arena, "1", expect="1 judged")
    assert page.evaluate("window.acted") is None
    assert arena.complaints == []


def test_a_right_to_left_answer_stays_in_its_place(sit_down, tmp_path):
    texts = ("שלום עולם (abc)", "left to right")
    records = [scored(name, 0, text) for name, text in zip(NAMES, texts, strict=True)]
    arena = sit_down(write_evaluation(tmp_path / "rtl", records))
    directions = {
        arena.page.text_content(f"#{x}"): arena.page.evaluate(
            "id => getComputedStyle(document.getElementById(id)).direction", x
        )
        for x in ("left", "right")
    }
    assert directions == {texts[0]: "rtl", texts[1]: "ltr"}


def test_nothing_is_asked_of_another_host(sit_down):
    arena = sit_down()
    press(arena, "1", expect="2 of 4")
    assert len(arena.asked) >= 5
    assert all(url.startswith((arena.server.url, "data:,")) for url in arena.asked)


def test_a_page_of_another_origin_can_neither_read_nor_judge(sit_down):
    """Even one that knows the address: `localhost` is another origin than `127.0.0.1`."""
    arena = sit_down()
    url = arena.server.url
    stranger = arena.page.context.new_page()
    stranger.goto(url.replace("127.0.0.1", "localhost"))
    said = stranger.evaluate(
        """async url => {
            const options = [{}, {method: "POST", body: "{}"}, {method: "POST", mode: "no-cors"}];
            const said = [];
            for (const option of options)
                said.push(await fetch(url, option).then(r => r.status, () => "refused"));
            return said;
        }""",
        f"{url}undo",
    )
    assert said == ["refused"] * 3
    assert read_judgements([arena.path]) == []


def test_a_second_window_that_is_behind_catches_up(sit_down):
    arena = sit_down()
    behind = arena.page.context.new_page()
    behind.goto(arena.server.url)
    wait_for(behind, "1 of 4")
    press(arena, "1", expect="2 of 4")
    behind.keyboard.press("2")
    wait_for(behind, "2 of 4")
    assert "no longer the one to judge" in behind.get_by_role("alert").inner_text()
    assert len(read_judgements([arena.path])) == 1
    behind.keyboard.press("2")
    wait_for(behind, "3 of 4")
    assert behind.locator("#error").is_hidden()


def test_an_arena_that_was_stopped_is_said(sit_down):
    arena = sit_down()
    arena.stop()
    arena.page.keyboard.press("1")
    arena.page.wait_for_selector("#error:not([hidden])")
    assert "was stopped" in arena.page.get_by_role("alert").inner_text()


# -- how it looks ----------------------------------------------------------------------------------

LONG = "A sentence that goes on. " * 60 + "x" * 300


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_long_answers_fit_the_width_and_the_choices_stay_in_sight(sit_down, tmp_path, size):
    records = [scored(name, 0, name[0] + LONG, prompt=LONG) for name in NAMES]
    arena = sit_down(write_evaluation(tmp_path / "long", records), size=size)
    assert arena.page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    boxes = {x: arena.page.locator(f"#{x}").bounding_box() for x in ("left", "right", "choices")}
    bottom = boxes["choices"]["y"] + boxes["choices"]["height"]
    assert bottom == pytest.approx(size["height"], abs=1)
    beside = boxes["left"]["y"] == boxes["right"]["y"]
    assert beside == (size is DESK)


CONTRAST = """() => {
    const canvas = document.createElement("canvas").getContext("2d");
    const light = text => {
        canvas.fillStyle = text;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
            .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const style = getComputedStyle(document.documentElement);
    const contrast = (a, b) => {
        const [x, y] = [a, b].map(v => light(style.getPropertyValue(v))).sort((x, y) => y - x);
        return (x + 0.05) / (y + 0.05);
    };
    return [["--ink", "--paper"], ["--ink", "--card"], ["--muted", "--paper"],
            ["--muted", "--card"], ["--on-accent", "--accent"], ["--alarm", "--paper"]]
        .map(([a, b]) => contrast(a, b));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa_in_light_and_dark(sit_down, scheme):
    arena = sit_down(color_scheme=scheme)
    ratios = arena.page.evaluate(CONTRAST)
    assert min(ratios) >= 4.5
    paper = arena.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(251, 250, 248)") == (scheme == "light")
