"""The report: every number shown, nothing from outside, and hostile answers that stay text."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from safecli.config import Kind
from safecli.judges import SUMS, outcomes_of
from safecli.report import markdown_summary, markdown_table, write_junit, write_report
from safecli.report.plots import curves, stacked
from safecli.report.untrusted import visible
from safecli.stats import mcnemar, rate

HOSTILE = [
    "</p></div></details><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"' onmouseover=alert(1) x='\"",
    "</style><style>body{display:none}</style>",
    "{{ 7 * 7 }}{% raw %}",
    "<!-- --> ]]> &lt;b&gt; &#x202e;",
    "\x1b[31mred\x1b[0m \x00\x07\x9b",
    "\u202efdp.exe\u2066 \u200bzero\ufeff \U000e0041tag",
    "\ud800 alone",
    "javascript:alert(1) https://example.com/evil.png",
]
KINDS: tuple[Kind, ...] = ("toxic", "harmless", "lookalike")


def counted(kind: Kind, counts: list[int]) -> dict[str, Any]:
    by = dict(zip(outcomes_of(kind), counts, strict=True))
    sums = {name: sum(by[part] for part in parts) for name, parts in SUMS.items()} if kind == "toxic" else {}
    return {name: rate(count, sum(counts)) for name, count in {**by, **sums}.items()}


@pytest.fixture
def results() -> dict[str, Any]:
    base = {
        "toxic": counted("toxic", [40, 17, 13, 3, 7]),
        "harmless": counted("harmless", [31, 4, 2, 3]),
        "lookalike": counted("lookalike", [29, 5, 5, 1]),
        "general_loss": 1.234,
        "similarity": 1.0,
    }
    tuned: dict[str, Any] = {
        "toxic": counted("toxic", [11, 8, 33, 22, 6]),
        "harmless": counted("harmless", [30, 5, 4, 1]),
        "lookalike": counted("lookalike", [27, 6, 4, 3]),
        "general_loss": 1.267,
        "similarity": 0.876,
    }
    pairs = {("toxic", "unsafe"): (40, 2), ("toxic", "degenerate"): (4, 3), ("harmless", "helpful"): (3, 2)}
    tuned["diff"] = {kind: {} for kind, _ in pairs}
    for (kind, label), (lost, gained) in pairs.items():
        tuned["diff"][kind][label] = {"base_only": lost, "model_only": gained, "p": mcnemar(lost, gained)}
    return {
        "format": 1,
        "safecli": "0.1.0",
        "created": "2025-11-25T00:00:00Z",
        "seed": 0,
        "model": "demo",
        "options": {"max_new_tokens": 64},
        "sets": {kind: {"title": f"{kind.capitalize()} prompts", "kind": kind} for kind in KINDS},
        "models": {"base": base, "tuned": tuned},
        "gates": [{"expression": "toxic.unsafe > 0.2", "model": "tuned", "value": 0.2375, "failed": True}],
    }


def answer(text: str, model: str = "base", outcome: str = "complied", **over: Any) -> dict[str, Any]:
    row = {
        "model": model,
        "set": "toxic",
        "id": "t1",
        "prompt": "a prompt",
        "answer": text,
        "outcome": outcome,
    }
    return {**row, "score": 0.5, "reasons": ["a reason"], **over}


class Page(HTMLParser):
    """The elements, with their attributes, and the text of each, as a browser would read them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.code: dict[str, str] = {}
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.code[self.cdata_elem] = self.code.get(self.cdata_elem, "") + data
        else:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


Rows = list[dict[str, Any]]


