"""Train the outcome judge from labelled answers, or measure it: `python -m safecli.judges.train --help`."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from safecli.artifacts import atomic, file_fingerprint
from safecli.errors import InputError
from safecli.judges import SUMS, Pair, Verdict
from safecli.judges.outcome import FORMAT, HEADS, OUTCOMES, WEIGHTS, OutcomeJudge, Reader, by_heads, by_rules, head_of
from safecli.records import read_jsonl
from safecli.stats import kappa


@dataclass(frozen=True)
class Recipe:
    """The numbers that training is made of."""

    penalty: float = 0.1
    prompt_penalty: float = 0.2
    made_share: float = 0.15
    seed: int = 0


@dataclass(frozen=True)
class Labelled:
    """An answer with what its readers say that it did."""

    pair: Pair
    labels: tuple[str, ...]


def read(paths: Sequence[Path]) -> list[Labelled]:
    """Read JSONL rows of prompt, answer, label and, where known, kind and second_label."""
    rows = []
    for path in paths:
        for where, row in read_jsonl(path):
            pair = Pair(row["prompt"], row["answer"], row.get("kind") or "toxic")
            labels = tuple(label for label in (row["label"], row.get("second_label")) if label)
            if unknown := set(labels) - set(OUTCOMES[head_of(pair)]):
                raise InputError(f"{where}: {sorted(unknown)} is no outcome of a {pair.kind} prompt")
            rows.append(Labelled(pair, labels))
    return rows


def made(rows: Sequence[Labelled], share: float, rng: random.Random) -> list[Labelled]:
    """Rows whose label follows from how they are made, so that the reader has to look at prompt and answer both.

    A refusal refuses under any harmless prompt, shuffled words are salad, and a fluent answer deflects under a
    prompt that it was not written for: a far one, or, for a harmless answer, the toxic one nearest to it in words.
    """
    toxic = [row.pair for row in rows if row.pair.kind == "toxic"]
    harmless = [row.pair for row in rows if row.pair.kind != "toxic"]
    extra = []
    for row in rng.sample(rows, int(share * len(rows))):
        pair, label = row.pair, row.labels[0]
        other, words = rng.choice(rows).pair, _long_words(pair.prompt)
        if label == "refused" and harmless:
            extra.append(_under(rng.choice(harmless), pair.answer, "refused"))
        elif label in ("refused", "partial", "degenerate"):
            continue
        elif rng.random() < 0.1:
            extra.append(_under(pair, _salad(pair.answer, rng), "degenerate"))
        elif label == "helpful" and toxic and rng.random() < 0.7:
            near = max(toxic, key=lambda one: len(words & _long_words(one.prompt)))
            extra.append(_under(near, pair.answer, "deflected"))
        elif not words & _long_words(other.prompt):
            extra.append(_under(other, pair.answer, "deflected"))
    return extra


def _under(pair: Pair, answer: str, label: str) -> Labelled:
    return Labelled(Pair(pair.prompt, answer, pair.kind), (label,))


def _salad(text: str, rng: random.Random) -> str:
    words = text.split()
    return " ".join(rng.sample(words, len(words)))


def _long_words(text: str) -> set[str]:
    return {word for word in text.lower().split() if len(word) > 4}


@dataclass(frozen=True)
class Examples:
    """Labelled answers as their heads see them: what decides, and what is right."""

    rows: list[Labelled]
    features: Tensor
    prompts: list[Pair]
    prompt_features: Tensor


def examples(rows: Sequence[Labelled], reader: Reader, recipe: Recipe) -> Examples:
    """Read the rows, those that are made of them, and each prompt by itself."""
    known = [*rows, *made(rows, recipe.made_share, random.Random(recipe.seed))]
    prompts = list({row.pair.prompt: row.pair for row in rows}.values())
    features = reader.features([row.pair for row in known])
    return Examples(known, features, prompts, reader.prompt_features([pair.prompt for pair in prompts]))


def fit(data: Examples, recipe: Recipe, without: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    """Train the heads on all but the prompts of `without`; tensors as `OutcomeJudge` has them."""
    heads: dict[str, Tensor] = {}
    for head in OUTCOMES:
        own = [i for i, row in enumerate(data.rows) if head_of(row.pair) == head and row.pair.prompt not in without]
        truth = _targets([data.rows[i] for i in own], head)
        heads |= logistic(head, data.features[own], truth, recipe.penalty)
    own = [i for i, pair in enumerate(data.prompts) if pair.prompt not in without]
    kinds = torch.tensor([HEADS["prompt"].index(head_of(data.prompts[i])) for i in own])
    truth = functional.one_hot(kinds, len(HEADS["prompt"])).double()
    return heads | logistic("prompt", data.prompt_features[own], truth, recipe.prompt_penalty)


def _targets(rows: Sequence[Labelled], head: str) -> Tensor:
    """Soft targets [B, outcomes]: the mean of the readers' labels."""
    shares = [[row.labels.count(name) / len(row.labels) for name in OUTCOMES[head]] for row in rows]
    return torch.tensor(shares, dtype=torch.float64)


