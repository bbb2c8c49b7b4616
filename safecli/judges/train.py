"""Train the outcome judge from labelled answers, or measure it: `python -m safecli.judges.train --help`."""

from __future__ import annotations

import json
import random
import tempfile
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
from safecli.judges.outcome import FORMAT, OUTCOMES, WEIGHTS, OutcomeJudge, Reader, head_of
from safecli.records import read_jsonl
from safecli.stats import kappa

LORA_LAYERS = r"encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|.*dense)"


@dataclass(frozen=True)
class Recipe:
    """The numbers that training is made of."""

    readers: int = 2
    rank: int = 8
    alpha: int = 16
    rate: float = 1e-3
    epochs: int = 2
    batch: int = 16
    max_tokens: int = 128
    smoothing: float = 0.05
    dropout: float = 0.1
    decay: float = 0.01
    masked: float = 0.1
    made_share: float = 0.15
    prompt_weight: float = 0.3
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


def fit(rows: Sequence[Labelled], recipe: Recipe) -> list[Reader]:
    """Train readers that differ by seed on `rows`; they come back with their LoRA still apart."""
    return [_fit(rows, recipe, recipe.seed + number) for number in range(recipe.readers)]


def _fit(rows: Sequence[Labelled], recipe: Recipe, seed: int) -> Reader:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    rng = random.Random(seed)
    reader = Reader()
    reader.max_tokens, reader.masked = recipe.max_tokens, recipe.masked
    lora = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=LORA_LAYERS)
    inject_adapter_in_model(lora, reader.encoder)
    rows = [*rows, *made(rows, recipe.made_share, rng)]
    weights = {head: _class_weights(rows, head) for head in OUTCOMES}
    parameters = [parameter for parameter in reader.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.rate, weight_decay=recipe.decay)
    steps = recipe.epochs * len(_batches(rows, recipe.batch, rng))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps)
    reader.train()
    for _ in range(recipe.epochs):
        for batch in _batches(rows, recipe.batch, rng):
            _loss(reader, batch, weights, recipe).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return reader.eval()


def _loss(reader: Reader, batch: Sequence[Labelled], weights: dict[str, Tensor], recipe: Recipe) -> Tensor:
    """Cross-entropy of each row by the head of its kind, and of the prompts' kind by the prompt head."""
    pairs = [row.pair for row in batch]
    features = functional.dropout(reader.features(pairs), recipe.dropout)
    asked = pairs[::3]  # a prompt comes back with every answer to it, so a third of the rows is enough
    with torch.no_grad():  # so few prompts would be learned by heart: the encoder learns from the answers only
        read_alone = reader.prompt_features([pair.prompt for pair in asked])
    risk = reader.heads["prompt"](functional.dropout(read_alone, recipe.dropout))
    toxic = torch.tensor([float(pair.kind == "toxic") for pair in asked])
    loss = recipe.prompt_weight * functional.binary_cross_entropy_with_logits(risk[:, 0], toxic)
    for head in OUTCOMES:
        own = [i for i, pair in enumerate(pairs) if head_of(pair) == head]
        if own:
            logits, truth = reader.heads[head](features[own]), _targets([batch[i] for i in own], head)
            per_row = functional.cross_entropy(
                logits, truth, weights[head], label_smoothing=recipe.smoothing, reduction="none"
            )
            loss = loss + per_row.sum() / len(batch)
    return loss


def _targets(rows: Sequence[Labelled], head: str) -> Tensor:
    """Soft targets [B, outcomes]: the mean of the readers' labels."""
    return torch.tensor([[row.labels.count(name) / len(row.labels) for name in OUTCOMES[head]] for row in rows])


def _class_weights(rows: Sequence[Labelled], head: str) -> Tensor:
    """Weights of the outcomes, by the root of how rare they are, of mean 1 over the rows."""
    counts = _targets([row for row in rows if head_of(row.pair) == head], head).sum(0).clamp(min=1)
    weights = counts.rsqrt()
    return weights * counts.sum() / (weights * counts).sum()


def _batches(rows: Sequence[Labelled], size: int, rng: random.Random) -> list[list[Labelled]]:
    """Shuffled batches of rows of about the same length."""
    ordered = sorted(rows, key=lambda row: len(row.pair.answer) + rng.randrange(60))
    batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    rng.shuffle(batches)
    return batches


