"""Base beside adapters on toxic, look-alike and harmless prompts: outcomes, paired tests, general loss, gates."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from safecli import __version__
from safecli.artifacts import FORMAT, Stage, atomic, newest, open_stage, read_json, write_json
from safecli.config import EvalOptions, nearest
from safecli.errors import UsageError
from safecli.judges import SUMS, Kind, outcomes_of
from safecli.losses import linear_cross_entropy
from safecli.models import (
    LanguageModel,
    adapter_fingerprint,
    attach_adapter,
    last_hidden,
    load_model,
    minilm,
    source_fingerprint,
)
from safecli.records import SETS, Prompt, Response, prompts_fingerprint, read_prompts, read_responses, shipped
from safecli.report import markdown_summary, write_junit, write_report
from safecli.stages import Reporter, inherit_model
from safecli.stages.answers import Job, answer_all, checked, judge_identity, load_judge
from safecli.stages.batches import Rows
from safecli.stages.train import read_metrics
from safecli.stats import mcnemar, paired_difference, rate

NUMBERS = ("rate", "low", "high", "count", "n")
DIFFERENCES = ("value", "low", "high", "p")
SCALARS = ("general_loss", "similarity")
COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
LOSS_BATCH = 16


@dataclass(frozen=True)
class Evaluated:
    """What `eval` found: the content of `results.json`, the report, and the gates that failed."""

    results: dict[str, Any]
    answers: list[dict[str, Any]]
    results_path: Path
    report_path: Path
    failed: list[str]


@dataclass(frozen=True)
class Gate:
    """A bound on one number of a model, such as `toxic.unsafe.high > 0.2`: it fails where that is true."""

    expression: str
    path: tuple[str, ...]
    comparison: str
    limit: float

    def value(self, model: dict[str, Any]) -> float:
        """The number that the gate looks at in one model's results."""
        found: Any = model
        for name in self.path:
            if not isinstance(found, dict) or name not in found:
                raise UsageError(f"--fail-if '{self.expression}': this evaluation has no {'.'.join(self.path)}")
            found = found[name]
        if not isinstance(found, (int, float)):
            raise UsageError(f"--fail-if '{self.expression}': '{'.'.join(self.path)}' is not a number")
        return float(found)

    def fails(self, model: dict[str, Any]) -> bool:
        """Whether the expression is true of this model."""
        return bool(COMPARISONS[self.comparison](self.value(model), self.limit))


def parse_gate(expression: str) -> Gate:
    """Read `set.outcome[.low|.high|.diff[.low|.high|.p]|…] > number`; `UsageError` shows the form."""
    match = re.fullmatch(r"\s*([a-z_]+(?:\.[a-z_]+)*)\s*(>=|<=|>|<)\s*(-?\d+(?:\.\d+)?)\s*", expression)
    if match is None:
        raise UsageError(f"--fail-if '{expression}': write it as 'toxic.unsafe > 0.2'")
    paths = _gate_paths()
    if match[1] not in paths:
        raise UsageError(f"--fail-if '{expression}': unknown '{match[1]}'{nearest(match[1], paths)}")
    return Gate(expression, paths[match[1]], match[2], float(match[3]))


def _gate_paths() -> dict[str, tuple[str, ...]]:
    """Every name that a gate may use, with where the results of a model hold it."""
    rates = [(kind, label) for kind in SETS for label in _labels(kind)]
    paths: dict[str, tuple[str, ...]] = {name: (name,) for name in SCALARS}
    paths["general_loss.diff"] = ("diff", "general_loss")
    for rate_path in rates:
        name = ".".join(rate_path)
        paths[name], paths[f"{name}.diff"] = (*rate_path, "rate"), ("diff", *rate_path, "value")
        paths |= {f"{name}.{number}": (*rate_path, number) for number in NUMBERS}
        paths |= {f"{name}.diff.{number}": ("diff", *rate_path, number) for number in DIFFERENCES}
    return paths


def _labels(kind: Kind) -> dict[str, tuple[str, ...]]:
    """What is counted on prompts of this kind: every outcome, and the sums with the outcomes they are made of."""
    labels: dict[str, tuple[str, ...]] = {outcome: (outcome,) for outcome in outcomes_of(kind)}
    return labels | SUMS if kind == "toxic" else labels


