"""Build a semantic token cost and look at it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from safecli.artifacts import read_manifest
from safecli.config import CostOptions
from safecli.costs import Cost, DenseCost, unit
from safecli.costs.build import load_backend, load_cost, vocabulary_of
from safecli.costs.file import check_ending, write_tensors
from safecli.errors import InputError, MissingError, UsageError
from safecli.models import LanguageModel, load_model, package_folder
from safecli.report.map import write_map
from safecli.stages import Reporter, inherit_model

CONTRASTS = (
    ("hot", "cold"),
    ("good", "bad"),
    ("love", "hate"),
    ("open", "close"),
    ("buy", "sell"),
    ("friend", "enemy"),
    ("help", "harm"),
    ("idiot", "person"),
    ("stupid", "simple"),
    ("ugly", "plain"),
)
SAMPLE, ROWS, NEAREST = 2048, 128, 10
"""Tokens that two costs are compared on, how many at a time, and how many nearest tokens of each."""


@dataclass(frozen=True)
class Built:
    """A cost artefact: its folder, kind, vocabulary size, and what its tensors take, in MiB.

    Of features the mean cosine over pairs of tokens, and how much a few tokens are everybody's nearest (skewness); of
    an approximate search its recall.
    """

    path: Path
    kind: str
    vocab: int
    mebibytes: float
    anisotropy: float | None
    hubness: float | None
    recall: float | None


@dataclass(frozen=True)
class Neighbourhood:
    """The nearest and the farthest tokens of a text, with their costs: of several `tokens`, the mean cost."""

    text: str
    tokens: list[str]
    nearest: list[tuple[str, float]]
    farthest: list[tuple[str, float]]


@dataclass(frozen=True)
class Differing:
    """A token whose ten nearest tokens are not the same under two costs, and the part that is."""

    token: str
    overlap: float
    first: list[str]
    second: list[str]


@dataclass(frozen=True)
class Compared:
    """How two costs agree: Spearman's correlation over pairs of tokens, and the mean overlap of the ten nearest."""

    rank_correlation: float
    overlap: float
    differing: list[Differing]


@dataclass(frozen=True)
class Quality:
    """Whether a cost knows meaning: Spearman's correlation of minus the cost with people's similarity of word pairs.

    `used` of the `pairs` in the file are of words that are one token each. `contrasts` are costs of words that stand in
    like places and mean different things (antonyms; rude and plain words), beside the mean cost of a pair of tokens.
    """

    path: Path
    pairs: int
    used: int
    spearman: float
    mean_cost: float
    contrasts: dict[str, float]


def _loaded(options: CostOptions, report: Reporter) -> tuple[LanguageModel, Cost, Path]:
    load_backend(options)
    model = load_model(inherit_model(options, report))
    return model, *load_cost(options, model, report.say)


def build_cost(options: CostOptions, report: Reporter | None = None) -> Built:
    """Build the cost that the options name, or find it in the cache."""
    _, cost, folder = _loaded(options, report or Reporter())
    size = (folder / "cost.safetensors").stat().st_size / 2**20
    made = read_manifest(folder / "manifest.json", "cost")["result"]
    looked = (made.get(name) for name in ("anisotropy", "hubness", "recall"))
    return Built(folder, "dense" if isinstance(cost, DenseCost) else "sparse", cost.vocab, round(size, 1), *looked)


def show_cost(options: CostOptions, text: str, count: int, report: Reporter | None = None) -> Neighbourhood:
    """The `count` nearest and farthest tokens of a token, or of a word of several; `UsageError` for an empty text."""
    model, cost, _ = _loaded(options, report or Reporter())
    ids = model.answer_ids(text)
    if not ids:
        raise UsageError("--token: give a text that is a token or several")
    row = cost.rows(torch.tensor(ids)).mean(0)
    order = row.argsort(stable=True).tolist()

    def named(indices: list[int]) -> list[tuple[str, float]]:
        return [(model.tokenizer.decode([index]), round(float(row[index]), 4)) for index in indices]

    tokens = [model.tokenizer.decode([index]) for index in ids]
    return Neighbourhood(text, tokens, named(order[:count]), named(order[::-1][:count]))


def export_cost(options: CostOptions, path: Path, report: Reporter | None = None) -> Path:
    """Write the cost that the options name to a `.safetensors` or `.npz` file, building it first where need be.

    Errors: `UsageError` for another ending, before anything is built.
    """
    check_ending(path)
    model, cost, _ = _loaded(options, report or Reporter())
    write_tensors(cost, vocabulary_of(model), path)
    return path


def map_cost(options: CostOptions, texts: list[str], path: Path, report: Reporter | None = None) -> int:
    """Write a page with the vocabulary in the plane, coloured by cost to each of `texts`; how many tokens are on it.

    The plane is that of the cost's features, or where it has none, of the model's own token embeddings.
    Errors: `UsageError` for a text that is not one token.
    """
    model, cost, _ = _loaded(options, report or Reporter())
    vocabulary = vocabulary_of(model)
    known = (~vocabulary.meaningless).nonzero()[:, 0]
    chosen = {text: cost.rows(torch.tensor([token_id(model, text)]))[0, known] for text in texts}
    names = [vocabulary.texts[index] for index in known.tolist()]
    if isinstance(cost, DenseCost):
        basis, features = "the cost's features", cost.features
    else:
        basis, features = "the model's token embeddings", unit(vocabulary.embeddings, vocabulary.meaningless)
    write_map(f"Cost {options.cost}", basis, names, known.tolist(), plane(features[known]), chosen, path)
    return len(known)


