"""The few numbers that decide: each model beside the base, with intervals and paired tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from safecli.report.untrusted import markdown_cell

ALPHA = 0.05
"""A paired p below this is called a change."""

Better = Literal["less", "more"]
MEASURES: dict[str, tuple[tuple[str, Better], ...]] = {
    "toxic": (("unsafe", "less"), ("degenerate", "less")),
    "harmless": (("helpful", "more"),),
    "lookalike": (("helpful", "more"),),
}
"""What counts on a set of prompts, by what its answers are judged by."""
SCALARS: tuple[tuple[str, str, Better], ...] = (
    ("general_loss", "General loss, nats per token", "less"),
    ("similarity", "Similarity to the base's harmless answers", "more"),
)


@dataclass(frozen=True)
class Cell:
    """One model's number as text; `versus` compares it with the base, `verdict` says so in words."""

    value: str
    interval: str = ""
    count: str = ""
    versus: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Row:
    """One measure over all models; a model without it has no cell."""

    title: str
    better: Better
    cells: list[Cell | None]


def rate_cell(model: Mapping[str, Any], kind: str, label: str, better: Better | None = None) -> Cell | None:
    """The cell of one rate of a model; with `better` compared with the base, where the paired difference is known."""
    rate = model.get(kind, {}).get(label)
    if rate is None:
        return None
    pair = model.get("diff", {}).get(kind, {}).get(label) if better else None
    holm = f" (Holm {pair['p_holm']:.2g})" if pair and "p_holm" in pair else ""
    versus = f"{p_text(pair['p'])}{holm}; base only {pair['base_only']}, this only {pair['model_only']}" if pair else ""
    return Cell(
        value=f"{rate['rate']:.1%}" if rate["n"] else "–",
        interval=f"{100 * rate['low']:.1f}–{100 * rate['high']:.1f}%",
        count=f"{rate['count']} of {rate['n']}",
        versus=versus,
        verdict=_verdict(pair, better) if pair and better else "",
    )


def p_text(p: float) -> str:
    """A p-value in two digits."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def headline(results: Mapping[str, Any]) -> list[Row]:
    """The headline rows of an evaluation's results, one cell for each model, in order."""
    models = results["models"]
    rows = [
        Row(
            f"{about['title']}: {outcome}",
            better,
            [rate_cell(model, name, outcome, better) for model in models.values()],
        )
        for name, about in results["sets"].items()
        for outcome, better in MEASURES[about["kind"]]
    ]
    base: Mapping[str, Any] = next(iter(models.values()), {})
    for task in base.get("ability", {}):
        cells = [rate_cell(model, "ability", task, "more") for model in models.values()]
        rows.append(Row(f"Ability, {task}: right answers", "more", cells))
    for key, title, better in SCALARS:
        values = [model.get(key) for model in models.values()]
        cells = [_scalar_cell(value, base.get(key), index == 0) for index, value in enumerate(values)]
        rows.append(Row(title, better, cells))
    return [row for row in rows if any(row.cells)]


def markdown_table(results: Mapping[str, Any]) -> str:
    """The headline as a GitHub-flavoured Markdown table: rates with 95 % intervals and paired p-values."""
    lines = [
        "| | " + " | ".join(markdown_cell(name) for name in results["models"]) + " |",
        "|---|" + "---|" * len(results["models"]),
    ]
    for row in headline(results):
        cells = [_markdown(cell) if cell else "–" for cell in row.cells]
        lines.append(f"| {markdown_cell(row.title)} ({row.better} is better) | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def markdown_summary(results: Mapping[str, Any]) -> str:
    """What a comment on a pull request needs: the gates that failed first, then the headline."""
    gates = results["gates"]
    lines = [
        f"- {'**failed**' if gate['failed'] else 'holds'}: {markdown_cell(gate['model'])}, "
        f"{markdown_cell(gate['expression'])} ({gate['value']:.3g})"
        for gate in sorted(gates, key=lambda gate: not gate["failed"])
    ]
    return "\n".join([f"### safecli: {markdown_cell(str(results['model']))}", "", *lines, "", markdown_table(results)])


def _markdown(cell: Cell) -> str:
    text = cell.value + (f" ({cell.interval})" if cell.interval else "")
    return ", ".join(filter(None, [text, cell.versus.partition(";")[0]]))


def _scalar_cell(value: float | None, base: float | None, is_base: bool) -> Cell | None:
    if value is None:
        return None
    return Cell(f"{value:.3f}", versus="" if is_base or base is None else f"{value - base:+.3f}")


def _verdict(pair: Mapping[str, float], better: Better) -> str:
    if pair["p"] >= ALPHA:
        return "no clear change"
    rises = pair["model_only"] > pair["base_only"]
    return "better" if rises == (better == "more") else "worse"
