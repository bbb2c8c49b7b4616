"""`safecli bench cost`: building a cost, against the bare encoding and the bare search that it can't do without."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from safecli.bench.memory import peak_rss, restart_peak
from safecli.config import ModelOptions
from safecli.costs import Vocabulary, unit
from safecli.costs.build import build_into
from safecli.costs.faiss import FaissCost
from safecli.models import load_model, minilm
from safecli.registry import COSTS, load_plugin
from safecli.stages import Reporter


def cost(vocab: int, size: int, device: str, runs: int, report: Reporter) -> list[dict[str, Any]]:
    """A row for sentence and for faiss: the seconds of a build over those of its floor, and peak bytes of both.

    The vocabulary holds the demo model's tokens and, beyond them, pairs of them; its embeddings [V, size] are random.
    The floor of `sentence` is MiniLM encoding the texts, that of `faiss` an exact index filled and searched. Medians of
    interleaved runs.
    """
    vocabulary = made_vocabulary(vocab, size, torch.device(device))
    sides: dict[str, tuple[Callable[[], None], Callable[[], None], str]] = {
        "sentence": (partial(_encode, vocabulary), partial(_build, "sentence", vocabulary), "MiniLM over the texts"),
        "faiss": (
            partial(_search, vocabulary),
            partial(_build, "faiss", vocabulary),
            "IndexFlatIP, filled and searched",
        ),
    }
    rows = []
    for name, (floor, build, said) in sides.items():
        seconds: list[tuple[float, float]] = []
        extra: list[tuple[int, int]] = []
        for number in range(runs):
            taken = [_measured(floor), _measured(build)]
            seconds.append((taken[0][0], taken[1][0]))
            extra.append((taken[0][1], taken[1][1]))
            report.progress(f"bench cost: {name}", number + 1, runs)
        bare, ours = (statistics.median(each) for each in zip(*seconds, strict=True))
        bare_bytes, bytes_ = (max(each) for each in zip(*extra, strict=True))
        rows.append(
            {"cost": name, "V": vocab, "k": size, "floor": said, "floor_ratio": ours / bare, "seconds": ours}
            | {"extra_bytes": bytes_, "floor_extra_bytes": bare_bytes}
        )
    return rows


def made_vocabulary(vocab: int, size: int, device: torch.device) -> Vocabulary:
    """The demo model's first `vocab` tokens, then pairs of them, with random embeddings [V, size]."""
    tokenizer = load_model(ModelOptions(model="demo", device="cpu")).tokenizer
    known = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    texts = dict.fromkeys(known[:vocab])
    step = 0
    while len(texts) < vocab:
        step += 1
        pairs = (a + b for a, b in zip(known, known[step:] + known[:step], strict=True))
        texts |= dict.fromkeys(pairs)
    ids = {text: index for index, text in enumerate(list(texts)[:vocab])}
    words = Tokenizer(models.WordLevel(ids, unk_token=known[0]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=words, unk_token=known[0])
    embeddings = torch.randn(vocab, size, generator=torch.Generator().manual_seed(0))
    return Vocabulary(wrapped, embeddings, device, embeddings)


def _build(name: str, vocabulary: Vocabulary) -> None:
    backend_class = load_plugin(COSTS, name)
    backend = backend_class(backend_class.Options())
    with tempfile.TemporaryDirectory() as folder:
        build_into(Path(folder), backend, vocabulary, {}, lambda _: None)


def _encode(vocabulary: Vocabulary) -> None:
    texts = sorted({text.strip().casefold() for text in vocabulary.texts} - {""}, key=len)
    encoder = SentenceTransformer(minilm(), device=str(vocabulary.device))
    encoder.encode(texts, batch_size=256, show_progress_bar=False)


def _search(vocabulary: Vocabulary) -> None:
    known = ~vocabulary.meaningless
    vectors = unit(vocabulary.embeddings, vocabulary.meaningless)[known].numpy()
    index: Any = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    index.search(vectors, FaissCost.Options().k + 1)


def _measured(run: Callable[[], object]) -> tuple[float, int]:
    before, started = restart_peak(), time.perf_counter()
    run()
    return time.perf_counter() - started, max(0, peak_rss() - before)