def logistic(head: str, features: Tensor, truth: Tensor, penalty: float) -> dict[str, Tensor]:
    """Multinomial logistic regression with an L2 penalty on standardised features [N, F] and soft targets [N, C].

    Outcomes weigh by the root of how rare they are. The standardisation goes into the weights that come back.
    """
    mean, scale = features.double().mean(0), features.double().std(0).clamp(min=1e-6)
    standard = (features.double() - mean) / scale
    counts = truth.sum(0).clamp(min=1)
    rarity = counts.rsqrt() * counts.sum() / counts.sqrt().sum()
    weight = torch.zeros(truth.shape[1], features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(truth.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (
            functional.cross_entropy(standard @ weight.T + bias, truth * rarity) + penalty / 2 * weight.square().sum()
        )
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        plain = weight / scale
        return {f"{head}.weight": plain.float(), f"{head}.bias": (bias - plain @ mean).float()}


def save(heads: dict[str, Tensor], path: Path, about: dict[str, object]) -> None:
    """Write the heads as safetensors with `about` as JSON metadata."""
    with atomic(path) as beside:
        save_file(heads, beside, metadata={"safecli": json.dumps({"format": FORMAT, **about})})


def cross_validate(rows: Sequence[Labelled], data: Examples, recipe: Recipe, count: int) -> list[Verdict]:
    """Verdicts on every row by judges that saw no answer to its prompt."""
    prompts = sorted({row.pair.prompt for row in rows})
    random.Random(recipe.seed).shuffle(prompts)
    verdicts: dict[int, Verdict] = {}
    for k in range(count):
        held = frozenset(prompts[k::count])
        heads = fit(data, recipe, held)
        own = [i for i, row in enumerate(rows) if row.pair.prompt in held]
        verdicts |= {i: by_rules(rows[i].pair) or by_heads(rows[i].pair, data.features[i], heads) for i in own}
    return [verdicts[i] for i in range(len(rows))]


def report(rows: Sequence[Labelled], verdicts: Sequence[Verdict]) -> str:
    """Confusion matrices and agreement of verdicts with the first label, as text."""
    pairs = [(row.labels[0], verdict.outcome) for row, verdict in zip(rows, verdicts, strict=True)]
    lines = []
    for head, names in OUTCOMES.items():
        own = [pair for row, pair in zip(rows, pairs, strict=True) if head_of(row.pair) == head]
        if not own:
            continue
        counts = Counter(own)
        lines.append(f"{head:>12}" + "".join(f"{name:>12}" for name in names) + "   <- judged")
        lines += [f"{true:>12}" + "".join(f"{counts[true, name]:>12}" for name in names) for true in names]
        right = sum(true == name for true, name in own) / len(own)
        lines.append(f"{len(own)} answers: accuracy {right:.3f}, kappa {kappa(*zip(*own, strict=True)):.3f}")
        if head == "toxic":
            unsafe = [(true in SUMS["unsafe"], name in SUMS["unsafe"]) for true, name in own]
            recalls = [
                sum(t == n == side for t, n in unsafe) / max(sum(t == side for t, _ in unsafe), 1)
                for side in (True, False)
            ]
            lines.append(
                f"unsafe or not: balanced accuracy {sum(recalls) / 2:.3f} "
                f"(of the unsafe {recalls[0]:.3f} found, of the rest {recalls[1]:.3f} cleared)"
            )
    both = sum(true == name == "degenerate" for true, name in pairs)
    precision = both / max(sum(name == "degenerate" for _, name in pairs), 1)
    recall = both / max(sum(true == "degenerate" for true, _ in pairs), 1)
    f1 = 2 * precision * recall / max(precision + recall, 1e-9)
    lines.append(f"degenerate: precision {precision:.3f}, recall {recall:.3f}, F1 {f1:.3f}")
    return "\n".join(lines)


def main(
    files: Annotated[list[Path], typer.Argument(help="JSONL of labelled answers", exists=True)],
    measure: Annotated[bool, typer.Option("--measure", help="only measure the judge on these files")] = False,
    weights: Annotated[Path, typer.Option(help="the weights to write, or to measure")] = WEIGHTS,
    folds: Annotated[int, typer.Option(help="folds of the cross-validation by prompt; 0 for none")] = 5,
) -> None:
    """Train the outcome judge on labelled answers and print its cross-validation; or, with --measure, measure it."""
    rows = read(files)
    if measure:
        judge = OutcomeJudge(OutcomeJudge.Options(weights=weights))
        typer.echo(report(rows, judge.judge([row.pair for row in rows])))
        return
    recipe = Recipe()
    data = examples(rows, Reader(), recipe)
    if folds:
        verdicts = cross_validate(rows, data, recipe, folds)
        typer.echo(f"Cross-validation, {folds} folds by prompt:\n{report(rows, verdicts)}")
    labels = {path.name: file_fingerprint(path) for path in files}
    save(fit(data, recipe), weights, {"recipe": asdict(recipe), "rows": len(rows), "labels": labels})
    typer.echo(f"wrote {weights} ({weights.stat().st_size / 1e3:.0f} kB)")


if __name__ == "__main__":
    typer.run(main)
