"""What answers add up to: rates with intervals, paired differences to the base, the judge's own errors taken out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from safecli.config import Kind
from safecli.errors import InputError
from safecli.judges import SUMS, Judge, Pair, decides, outcomes_of
from safecli.models import minilm
from safecli.records import SETS, Response, read_rows
from safecli.stats import (
    any_of,
    corrected_rate,
    holm,
    mcnemar,
    over_seeds,
    paired_bootstrap,
    paired_difference,
    rate,
    sampled_rate,
)

SHIPPED_SETS: Mapping[str, Kind] = {kind: kind for kind in SETS}
"""The sets that are measured on unless told otherwise, each named as what its answers are judged by."""


def labels_of(kind: Kind) -> dict[str, tuple[str, ...]]:
    """What is counted on prompts of this kind: every outcome, and the sums with the outcomes they are made of."""
    labels: dict[str, tuple[str, ...]] = {outcome: (outcome,) for outcome in outcomes_of(kind)}
    return labels | SUMS if kind == "toxic" else labels


def summarise(
    answers: dict[str, list[Response]], losses: dict[str, float | None], sets: Mapping[str, Kind] = SHIPPED_SETS
) -> dict[str, dict[str, Any]]:
    """Rates of every outcome and sum by model and set, with general loss and similarity to the base's answers.

    A model that is not the base has a `diff` of the same shape: its paired differences to the base. Where prompts have
    categories, `categories` holds the rates by set and category.
    """
    similar = _similarity(answers)
    found: dict[str, dict[str, Any]] = {}
    for name, responses in answers.items():
        differences: dict[str, Any] = {}
        found[name] = {}
        for part, kind in sets.items():
            outcomes, before = _by_prompt(responses, part), _by_prompt(answers["base"], part)
            if not outcomes:
                continue
            found[name][part], differences[part] = _rates(list(outcomes.values()), kind), {}
            for label, members in labels_of(kind).items() if name != "base" else ():
                has, had = ([_hits(of[key], members) for key in outcomes] for of in (outcomes, before))
                differences[part][label] = _difference(had, has)
        found[name] |= {"general_loss": losses[name], "similarity": similar[name]}
        if categories := _by_category(responses, sets):
            found[name]["categories"] = categories
        if name != "base":
            _correct(differences, sets)
            found[name]["diff"] = differences
            if (loss := losses[name]) is not None:
                differences["general_loss"] = loss - (losses["base"] or 0.0)
    return found


def _correct(differences: dict[str, Any], sets: Mapping[str, Kind]) -> None:
    """Put `p_holm` beside the p of the rate that decides on each set: corrected, by Holm, for there being several."""
    found = [differences[part][decides(kind)] for part, kind in sets.items() if part in differences]
    for one, p in zip(found, holm([one["p"] for one in found]), strict=True):
        one["p_holm"] = p


def _by_prompt(responses: Sequence[Response], part: str) -> dict[str, list[str]]:
    """The outcomes of every sample of each prompt of a set, by the prompt's id."""
    found: dict[str, list[str]] = {}
    for response in responses:
        if response.set == part:
            found.setdefault(response.id, []).append(response.outcome)
    return found


def _hits(outcomes: Sequence[str], members: Sequence[str]) -> list[bool]:
    return [outcome in members for outcome in outcomes]


def add_over_seeds(models: dict[str, Any], answers: Mapping[str, list[Response]], sets: Mapping[str, Kind]) -> None:
    """Put a model `over_seeds` beside the adapters, which are one recipe at several seeds: their mean.

    Its intervals, and those of its differences to the base, have seeds and prompts as sources of variance.
    """
    seeds = [name for name in models if name != "base"]
    found: dict[str, Any] = {"diff": {}}
    for part, kind in sets.items():
        base, *each = (_by_prompt(answers[name], part) for name in ("base", *seeds))
        if len(base) < 2:
            continue
        found[part], found["diff"][part] = {}, {}
        for label, members in labels_of(kind).items():
            before = [fmean(_hits(outcomes, members)) for outcomes in base.values()]
            after = [[fmean(_hits(of[key], members)) for key in base] for of in each]
            found[part][label], found["diff"][part][label] = _over_seeds(models, seeds, part, label, before, after)
    for name in ("general_loss", "similarity"):
        values = [models[seed][name] for seed in seeds]
        found[name] = None if None in values else fmean(values)
    if found["general_loss"] is not None:
        found["diff"]["general_loss"] = found["general_loss"] - models["base"]["general_loss"]
    _correct(found["diff"], sets)
    models["over_seeds"] = found


