"""Pages in a browser: they fit, they search, they load nothing and run nothing of a model's."""

import json
import re
import shutil
from pathlib import Path

import pytest

from dpo.report.page.compare import write_comparison
from dpo.report.page.write import write_page
from train.small_runs import dpo_run, evaluation, sft_run

pytestmark = pytest.mark.browser

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
LONG_WORD = "unbreakable" * 40
WIDTHS = {"phone": 390, "desktop": 1280}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of a run, an evaluation, a comparison and a study, one of whose texts attacks."""
    folder = tmp_path_factory.mktemp("pages")
    run, judged = folder / "run", folder / "evaluation"
    shutil.copytree(dpo_run(), run)
    shutil.copytree(evaluation(), judged)
    for file in (run / "samples" / "final.jsonl", judged / "scored.jsonl"):
        poison(file)
    study = Path(__file__).parents[2] / "studies" / "results" / "losses"
    return {
        "run": write_page(run),
        "evaluation": write_page(judged),
        "comparison": write_comparison([run, sft_run()], folder / "comparison"),
        "study": write_page(shutil.copytree(study, folder / "study")),
    }


def poison(file):
    """The first response of a model becomes an attack, the second a word that cannot be broken."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    lines[0] |= {"generated": ATTACK}
    lines[1] |= {"generated": LONG_WORD}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


class Opened:
    """A page in the browser, and everything it said, asked for or popped up."""

    def __init__(self, chromium, file, **settings):
        self.context = chromium.new_context(offline=True, **settings)
        self.page = self.context.new_page()
        self.said, self.requested, self.dialogs = [], [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.on("dialog", self._dismiss)
        self.page.goto(file.as_uri())

    def _dismiss(self, dialog):
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("name", ["run", "evaluation", "comparison", "study"])
def test_a_page_fits_and_is_quiet(chromium, pages, name, width, scheme, tmp_path):
    viewport = {"width": width, "height": 900}
    with Opened(chromium, pages[name], viewport=viewport, color_scheme=scheme) as opened:
        page = opened.page
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("h1").count() == 1
        assert page.locator("#verdict p").count() >= 1
        broken = "[...document.images].filter(i => !i.complete || i.naturalWidth === 0).length"
        assert page.evaluate(broken) == 0
        picture = page.screenshot(path=tmp_path / "page.png", full_page=True)
        assert len(picture) > 20_000
        assert opened.said == []
        assert opened.dialogs == []
        loaded = [url for url in opened.requested if not url.startswith("data:")]
        assert loaded == [pages[name].as_uri()]


def luminance(page):
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


def test_a_page_follows_the_scheme_of_the_screen_and_prints_dark_on_white(chromium, pages):
    with Opened(chromium, pages["run"], color_scheme="dark") as dark:
        assert luminance(dark.page) < 60
        dark.page.emulate_media(media="print")
        assert luminance(dark.page) == 255
        assert dark.page.locator("nav").is_hidden()
        assert dark.page.pdf().startswith(b"%PDF")
    with Opened(chromium, pages["run"], color_scheme="light") as light:
        assert luminance(light.page) > 200


@pytest.mark.parametrize("name", ["run", "evaluation", "comparison"])
def test_an_attack_in_a_generation_is_shown_and_not_executed(chromium, pages, name):
    with Opened(chromium, pages[name]) as opened:
        page = opened.page
        page.fill("#query", "onerror")
        if page.locator("#temperature-filter").count():
            page.select_option("#temperature-filter", "")
        assert page.locator(".response .text", has_text=ATTACK).count() == 1
        assert page.locator(".response img").count() == 0
        assert opened.dialogs == []
        assert opened.said == []


def count(page):
    """Prompts found, by the line that says so."""
    return int(re.search(r"of (\d+) prompts", page.inner_text("#count")).group(1))


def test_samples_are_found_by_words_and_by_filters(chromium, pages):
    with Opened(chromium, pages["evaluation"]) as opened:
        page = opened.page
        all_of_them = count(page)
        assert all_of_them == 12
        prompt = page.locator(".sample .prompt").first.inner_text()
        page.fill("#query", prompt.upper())
        assert 1 <= count(page) < all_of_them
        page.fill("#query", "no text has these words")
        assert count(page) == 0
        assert page.locator(".sample").count() == 0
        page.fill("#query", "")
        page.select_option("#model-filter", "dpo")
        page.select_option("#temperature-filter", "0.5")
        names = page.locator(".response:not(.given) h3").all_inner_texts()
        assert names
        assert all(name.startswith("dpo at 0.5") for name in names)
        found = 0
        for verdict in page.locator("#verdict-filter option").all_inner_texts()[1:]:
            page.select_option("#verdict-filter", verdict)
            found += count(page)
        assert found == all_of_them  # every response has one verdict


def test_more_samples_come_when_asked_for(chromium, pages):
    with Opened(chromium, pages["evaluation"]) as opened:
        page = opened.page
        assert page.locator(".sample").count() == 10
        page.click("#more")
        assert page.locator(".sample").count() == 12
        assert page.locator("#more").is_hidden()