def render(tmp_path: Path, results: dict[str, Any], answers: Rows, metrics: Rows) -> Page:
    path = tmp_path / "report.html"
    write_report(results, answers, metrics, path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    return Page(path.read_text(encoding="utf-8"))


def test_shows_every_number(tmp_path: Path, results: dict[str, Any]) -> None:
    text = " ".join("".join(render(tmp_path, results, [], []).text).split())
    for model in results["models"].values():
        for name in KINDS:
            for cell in model[name].values():
                assert f"{cell['rate']:.1%}" in text
                assert f"{100 * cell['low']:.1f}–{100 * cell['high']:.1f}%, {cell['count']} of {cell['n']}" in text
        assert f"{model['general_loss']:.3f}" in text
        assert f"{model['similarity']:.3f}" in text
    pairs = [pair for found in results["models"]["tuned"]["diff"].values() for pair in found.values()]
    assert len(pairs) == 3
    for pair in pairs:
        assert f"base only {pair['base_only']}, this only {pair['model_only']}" in text
    for words in (
        "p < 0.0001",
        "p = 1",
        "+0.033",
        "0.2375",
        "1 of 1 gates failed",
        "better",
        "no clear change",
    ):
        assert words in text


def test_says_worse_when_it_is_worse(tmp_path: Path, results: dict[str, Any]) -> None:
    worse = {"base_only": 0, "model_only": 9, "p": mcnemar(0, 9)}
    results["models"]["tuned"]["diff"] = {"toxic": {"degenerate": worse}}
    verdicts = [span["class"] for span in render(tmp_path, results, [], []).all("span") if span.get("class")]
    assert [verdict for verdict in verdicts if verdict and verdict.startswith("verdict")] == ["verdict worse"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(tmp_path: Path, results: dict[str, Any], text: str) -> None:
    calm = render(tmp_path, results, [answer("calm"), answer("calm", "tuned")], [{"step": 1, "loss": 1.0}])
    results["models"][text] = results["models"].pop("tuned")
    results["gates"][0] |= {"expression": text, "model": text}
    results |= {
        "model": text,
        "created": text,
        "options": {text: text},
    }
    row: dict[str, Any] = {"outcome": text, "set": text, "id": text, "prompt": text, "reasons": [text]}
    page = render(tmp_path, results, [answer(text, **row), answer(text, text, **row)], [{"step": 1, text: 1.0}])

    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in calm.elements}
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert page.code == calm.code
    names = {name for _, attrs in page.elements for name in attrs}
    assert names <= {name for _, attrs in calm.elements for name in attrs}
    assert not any(name.startswith("on") for name in names)
    assert visible(text) in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ufeff]", page.source)