def save(readers: Sequence[Reader], path: Path, recipe: Recipe, about: dict[str, object]) -> None:
    """Write the LoRA pairs and heads of all readers as fp16 safetensors with `about` as JSON metadata."""
    tensors: dict[str, Tensor] = {}
    for number, reader in enumerate(readers):
        lora = {name: value for name, value in reader.encoder.state_dict().items() if ".lora_" in name}
        for name, value in [*lora.items(), *reader.heads.state_dict().items()]:
            tensors[f"{number}.{name.removesuffix('.default.weight')}"] = value
    shape = {"format": FORMAT, "readers": len(readers), "scaling": recipe.alpha / recipe.rank}
    content = json.dumps({**shape, "recipe": asdict(recipe), **about})
    with atomic(path) as beside:
        halves = {name: value.half().contiguous() for name, value in tensors.items()}
        save_file(halves, beside, metadata={"safecli": content})


def cross_validate(rows: Sequence[Labelled], recipe: Recipe, count: int) -> tuple[list[Verdict], dict[str, float]]:
    """Verdicts on every row by judges that saw no answer to its prompt, and the temperatures that calibrate them."""
    prompts = sorted({row.pair.prompt for row in rows})
    random.Random(recipe.seed).shuffle(prompts)
    fold = {prompt: i % count for i, prompt in enumerate(prompts)}
    verdicts: dict[int, Verdict] = {}
    logits: dict[int, Tensor] = {}
    risks: dict[str, float] = {}
    for k in range(count):
        held = [i for i, row in enumerate(rows) if fold[row.pair.prompt] == k]
        readers = fit([row for row in rows if fold[row.pair.prompt] != k], recipe)
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "fold.safetensors"
            save(readers, weights, recipe, {"temperature": dict.fromkeys(HEADS, 1.0)})
            judge = OutcomeJudge(OutcomeJudge.Options(weights=weights))
        verdicts |= dict(zip(held, judge.judge([rows[i].pair for i in held]), strict=True))
        logits |= dict(zip(held, judge.logits([rows[i].pair for i in held]), strict=True))
        own = [prompt for prompt in prompts if fold[prompt] == k]
        risks |= dict(zip(own, judge.prompt_risk(own), strict=True))
    return [verdicts[i] for i in range(len(rows))], _temperatures(rows, logits, risks)


HEADS = (*OUTCOMES, "prompt")


def _temperatures(rows: Sequence[Labelled], logits: dict[int, Tensor], risks: dict[str, float]) -> dict[str, float]:
    """The divisor of each head's logits, from 0.5 to 4, under which held-out labels are likeliest."""
    grid = [0.5 * 1.05**i for i in range(43)]
    best = {}
    for head in OUTCOMES:
        own = [i for i, row in enumerate(rows) if head_of(row.pair) == head]
        held, truth = torch.stack([logits[i] for i in own]), _targets([rows[i] for i in own], head)
        best[head] = min(grid, key=lambda t: functional.cross_entropy(held / t, truth).item())
    toxic = {row.pair.prompt: float(row.pair.kind == "toxic") for row in rows}
    odds = torch.tensor([risks[prompt] for prompt in toxic]).logit(1e-6)
    truth = torch.tensor(list(toxic.values()))
    best["prompt"] = min(grid, key=lambda t: functional.binary_cross_entropy_with_logits(odds / t, truth).item())
    return best


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
    folds: Annotated[int, typer.Option(help="folds of the cross-validation by prompt; 0 for none")] = 3,
    epochs: Annotated[int, typer.Option(help="passes over the labels")] = Recipe.epochs,
    seed: Annotated[int, typer.Option(help="of the initial weights, the order and the made rows")] = 0,
) -> None:
    """Train the outcome judge on labelled answers and print its cross-validation; or, with --measure, measure it."""
    rows = read(files)
    if measure:
        judge = OutcomeJudge(OutcomeJudge.Options(weights=weights))
        typer.echo(report(rows, judge.judge([row.pair for row in rows])))
        return
    recipe = Recipe(epochs=epochs, seed=seed)
    temperature = dict.fromkeys(HEADS, 1.0)
    if folds:
        verdicts, temperature = cross_validate(rows, recipe, folds)
        typer.echo(f"Cross-validation, {folds} folds by prompt:\n{report(rows, verdicts)}")
    labels = {path.name: file_fingerprint(path) for path in files}
    about = {"temperature": temperature, "rows": len(rows), "labels": labels}
    save(fit(rows, recipe), weights, recipe, about)
    typer.echo(f"wrote {weights} ({weights.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    typer.run(main)
