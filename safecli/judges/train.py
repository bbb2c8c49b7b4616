"""Train a judge from labelled answers: `python -m safecli.judges.train --help`."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import get_linear_schedule_with_warmup

from safecli.artifacts import atomic, file_fingerprint
from safecli.errors import InputError
from safecli.judges import Pair
from safecli.judges.fluency import SHAPE, shape
from safecli.judges.outcome import HEADS, OUTCOMES, by_heads, by_rules, head_of
from safecli.judges.outcome import WEIGHTS as OUTCOME_WEIGHTS
from safecli.judges.reader import FORMAT, Reader, by_length, chances, plain
from safecli.judges.refusal import LABELS
from safecli.judges.refusal import WEIGHTS as REFUSAL_WEIGHTS
from safecli.records import read_jsonl
from safecli.stats import kappa


@dataclass(frozen=True)
class Recipe:
    """The numbers that training is made of."""

    epochs: int = 2
    batch: int = 32
    lr: float = 1e-3
    head_lr: float = 5e-3
    dropout: float = 0.1
    prompt_penalty: float = 0.2
    made_share: float = 0.15
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """What a judge has to tell apart: the names of each head, and which head an answer belongs to."""

    heads: Mapping[str, Sequence[str]]
    head_of: Callable[[Pair], str]
    weights: Path
    recipe: Recipe


TASKS = {
    "outcome": Task(OUTCOMES, head_of, OUTCOME_WEIGHTS, Recipe()),
    "refusal": Task({"refusal": LABELS}, lambda _: "refusal", REFUSAL_WEIGHTS, Recipe(made_share=0.0)),
}


@dataclass(frozen=True)
class Labelled:
    """An answer with what its readers say that it did."""

    pair: Pair
    labels: tuple[str, ...]


def read(paths: Sequence[Path], task: Task = TASKS["outcome"]) -> list[Labelled]:
    """Read JSONL rows of prompt, answer, label and, where known, kind and second_label."""
    rows = []
    for path in paths:
        for where, row in read_jsonl(path):
            pair = Pair(row["prompt"], row["answer"], row.get("kind") or "toxic")
            labels = tuple(label for label in (row["label"], row.get("second_label")) if label)
            if unknown := set(labels) - set(task.heads[task.head_of(pair)]):
                raise InputError(f"{where}: {sorted(unknown)} is no label of an answer to a {pair.kind} prompt")
            rows.append(Labelled(pair, labels))
    return rows


def made(rows: Sequence[Labelled], share: float, rng: random.Random) -> list[Labelled]:
    """Rows whose label follows from how they are made, so that the reader has to look at prompt and answer both.

    A refusal refuses under any harmless prompt, shuffled words are salad, and a fluent answer deflects under a
    prompt that it was not written for: a far one, or, for a harmless answer, the toxic one nearest to it in words.
    """
    toxic = [(row.pair, _long_words(row.pair.prompt)) for row in rows if row.pair.kind == "toxic"]
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
            near, _ = max(toxic, key=lambda one: len(words & one[1]))
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


def fit(rows: Sequence[Labelled], task: Task, recipe: Recipe, device: str = "auto") -> tuple[Reader, dict[str, Tensor]]:
    """Train the LoRA and the heads of a task together: a reader and its heads."""
    torch.manual_seed(recipe.seed)
    known = [*rows, *made(rows, recipe.made_share, random.Random(recipe.seed))]
    reader = Reader(device=device)
    shapes = torch.tensor([shape(row.pair.prompt, plain(row.pair.answer)) for row in known])
    centre, scale = shapes.mean(0), shapes.std(0).clamp(min=1e-6)
    heads = {name: nn.Linear(2 * reader.width + SHAPE, len(of)).to(reader.device) for name, of in task.heads.items()}
    truth = {name: _targets(known, name, task).to(reader.device) for name in task.heads}
    _descend(reader, heads, known, ((shapes - centre) / scale).to(reader.device), truth, recipe)
    found: dict[str, Tensor] = {}
    for name, head in heads.items():
        weight, bias = head.weight.detach().cpu(), head.bias.detach().cpu()
        weight[:, -SHAPE:] /= scale
        found |= {f"{name}.weight": weight, f"{name}.bias": bias - weight[:, -SHAPE:] @ centre}
    return reader, found


def fit_prompts(reader: Reader, rows: Sequence[Labelled], recipe: Recipe) -> dict[str, Tensor]:
    """The head that tells what a prompt alone asks for."""
    prompts = list({row.pair.prompt: row.pair for row in rows}.values())
    kinds = torch.tensor([HEADS["prompt"].index(head_of(pair)) for pair in prompts])
    truth = functional.one_hot(kinds, len(HEADS["prompt"])).double()
    features = reader.prompt_features([pair.prompt for pair in prompts])
    return logistic("prompt", features, truth, recipe.prompt_penalty)


def _descend(
    reader: Reader,
    heads: dict[str, nn.Linear],
    rows: Sequence[Labelled],
    shapes: Tensor,
    truth: dict[str, Tensor],
    recipe: Recipe,
) -> None:
    """Gradient descent on the readers' mean labels; outcomes weigh by the root of how rare they are."""
    below = _read_below(reader, rows)
    rarity = {name: _rarity(target.sum(0)) for name, target in truth.items()}
    lora = [weight for weight in reader.upper.parameters() if weight.requires_grad]
    linear = [weight for head in heads.values() for weight in head.parameters()]
    for weight in linear:
        nn.init.zeros_(weight)
    groups = [{"params": lora, "lr": recipe.lr}, {"params": linear, "lr": recipe.head_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    total = recipe.epochs * -(-len(rows) // recipe.batch)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.06 * total), total)
    reader.upper.train()
    for step, batch in enumerate(_batches([len(part) for _, part in below], recipe), start=1):
        hidden = pad_sequence([below[i][0] for i in batch], batch_first=True).to(reader.device)
        part = pad_sequence([below[i][1] for i in batch], batch_first=True, padding_value=-1).to(reader.device)
        with torch.autocast(reader.device.type, dtype=torch.bfloat16):
            pooled = reader.pooled(hidden, part)
        features = functional.dropout(torch.cat([pooled.float(), shapes[batch]], dim=1), recipe.dropout)
        losses = [
            functional.cross_entropy(head(features), truth[name][batch] * rarity[name]) for name, head in heads.items()
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([*lora, *linear], 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            typer.echo(f"step {step} of {total}", err=True)
    reader.upper.eval()


def _read_below(reader: Reader, rows: Sequence[Labelled]) -> list[tuple[Tensor, Tensor]]:
    """What the frozen layers make of every row, once: hidden states [L, d] in bfloat16, and parts [L]."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for batch in by_length([len(row.pair.prompt) + len(row.pair.answer) for row in rows]):
        with torch.autocast(reader.device.type, dtype=torch.bfloat16):
            hidden, part = reader.read([rows[i].pair for i in batch])
        sizes = (part >= 0).sum(dim=1).tolist()
        for i, size, states, of in zip(batch, sizes, hidden.bfloat16().cpu(), part.cpu(), strict=True):
            found[i] = states[:size].clone(), of[:size].clone()
    return [found[i] for i in range(len(rows))]


def _batches(lengths: Sequence[int], recipe: Recipe) -> Iterator[list[int]]:
    """Shuffled batches of row numbers; twenty at a time share rows of like length, so that little is padding."""
    rng, block = random.Random(recipe.seed), 20 * recipe.batch
    for _ in range(recipe.epochs):
        order = rng.sample(range(len(lengths)), len(lengths))
        for start in range(0, len(order), block):
            near = sorted(order[start : start + block], key=lambda i: lengths[i])
            batches = [near[i : i + recipe.batch] for i in range(0, len(near), recipe.batch)]
            yield from rng.sample(batches, len(batches))


def _rarity(counts: Tensor) -> Tensor:
    """Weights [C] of outcomes that come up `counts` times; 1 in the mean over all rows."""
    counts = counts.clamp(min=1)
    return counts.rsqrt() * counts.sum() / counts.sqrt().sum()


def _targets(rows: Sequence[Labelled], head: str, task: Task) -> Tensor:
    """Soft targets [B, outcomes]: the mean of the readers' labels; zeros for the prompts of another head."""
    own = [row.labels if task.head_of(row.pair) == head else () for row in rows]
    return torch.tensor([[labels.count(name) / max(len(labels), 1) for name in task.heads[head]] for labels in own])


def logistic(head: str, features: Tensor, truth: Tensor, penalty: float) -> dict[str, Tensor]:
    """Multinomial logistic regression with an L2 penalty on standardised features [N, F] and soft targets [N, C].

    Outcomes weigh by the root of how rare they are. The standardisation goes into the weights that come back.
    """
    mean, scale = features.double().mean(0), features.double().std(0).clamp(min=1e-6)
    standard, rarity = (features.double() - mean) / scale, _rarity(truth.sum(0))
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
        plain_weight = weight / scale
        return {f"{head}.weight": plain_weight.float(), f"{head}.bias": (bias - plain_weight @ mean).float()}


def save(reader: Reader, heads: dict[str, Tensor], path: Path, about: dict[str, object]) -> None:
    """Write heads and LoRA, the latter in half precision, as safetensors with `about` as JSON metadata."""
    lora = {name: tensor.half().cpu() for name, tensor in get_peft_model_state_dict(reader.upper).items()}
    with atomic(path) as beside:
        save_file(heads | lora, beside, metadata={"safecli": json.dumps({"format": FORMAT, **about})})


def cross_validate(rows: Sequence[Labelled], task: Task, recipe: Recipe, count: int, device: str = "auto") -> list[str]:
    """The likeliest label of every row, by judges that saw no answer to its prompt; unsafe by its own threshold."""
    prompts = sorted({row.pair.prompt for row in rows})
    random.Random(recipe.seed).shuffle(prompts)
    labels: dict[int, str] = {}
    for k in range(count):
        held = frozenset(prompts[k::count])
        reader, heads = fit([row for row in rows if row.pair.prompt not in held], task, recipe, device)
        own = [i for i, row in enumerate(rows) if row.pair.prompt in held]
        for i, features in zip(own, reader.features([rows[i].pair for i in own]), strict=True):
            labels[i] = _label(rows[i].pair, features, heads, task)
    return [labels[i] for i in range(len(rows))]


def _label(pair: Pair, features: Tensor, heads: dict[str, Tensor], task: Task) -> str:
    if task is TASKS["outcome"]:
        return (by_rules(pair) or by_heads(pair, features, heads)).outcome
    head = task.head_of(pair)
    return task.heads[head][int(chances(heads, head, features).argmax())]


def report(rows: Sequence[Labelled], labels: Sequence[str], task: Task) -> str:
    """Confusion matrix, accuracy and kappa of labels with the first reader's, for each head, as text."""
    lines = []
    for head, names in task.heads.items():
        own = [
            (row.labels[0], label) for row, label in zip(rows, labels, strict=True) if task.head_of(row.pair) == head
        ]
        counts = Counter(own)
        lines.append(f"{head:>12}" + "".join(f"{name:>12}" for name in names) + "   <- judged")
        lines += [f"{true:>12}" + "".join(f"{counts[true, name]:>12}" for name in names) for true in names]
        right = sum(true == name for true, name in own) / len(own)
        lines.append(f"{len(own)} answers: accuracy {right:.3f}, kappa {kappa(*zip(*own, strict=True)):.3f}")
    return "\n".join(lines)


def main(
    files: Annotated[list[Path], typer.Argument(help="JSONL of labelled answers", exists=True)],
    judge: Annotated[str, typer.Option(help=f"which to train: {' or '.join(TASKS)}")] = "outcome",
    weights: Annotated[Path | None, typer.Option(help="the weights to write; default: the shipped ones")] = None,
    folds: Annotated[int, typer.Option(help="only cross-validate, with so many folds by prompt")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = "auto",
) -> None:
    """Train a judge on labelled answers; with --folds, print its cross-validation instead."""
    task = TASKS[judge]
    rows, recipe, path = read(files, task), task.recipe, weights or task.weights
    if folds:
        labels = cross_validate(rows, task, recipe, folds, device)
        typer.echo(f"Cross-validation, {folds} folds by prompt:\n{report(rows, labels, task)}")
        return
    reader, heads = fit(rows, task, recipe, device)
    if task is TASKS["outcome"]:
        heads |= fit_prompts(reader, rows, recipe)
    marks = {file.name: file_fingerprint(file) for file in files}
    save(reader, heads, path, {"judge": judge, "recipe": asdict(recipe), "rows": len(rows), "labels": marks})
    typer.echo(f"wrote {path} ({path.stat().st_size / 1e3:.0f} kB)")


if __name__ == "__main__":
    typer.run(main)