def test_is_one_file_with_a_strict_policy(tmp_path: Path, results: dict[str, Any]) -> None:
    page = render(tmp_path, results, [answer("x")], [{"step": 1, "loss": 1.0}])
    assert not re.search(r"https?:|url\(|@import|<link|<iframe|<img", page.source)
    assert not any({"src", "style"} & set(attrs) for _, attrs in page.elements)
    assert all(str(link["href"]).startswith("#") for link in page.all("a"))
    policy = str(page.all("meta")[1]["content"])
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.code[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_every_id_is_used_once_and_every_reference_is_met(tmp_path: Path, results: dict[str, Any]) -> None:
    page = render(tmp_path, results, [answer("x")], [{"step": 1, "loss": 1.0}])
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {str(link["href"])[1:] for link in page.all("a")} <= set(ids)
    assert {attrs["aria-labelledby"] for _, attrs in page.elements if "aria-labelledby" in attrs} <= set(ids)
    assert page.all("html") == [{"lang": "en"}]
    assert all({"aria-label", "aria-labelledby"} & set(svg) for svg in page.all("svg"))


def test_answers_stand_side_by_side_base_first(tmp_path: Path, results: dict[str, Any]) -> None:
    rows = [
        answer("safer words", "tuned", "refused"),
        answer("first words"),
        answer("same", set="harmless", id="h1", outcome="helpful"),
        answer("same", "tuned", set="harmless", id="h1", outcome="helpful"),
    ]
    page = render(tmp_path, results, rows, [])
    assert "".join(page.text).index("first words") < "".join(page.text).index("safer words")
    toxic, harmless = (item for item in page.all("li") if "data-set" in item)
    assert toxic == {"data-set": "toxic", "data-outcomes": "complied refused", "data-changed": "yes"}
    assert harmless == {"data-set": "harmless", "data-outcomes": "helpful helpful"}
    folded, open_ = [fold for fold in page.all("details")][-3:-1]
    assert "open" not in folded
    assert "open" in open_


def test_renders_with_little_or_nothing(tmp_path: Path, results: dict[str, Any]) -> None:
    del (
        results["models"]["tuned"]["toxic"],
        results["models"]["base"]["lookalike"],
        results["gates"],
    )
    page = render(tmp_path, results, [], [])
    assert "tuned" in page.text
    assert not page.all("script")
    results["models"] = {"base": {"toxic": counted("toxic", [0, 0, 0, 0, 0])}}
    assert "–" in render(tmp_path, results, [], []).text


def test_holds_thousands_of_rows(tmp_path: Path, results: dict[str, Any]) -> None:
    rows = [answer("words " * 40, model, id=f"t{index}") for model in ("base", "tuned") for index in range(2500)]
    page = render(tmp_path, results, rows, [])
    assert sum("data-set" in item for item in page.all("li")) == 2500


def test_curves_take_the_numbers_that_are_there() -> None:
    metrics: list[dict[str, Any]] = [
        {"step": 0, "round": 0, "loss": 3.0, "note": "x", "flag": True, "flat": 2},
        {"step": 10, "round": 0, "loss": float("nan"), "flat": 2},
        {"step": 20, "round": 1, "loss": 1.0, "late": None},
    ]
    loss, flat = curves(metrics)
    assert (loss.name, flat.name) == ("loss", "flat")
    assert loss.points == [(0.0, 1.0), (1.0, 0.0)]
    assert (loss.low, loss.high, loss.first, loss.last, loss.steps) == (1.0, 3.0, 3.0, 1.0, (0.0, 20.0))
    assert loss.rounds == [1.0]
    assert flat.points == [(0.0, 0.0), (0.5, 0.0)]
    assert curves([]) == []


def test_rounds_follow_each_other_though_each_counts_its_own_steps() -> None:
    (loss,) = curves([{"round": r, "step": step, "loss": float(step)} for r in (0, 1, 2) for step in (0, 5, 10)])
    assert loss.steps == (0.0, 30.0)
    assert [round(30 * x) for x, _ in loss.points] == [0, 5, 10, 10, 15, 20, 20, 25, 30]
    assert [round(30 * x) for x in loss.rounds] == [10, 20]


def test_stacked_bars_fill_the_width() -> None:
    bar = stacked(counted("toxic", [1, 0, 2, 0, 1]), outcomes_of("toxic"))
    assert [(part.outcome, part.start, part.width) for part in bar] == [
        ("complied", 0.0, 25.0),
        ("deflected", 25.0, 50.0),
        ("degenerate", 75.0, 25.0),
    ]


def test_every_outcome_has_a_colour(tmp_path: Path, results: dict[str, Any]) -> None:
    style = render(tmp_path, results, [], []).code["style"]
    for outcome in {*outcomes_of("toxic"), *outcomes_of("harmless")}:
        assert f'[data-outcome="{outcome}"]' in style


def test_markdown_table(results: dict[str, Any]) -> None:
    results["models"]["a|b\n<b>*x*"] = results["models"].pop("tuned")
    lines = markdown_table(results).splitlines()
    assert lines[0] == r"| | base | a\|b \<b\>\*x\* |"
    assert lines[1] == "|---|---|---|"
    assert lines[2] == (
        "| Toxic prompts: unsafe (less is better) | 71.2% (60.5–80.0%) | 23.8% (15.8–34.1%), p < 0.0001 |"
    )
    assert lines[-2] == "| General loss, nats per token (less is better) | 1.234 | 1.267, +0.033 |"
    assert len(lines) == 8


def test_summary_says_first_what_failed(results: dict[str, Any]) -> None:
    held = {"expression": "toxic.unsafe.high > 0.9", "model": "tuned", "value": 0.34, "failed": False}
    results["gates"].insert(0, held)
    lines = markdown_summary(results).splitlines()
    assert lines[:4] == [
        "### safecli: demo",
        "",
        r"- **failed**: tuned, toxic.unsafe \> 0.2 (0.237)",
        r"- holds: tuned, toxic.unsafe.high \> 0.9 (0.34)",
    ]
    assert markdown_summary(results).endswith(markdown_table(results))


@pytest.mark.parametrize("model", ["tuned", *HOSTILE])
def test_junit_tells_ci_what_failed(tmp_path: Path, results: dict[str, Any], model: str) -> None:
    results["gates"][0]["model"] = model
    results["gates"].append({"expression": "general_loss > 2", "model": model, "value": 1.3, "failed": False})
    write_junit(results, tmp_path / "junit.xml")
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert suite.attrib == {"name": "safecli", "tests": "2", "failures": "1"}
    failed, held = suite.findall("testcase")
    assert failed.get("classname") == f"safecli.{visible(model)}"
    assert "it is 0.2375" in (failed.find("failure").get("message") or "")
    assert held.find("failure") is None


def test_visible_keeps_what_people_write() -> None:
    text = "naïve\tΑθήνα\nمی‌خواهم 👩‍💻 ❤️ 日本語"
    assert visible(text) == text
    assert visible("\x1b[0m\u202e\ud800") == "⟨U+001B⟩[0m⟨U+202E⟩⟨U+D800⟩"


def test_shows_rates_by_category(tmp_path: Path, results: dict[str, Any]) -> None:
    for model in results["models"].values():
        model["categories"] = {"toxic": {"role_play": model["toxic"]}}
    text = " ".join("".join(render(tmp_path, results, [], []).text).split())
    assert "Toxic prompts by category: unsafe" in text
    assert "role play" in text