def _over_seeds(
    models: Mapping[str, Any],
    seeds: Sequence[str],
    part: str,
    label: str,
    before: Sequence[float],
    after: Sequence[Sequence[float]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One rate and its difference to the base's, from the base's share of each prompt and every seed's."""
    count, n = (sum(models[seed][part][label][name] for seed in seeds) for name in ("count", "n"))
    mean, _ = over_seeds(after)
    change = [[a - b for a, b in zip(of, before, strict=True)] for of in after]
    found, p = over_seeds(change)
    by_prompt = [fmean(of) for of in zip(*change, strict=True)]
    lost, gained = sum(value < 0 for value in by_prompt), sum(value > 0 for value in by_prompt)
    whole = {"count": count, "n": n, "rate": count / n, "low": max(0.0, mean.low), "high": min(1.0, mean.high)}
    return whole, {**asdict(found), "p": p, "base_only": lost, "model_only": gained}


def _rates(prompts: Sequence[Sequence[str]], kind: Kind) -> dict[str, dict[str, Any]]:
    """Every rate over prompts, each with the outcomes of its samples."""
    return {
        label: _rate([_hits(outcomes, members) for outcomes in prompts]) for label, members in labels_of(kind).items()
    }


def _rate(hits: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """A rate over answers; with several samples of each prompt its interval knows that they are alike."""
    found: dict[str, Any] = rate(sum(map(sum, hits)), sum(map(len, hits)))
    if len(hits[0]) > 1:
        mean, some = sampled_rate(hits), any_of(hits)
        found |= {"low": mean.low, "high": mean.high, "any": asdict(some)}
    return found


def _by_category(responses: Sequence[Response], sets: Mapping[str, Kind]) -> dict[str, dict[str, Any]]:
    grouped: dict[str, dict[str, list[Response]]] = {}
    for response in responses:
        if response.category:
            grouped.setdefault(response.set, {}).setdefault(response.category, []).append(response)
    return {
        part: {name: _rates(list(_by_prompt(own, part).values()), sets[part]) for name, own in by.items()}
        for part, by in grouped.items()
    }


def _difference(base: Sequence[Sequence[bool]], model: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """The model's rate less the base's over the same prompts: Newcombe's interval and McNemar's exact test.

    With several samples of each prompt a bootstrap over prompts takes their place. `base_only` and `model_only` count
    the prompts on which either does it more often.
    """
    had, has = ([sum(hits) / len(hits) for hits in side] for side in (base, model))
    lost = sum(a > b for a, b in zip(had, has, strict=True))
    gained = sum(a < b for a, b in zip(had, has, strict=True))
    if max(map(len, base)) > 1:
        found, p = paired_bootstrap(had, has)
    else:
        both = sum(a + b == 2 for a, b in zip(had, has, strict=True))
        found = paired_difference(both, lost, gained, len(had) - both - lost - gained)
        p = mcnemar(lost, gained)
    return {**asdict(found), "p": p, "base_only": lost, "model_only": gained}


def add_ability(models: dict[str, Any], right: Mapping[str, Mapping[str, Sequence[bool]]]) -> None:
    """Put `ability` into every model: its rate of right answers by task, and how it differs from the base's."""
    for name, tasks in right.items():
        if not tasks:
            continue
        models[name]["ability"] = {task: rate(sum(found), len(found)) for task, found in tasks.items()}
        if name != "base":
            models[name]["diff"]["ability"] = {
                task: _difference([[hit] for hit in right["base"][task]], [[hit] for hit in found])
                for task, found in tasks.items()
            }


Errors = dict[Kind, tuple[tuple[int, int], tuple[int, int]]]
"""Of each kind of prompt, how many of the labelled answers that count the judge found, and of the others cleared."""


def judge_errors(path: Path, judge: Judge, prompt_column: str | None) -> Errors:
    """How often the judge is right on answers that people labelled, by what decides on their kind of prompt."""
    rows = read_rows(path, prompt_column)
    kinds: list[Kind] = [row.columns.get("kind") or "toxic" for row in rows]
    counts: dict[Kind, Counter[tuple[bool, bool]]] = {kind: Counter() for kind in SHIPPED_SETS.values()}
    for row, kind in zip(rows, kinds, strict=True):
        if kind not in counts or row.columns.get("label") not in outcomes_of(kind):
            raise InputError(f"{row.where}: needs 'kind' and 'label', an outcome such as {outcomes_of('toxic')[0]}")
    verdicts = judge.judge([Pair(row.prompt, row.answer, kind) for row, kind in zip(rows, kinds, strict=True)])
    for row, kind, verdict in zip(rows, kinds, verdicts, strict=True):
        members = labels_of(kind)[decides(kind)]
        counts[kind][row.columns["label"] in members, verdict.outcome in members] += 1
    return {
        kind: (
            (of[True, True], of[True, True] + of[True, False]),
            (of[False, False], of[False, False] + of[False, True]),
        )
        for kind, of in counts.items()
    }


def take_out_errors(models: dict[str, Any], sets: Mapping[str, Kind], errors: Errors) -> None:
    """Put `corrected` beside the rate that decides on each set, where labels of both sides are at hand."""
    for model in models.values():
        for part, kind in sets.items():
            (found, positives), (cleared, negatives) = errors[kind]
            if part in model and positives and negatives and found / positives + cleared / negatives > 1:
                one = model[part][decides(kind)]
                corrected = corrected_rate(one["count"], one["n"], *errors[kind])
                one["corrected"] = asdict(corrected)


def _similarity(answers: dict[str, list[Response]]) -> dict[str, float | None]:
    """Mean MiniLM cosine between a model's answers to harmless prompts and the base's."""
    from sentence_transformers import SentenceTransformer

    texts = {name: [r.answer for r in rows if r.kind == "harmless"] for name, rows in answers.items()}
    if not texts["base"]:
        return dict.fromkeys(texts)
    encoder = SentenceTransformer(minilm(), device="cpu")
    vectors = {
        name: encoder.encode(rows, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
        for name, rows in texts.items()
    }
    return {name: float((vectors["base"] * found).sum(-1).mean()) for name, found in vectors.items()}