def evaluate(options: EvalOptions, report: Reporter | None = None) -> Evaluated:
    """Compare adapters with the base; `results.json`, `report.html`, `summary.md`, `junit.xml` go to the run folder.

    Errors: `InputError` (prompts, adapter of another base), `MissingError`, `UsageError` (gate), `RunError`.
    """
    report = report or Reporter()
    gates = [parse_gate(expression) for expression in options.fail_if]
    options = inherit_model(options, report)
    adapters = _adapters(options, report)
    prompts = _prompts(options, report)
    stage = Stage(options.run, "eval", _identity(options, prompts, adapters))
    with open_stage(stage):
        if stage.done:
            report.say(f"already evaluated: {stage.path}")
        else:
            _evaluate(options, prompts, adapters, stage, report)
        results = read_json(stage.path / "results.json")
        results["report"] = str(options.run / "report.html")
        results["adapters"] = {name: str(path) for name, path in adapters.items()}
        results["gates"] = [
            {"expression": gate.expression, "model": name, "value": gate.value(model), "failed": gate.fails(model)}
            for gate in gates
            for name, model in results["models"].items()
            if name != "base"
        ]
        answers = _publish(options, results, stage)
    failed = [
        f"{gate['model']}: {gate['expression']} ({gate['value']:.3g})" for gate in results["gates"] if gate["failed"]
    ]
    return Evaluated(results, answers, options.run / "results.json", options.run / "report.html", failed)


def preview(options: EvalOptions, report: Reporter) -> dict[str, Any]:
    """What `eval` would do: its folder, whether it is done, models and prompts of each set."""
    for expression in options.fail_if:
        parse_gate(expression)
    options = inherit_model(options, report)
    adapters, prompts = _adapters(options, report), _prompts(options, report)
    stage = Stage(options.run, "eval", _identity(options, prompts, adapters))
    counts = {kind: len(found) for kind, found in prompts.items()}
    return {"folder": str(stage.path), "done": stage.done, "models": ["base", *adapters], "prompts": counts}


def _adapters(options: EvalOptions, report: Reporter) -> dict[str, Path]:
    if not options.adapter:
        folder = newest(options.run, "train")
        if folder is None:
            report.say("no adapter in the run folder: the base model alone")
            return {}
        report.say(f"adapter: {folder / 'adapter'}, the newest of the run folder")
        return {"tuned": folder / "adapter"}
    if len(options.adapter) == 1:
        return {"tuned": options.adapter[0]}
    names = [path.name if path.name != "adapter" else path.parent.name for path in options.adapter]
    if len({*names, "base"}) <= len(names):
        raise UsageError(f"adapters need names of their own, got {', '.join(names)}: rename the folders")
    return dict(zip(names, options.adapter, strict=True))


def _prompts(options: EvalOptions, report: Reporter) -> dict[Kind, list[Prompt]]:
    own = {kind: getattr(options, kind) for kind in SETS}
    if not any(own.values()):
        report.say(f"prompts: the shipped ones, {options.split} split")
    found: dict[Kind, list[Prompt]] = {}
    for kind, source in own.items():
        if source == "none":
            continue
        read = read_prompts(source, kind, options.prompt_column) if source else shipped(kind, options.split)
        found[kind] = read[: options.limit]
    return found


def _identity(options: EvalOptions, prompts: dict[Kind, list[Prompt]], adapters: dict[str, Path]) -> dict[str, Any]:
    skip = {"run", "batch_size", "adapter", "fail_if", "toxic", "lookalike", "harmless"}
    return {
        "options": options.model_dump(mode="json", exclude=skip),
        "prompts": {kind: prompts_fingerprint(found) for kind, found in prompts.items()},
        "model": source_fingerprint(options),
        "judge": judge_identity(options.judge, options.judge_opt),
        "adapters": {name: adapter_fingerprint(path) for name, path in adapters.items()},
    }


def _evaluate(
    options: EvalOptions, prompts: dict[Kind, list[Prompt]], adapters: dict[str, Path], stage: Stage, report: Reporter
) -> None:
    judge = load_judge(options.judge, options.judge_opt)
    model = load_model(options)
    base = model.model
    kept, _ = checked([prompt for found in prompts.values() for prompt in found], model, options, report)
    jobs = [Job(prompt) for prompt in kept]
    for adapter in adapters.values():
        with _wearing(model, base, adapter):
            report.say(f"{adapter} fits the model")
    answers: dict[str, list[Response]] = {}
    losses: dict[str, float | None] = {}
    for name in ("base", *adapters):
        report.say(f"answering {len(jobs)} prompts with {name}")
        with _wearing(model, base, adapters.get(name)):
            answers[name], _ = answer_all(jobs, stage.path / f"answers-{name}.jsonl", model, judge, options, report)
            losses[name] = general_loss(model, answers["base"], options.max_prompt_tokens)
    results = {
        "format": FORMAT,
        "safecli": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": options.seed,
        "model": options.model,
        "options": stage.identity["options"],
        "fingerprints": {name: stage.identity[name] for name in ("prompts", "model", "judge", "adapters")},
        "models": summarise(answers, losses),
        "gates": [],
    }
    write_json(stage.path / "results.json", results)
    stage.finish({"models": list(answers)})


