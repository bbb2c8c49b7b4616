"""The report: one HTML file that needs no network, and that a hostile answer can't act in.

Everything that a model, a prompt file or the user wrote passes Jinja's autoescape and `visible`; the only
script and style are those beside this file, and a content security policy admits nothing but their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from safecli.artifacts import atomic
from safecli.judges import HARMLESS_OUTCOMES, TOXIC_OUTCOMES, decides
from safecli.report.headline import Cell, headline, rate_cell
from safecli.report.plots import Segment, curves, stacked, trade_off
from safecli.report.untrusted import visible

_HERE = Path(__file__).parent


def write_report(
    results: Mapping[str, Any],
    answers: Sequence[Mapping[str, Any]],
    metrics: Sequence[Mapping[str, Any]],
    path: Path,
) -> None:
    """Write the page of an evaluation to `path`, whole or not at all.

    `results` is what results.json holds; `answers` one row for each prompt and model (model, set, id, prompt,
    answer, outcome, score, reasons); `metrics` the rows that training logged, empty if none ran here.
    """
    models = results["models"]
    write_page(
        path,
        "page",
        results=results,
        models=list(models),
        options=json.dumps(results.get("options", {}), indent=2, ensure_ascii=False, default=str),
        gates=results.get("gates", []),
        headline=headline(results),
        tables=[table for name, about in results["sets"].items() if (table := _table(name, about, models))],
        trade_off=trade_off(models),
        curves=curves(metrics),
        prompts=_side_by_side(answers, list(models), results["sets"]),
        outcomes=list(dict.fromkeys(row["outcome"] for row in answers)),
        sets={name: about["title"] for name, about in results["sets"].items()},
    )


def write_page(path: Path, name: str, **values: Any) -> None:
    """Fill the template `name`.html with values, and with the style and script beside it, which alone may act."""
    style, script = ((_HERE / f"{name}.{ending}").read_text(encoding="utf-8") for ending in ("css", "js"))
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(f"{name}.html").render(
        **values,
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"style-src '{csp_hash(style)}'; script-src '{csp_hash(script)}'",
    )
    with atomic(path) as beside:
        beside.write_text(page, encoding="utf-8")


@dataclass(frozen=True)
class _Table:
    """One set of prompts: a stacked bar for each model that has it, and every outcome's numbers."""

    title: str
    outcomes: tuple[str, ...]
    bars: list[tuple[str, list[Segment]]]
    rows: list[tuple[str, list[Cell | None]]]
    category_of: str
    categories: list[tuple[str, list[Cell | None]]]


def _table(name: str, about: Mapping[str, str], models: Mapping[str, Any]) -> _Table | None:
    having = {label: model[name] for label, model in models.items() if name in model}
    if not having:
        return None
    known = TOXIC_OUTCOMES if about["kind"] == "toxic" else HARMLESS_OUTCOMES
    keys = dict.fromkeys([*known, *(key for rates in having.values() for key in rates)])
    return _Table(
        title=about["title"],
        outcomes=known,
        bars=[(label, stacked(rates, known)) for label, rates in having.items()],
        rows=[(key, [rate_cell(model, name, key) for model in models.values()]) for key in keys],
        category_of=decides(about["kind"]),
        categories=_categories(name, decides(about["kind"]), models),
    )


def _categories(name: str, label: str, models: Mapping[str, Any]) -> list[tuple[str, list[Cell | None]]]:
    """One rate of every category of a set, one cell for each model."""
    by_model = [model.get("categories", {}).get(name, {}) for model in models.values()]
    found = dict.fromkeys(category for by in by_model for category in by)
    return [(category, [rate_cell(by, category, label) for by in by_model]) for category in found]


@dataclass(frozen=True)
class _Prompt:
    """One prompt with every model's row for it; folded unless its set is known to be harmless to read."""

    set: str
    id: str
    prompt: str
    folded: bool
    rows: list[Mapping[str, Any]]

    @property
    def outcomes(self) -> list[str]:
        return [row["outcome"] for row in self.rows]

    @property
    def changed(self) -> bool:
        return len(set(self.outcomes)) > 1


def _side_by_side(
    answers: Sequence[Mapping[str, Any]], models: Sequence[str], sets: Mapping[str, Mapping[str, str]]
) -> list[_Prompt]:
    place = {name: index for index, name in enumerate(models)}
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in sorted(answers, key=lambda row: place.get(row["model"], len(place))):
        grouped.setdefault((row["set"], row["id"]), []).append(row)
    return [
        _Prompt(name, key, rows[0]["prompt"], sets.get(name, {}).get("kind", "toxic") == "toxic", rows)
        for (name, key), rows in grouped.items()
    ]


def csp_hash(text: str) -> str:
    """The source expression that lets a content security policy admit exactly this inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
