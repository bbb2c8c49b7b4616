"""The pages in a real Chromium: no error, no request leaves, nothing a screen reader can't use, hostile text inert."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_report import HOSTILE, answer
from test_report import results as results  # the fixture

from safecli.records import Row, read_jsonl
from safecli.report import write_report
from safecli.report.map import write_map
from safecli.report.review import ReviewServer

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")]


@pytest.fixture(params=["light", "dark"])
def tab(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A tab that keeps what it logs and every address that it asks for."""
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(color_scheme=request.param, viewport={"width": 1100, "height": 900})
        page.logged, page.asked = [], []
        page.on("console", lambda message: page.logged.append(message.text))
        page.on("pageerror", lambda error: page.logged.append(str(error)))
        page.on("dialog", lambda dialog: (page.logged.append("dialog"), dialog.dismiss()))
        page.on("request", lambda asked: page.asked.append(asked.url))
        yield page
        browser.close()


def serious(page: Any) -> list[str]:
    """What axe-core finds that keeps somebody from using the page."""
    found = axe.Axe().run(page).response["violations"]
    return [f"{one['id']}: {one['nodes'][0]['html']}" for one in found if one["impact"] in ("serious", "critical")]


def test_the_report_of_thousands_of_hostile_answers(tab: Any, results: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        answer(f"{HOSTILE[n % len(HOSTILE)]} number {n}", model, id=f"t{n}", prompt=HOSTILE[n % len(HOSTILE)])
        for n in range(2500)
        for model in ("base", "tuned")
    ]
    metrics = [{"round": 0, "step": step, "loss": 1 / step} for step in range(1, 9)]
    write_report(results, rows, metrics, tmp_path / "report.html")
    tab.goto((tmp_path / "report.html").as_uri())
    assert tab.locator("#shown").text_content() == "2500 of 2500 prompts"
    tab.fill("input[name=words]", "number 2499")
    assert tab.locator("#shown").text_content() == "1 of 2500 prompts"
    shown = tab.locator("#prompts > li:not([hidden])")
    assert not shown.locator(".text.prompt").is_visible()  # toxic text stays folded
    shown.locator("summary").focus()
    tab.keyboard.press("Enter")
    assert shown.locator(".text.prompt").is_visible()
    assert serious(tab) == []
    assert tab.logged == []
    assert tab.asked == [(tmp_path / "report.html").as_uri()]


def test_labels_are_made_by_keyboard(tab: Any, tmp_path: Path) -> None:
    rows = [(Row(f"a:{n}", {}, text, text), "toxic") for n, text in enumerate(HOSTILE)]
    with ReviewServer(rows, tmp_path / "labels.jsonl") as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        tab.goto(server.url)
        playwright.expect(tab.locator("#progress")).to_have_text(f"1 of {len(HOSTILE)}, 0 labelled")
        tab.keyboard.press("4")
        playwright.expect(tab.locator("#progress")).to_have_text(f"2 of {len(HOSTILE)}, 1 labelled")
        tab.keyboard.press("ArrowLeft")
        playwright.expect(tab.locator("[aria-pressed=true]")).to_have_text("4 refused")
        assert serious(tab) == []
        server.shutdown()
        thread.join()
    assert [row["label"] for _, row in read_jsonl(tmp_path / "labels.jsonl")] == ["refused"]
    assert tab.logged == []
    assert all(asked.startswith(server.url) for asked in tab.asked)


def test_the_map_of_hostile_tokens(tab: Any, tmp_path: Path) -> None:
    texts = [f"{HOSTILE[n % len(HOSTILE)]} {n}" for n in range(3000)]
    make = torch.Generator().manual_seed(0)
    costs = {texts[0]: torch.rand(3000, generator=make) + 0.5, " good": torch.rand(3000, generator=make)}
    costs[texts[0]][0] = 0
    places = torch.randn(3000, 2, generator=make)
    write_map(HOSTILE[0], "features", texts, range(3000), places, costs, tmp_path / "map.html")
    tab.goto((tmp_path / "map.html").as_uri())
    assert tab.locator("#rows tr").count() == 30
    assert tab.locator("#rows tr").first.locator("td").nth(2).text_content() == "0.000"
    tab.fill("#words", " 2999")
    assert tab.locator("#found").text_content() == "1 found, 1 shown"
    before = tab.evaluate("document.getElementById('map').toDataURL()")
    tab.select_option("#chosen", "1")
    assert tab.evaluate("document.getElementById('map').toDataURL()") != before
    tab.locator("#map").hover()
    assert "id " in tab.locator("#under").text_content()
    assert serious(tab) == []
    assert tab.logged == []
    assert tab.asked == [(tmp_path / "map.html").as_uri()]