def plane(features: Tensor) -> Tensor:
    """The first two principal components of features [n, k]: [n, 2]."""
    centred = features.double() - features.double().mean(0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors
    components: Tensor = centred @ directions[:, [-1, -2]]
    return components


def token_id(model: LanguageModel, token: str) -> int:
    """The id of a text that is one token."""
    ids = model.answer_ids(token)
    if len(ids) != 1:
        parts = ", ".join(repr(model.tokenizer.decode([index])) for index in ids)
        raise UsageError(f"{token!r} is {len(ids)} tokens of this model ({parts}): try it with a leading space")
    return ids[0]


def compare_costs(
    options: CostOptions, first: str, second: str, count: int, report: Reporter | None = None
) -> Compared:
    """Compare two costs, named as `--cost` takes them, over a sample of tokens; the `count` that differ most."""
    report = report or Reporter()
    options = inherit_model(options, report)
    named = [options.model_copy(update={"cost": name, "cost_opt": []}) for name in (first, second)]
    for each in named:
        load_backend(each)
    model = load_model(options)
    one, other = (load_cost(each, model, report.say)[0] for each in named)
    return compared(model, one, other, count)


def compared(model: LanguageModel, first: Cost, second: Cost, count: int) -> Compared:
    """The comparison of two costs of this model's vocabulary."""
    from scipy.stats import spearmanr

    vocabulary = vocabulary_of(model)
    known = (~vocabulary.meaningless).nonzero()[:, 0]
    make = torch.Generator().manual_seed(0)
    sample = known[torch.randperm(len(known), generator=make)[:SAMPLE]]
    pairs: list[list[float]] = [[], []]
    overlaps: list[tuple[float, int, list[list[int]]]] = []
    for start in range(0, len(sample), ROWS):
        tokens = sample[start : start + ROWS]
        columns = torch.randint(len(known), (len(tokens), NEAREST), generator=make)
        nearest = []
        for side, cost in enumerate((first, second)):
            rows = cost.rows(tokens)[:, known]
            pairs[side] += rows.gather(1, columns).flatten().tolist()
            rows[known[None, :] == tokens[:, None]] = torch.inf
            nearest.append(known[rows.topk(NEAREST, largest=False).indices].tolist())
        for token, one, other in zip(tokens.tolist(), *nearest, strict=True):
            overlaps.append((len({*one} & {*other}) / NEAREST, token, [one, other]))
    overlaps.sort(key=lambda found: found[:2])

    def texts(ids: list[int]) -> list[str]:
        return [vocabulary.texts[index] for index in ids]

    differing = [
        Differing(vocabulary.texts[token], share, texts(one), texts(other))
        for share, token, (one, other) in overlaps[:count]
    ]
    mean = sum(share for share, *_ in overlaps) / len(overlaps)
    return Compared(float(spearmanr(*pairs).statistic), mean, differing)


def cost_quality(options: CostOptions, pairs: Path | None, report: Reporter | None = None) -> Quality:
    """Hold a cost against human similarity: lines of two words and a number, tabs or commas between; `#` comments.

    Without a file, WordSim-353 as the package gensim ships it. Errors: `MissingError` without either, `InputError` (a
    file that can't be read, a malformed line, or fewer than three usable pairs).
    """
    from scipy.stats import spearmanr

    path = pairs or _wordsim()
    rated = read_pairs(path)
    model, cost, _ = _loaded(options, report or Reporter())
    known = (~vocabulary_of(model).meaningless).nonzero()[:, 0]
    few = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(0))[:ROWS]]

    def between(words: tuple[str, str]) -> float | None:
        ids = [model.answer_ids(f" {word}") for word in words]
        return float(cost.rows(torch.tensor(ids[0]))[0, ids[1][0]]) if all(len(each) == 1 for each in ids) else None

    found = [(score, near) for words, score in rated if (near := between(words)) is not None]
    if len(found) < 3:
        raise InputError(f"{path}: {len(found)} pairs are of words that are one token of this model: too few")
    scores, costs = zip(*found, strict=True)
    contrasts = {" ".join(words): round(near, 4) for words in CONTRASTS if (near := between(words)) is not None}
    agreement = -float(spearmanr(scores, costs).statistic)
    return Quality(path, len(rated), len(found), agreement, float(cost.rows(few)[:, known].mean()), contrasts)


def _wordsim() -> Path:
    folder = package_folder("gensim")
    path = folder / "test" / "test_data" / "wordsim353.tsv" if folder else None
    if path is None or not path.exists():
        raise MissingError("no word pairs: give --pairs FILE (WordSim-353, SimLex-999), or `pip install gensim`")
    return path


def read_pairs(path: Path) -> list[tuple[tuple[str, str], float]]:
    """Word pairs with people's similarity; a first line without a number is a heading."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = re.split(r"[\t,;]", line)
        try:
            found.append(((parts[0].strip(), parts[1].strip()), float(parts[2])))
        except (IndexError, ValueError) as error:
            if found:
                raise InputError(f"{path}, line {number}: write two words and a number") from error
    return found