@contextmanager
def _wearing(model: LanguageModel, base: Any, adapter: Path | None) -> Iterator[None]:
    """Put an adapter on the one loaded base for a while."""
    if adapter is None:
        yield
        return
    worn = attach_adapter(base, adapter)
    model.model = worn
    try:
        yield
    finally:
        model.model = worn.unload()


@torch.inference_mode()
def general_loss(model: LanguageModel, base_answers: Sequence[Response], longest: int) -> float | None:
    """Cross-entropy per token, in nats, of the base's own fluent answers to harmless prompts; None without any."""
    texts = [r for r in base_answers if r.kind != "toxic" and r.answer and r.outcome != "degenerate"]
    total, tokens = 0.0, 0
    for start in range(0, len(texts), LOSS_BATCH):
        rows, targets = Rows(), []
        for r in texts[start : start + LOSS_BATCH]:
            answer = model.answer_ids(r.answer)[:longest]
            rows.add(model.prompt_ids(r.prompt), answer)
            targets += answer
        ids, mask, at = rows.tensors(model.tokenizer.pad_token_id)
        hidden = last_hidden(model.model, ids.to(model.device), mask.to(model.device))[torch.cat(at)]
        total += float(linear_cross_entropy(hidden, model.head, torch.tensor(targets, device=model.device)).sum())
        tokens += len(targets)
    return total / tokens if tokens else None


def summarise(answers: dict[str, list[Response]], losses: dict[str, float | None]) -> dict[str, dict[str, Any]]:
    """Rates of every outcome and sum by model and set, with general loss and similarity to the base's answers.

    A model that is not the base has a `diff` of the same shape: its paired differences to the base.
    """
    similar = _similarity(answers)
    found: dict[str, dict[str, Any]] = {}
    for name, responses in answers.items():
        differences: dict[str, Any] = {}
        found[name] = {}
        for kind in SETS:
            outcomes = {response.id: response.outcome for response in responses if response.kind == kind}
            if not outcomes:
                continue
            before = {response.id: response.outcome for response in answers["base"] if response.kind == kind}
            found[name][kind], differences[kind] = {}, {}
            for label, members in _labels(kind).items():
                has = {key: outcome in members for key, outcome in outcomes.items()}
                found[name][kind][label] = rate(sum(has.values()), len(has))
                if name != "base":
                    differences[kind][label] = _difference({key: before[key] in members for key in has}, has)
        found[name] |= {"general_loss": losses[name], "similarity": similar[name]}
        if name != "base":
            found[name]["diff"] = differences
            if (loss := losses[name]) is not None:
                differences["general_loss"] = loss - (losses["base"] or 0.0)
    return found


def _difference(base: dict[str, bool], model: dict[str, bool]) -> dict[str, Any]:
    """The model's rate less the base's over the same prompts: Newcombe's interval and McNemar's exact test."""
    counts = Counter((base[key], model[key]) for key in model)
    lost, gained = counts[True, False], counts[False, True]
    found = paired_difference(counts[True, True], lost, gained, counts[False, False])
    return {**asdict(found), "p": mcnemar(lost, gained), "base_only": lost, "model_only": gained}


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


def _publish(options: EvalOptions, results: dict[str, Any], stage: Stage) -> list[dict[str, Any]]:
    """Put the newest results, answers and report at the top of the run folder."""
    answers = [
        {"model": name, "set": response.kind, **response.model_dump(exclude={"use", "why"})}
        for name in results["models"]
        for response in read_responses(stage.path / f"answers-{name}.jsonl")
    ]
    metrics = []
    folders = sorted(options.run.glob("train-*/manifest.json"), key=lambda path: path.stat().st_mtime_ns)
    for number, folder in enumerate(folders):
        metrics += [{"round": number, **row} for row in read_metrics(folder.parent / "metrics.jsonl")]
    write_json(options.run / "results.json", results)
    write_report(results, answers, metrics, options.run / "report.html")
    write_junit(results, options.run / "junit.xml")
    with atomic(options.run / "summary.md") as beside:
        beside.write_text(markdown_summary(results), encoding="utf-8")
    return answers
