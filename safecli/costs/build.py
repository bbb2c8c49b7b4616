"""How a cost is built by its backend, kept in the cache by fingerprint, and read again."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safecli.artifacts import atomic, by_content, fingerprint, locked, manifest, read_manifest, write_json
from safecli.config import CostOptions, build, cache_dir
from safecli.costs import (
    Cost,
    CostBackend,
    DenseCost,
    Neighbours,
    SparseCost,
    Vocabulary,
    anisotropy,
    hubness,
    unit,
)
from safecli.errors import InputError
from safecli.models import LanguageModel
from safecli.registry import COSTS, key_values, load_plugin, package_of, running

logger = logging.getLogger(__name__)


def load_backend(options: CostOptions) -> tuple[type[CostBackend], BaseModel]:
    """The backend's class and its options; `UsageError` for a name or an option that there isn't.

    `NAME:key=value,key=value` brings options along; a mixture takes what stands there as its weights.
    """
    name, colon, text = options.cost.partition(":")
    backend_class = load_plugin(COSTS, name)
    chosen = key_values(options.cost_opt, "--cost-opt")
    if colon:
        weights = "of" in backend_class.Options.model_fields
        chosen |= {"of": text} if weights else key_values(text.split(","), f"--cost {name}:")
    return backend_class, build(backend_class.Options, chosen, f"cost '{name}'")


def load_cost(
    options: CostOptions, language_model: LanguageModel, say: Callable[[str], None] = logger.info
) -> tuple[Cost, Path]:
    """The cost that the options name, built when it isn't in the cache, and the folder that holds it."""
    backend_class, chosen = load_backend(options)
    vocabulary, name = vocabulary_of(language_model), options.cost.partition(":")[0]
    with running(COSTS, name):
        backend = backend_class(chosen)
    identity = {
        "backend": name,
        "package": package_of(COSTS, name),
        "options": by_content(chosen.model_dump()),
        "vocabulary": vocabulary_fingerprint(vocabulary),
        "embeddings": fingerprint(
            *(few(layer) for layer in (vocabulary.embeddings, vocabulary.output_embeddings)),
        ),
    }
    folder = cache_dir() / "costs" / f"{name}-{fingerprint(identity)}"
    with locked(folder / ".lock", wait=True):
        if not (folder / "manifest.json").exists():
            say(f"building cost '{name}' for {vocabulary.size:,} tokens")
            with running(COSTS, name):
                build_into(folder, backend, vocabulary, identity, say)
    return read_cost(folder, vocabulary), folder


def few(layer: Tensor) -> tuple[Any, ...]:
    """Enough of an embedding layer to know it by."""
    return tuple(layer.shape), layer.flatten()[::997].tolist()


def build_into(
    folder: Path, backend: CostBackend, vocabulary: Vocabulary, identity: dict[str, Any], say: Callable[[str], None]
) -> None:
    """Build a cost and keep it as an artefact; what a build that was killed had done is not done again."""
    unfinished = folder / "unfinished"
    built = backend.build(replace(vocabulary, unfinished=unfinished), say)
    save_cost(folder, built, vocabulary, identity)
    shutil.rmtree(unfinished, ignore_errors=True)


def vocabulary_of(language_model: LanguageModel) -> Vocabulary:
    """What a backend is given of a model, its embeddings in float32 on the CPU."""
    given, output = (
        layer.weight.detach().float().cpu()
        for layer in (language_model.model.get_input_embeddings(), language_model.model.get_output_embeddings())
    )
    return Vocabulary(language_model.tokenizer, given, language_model.device, output)


def vocabulary_fingerprint(vocabulary: Vocabulary) -> str:
    """Identify a vocabulary by its token texts and size."""
    return fingerprint(vocabulary.size, sorted(vocabulary.tokenizer.get_vocab().items(), key=lambda item: item[1]))


def save_cost(
    folder: Path, built: Tensor | Neighbours | SparseCost, vocabulary: Vocabulary, identity: dict[str, Any]
) -> None:
    """Write a built cost as an artefact: features made unit, neighbours symmetric."""
    measured = built.measured if isinstance(built, Neighbours) else {}
    if isinstance(built, Neighbours):
        built = built.symmetric()
    if isinstance(built, SparseCost):
        tensors = {"starts": built.starts, "neighbours": built.neighbours, "costs": built.costs}
        result: dict[str, Any] = {"kind": "sparse", "ceiling": built.ceiling, "entries": len(built.costs)} | measured
    else:
        features = unit(built, vocabulary.meaningless).contiguous()
        tensors = {"features": features}
        known = features[~vocabulary.meaningless]
        result = {"kind": "dense", "k": built.shape[1], "anisotropy": anisotropy(known), "hubness": hubness(known)}
    with atomic(folder / "cost.safetensors") as beside:
        save_file(tensors, beside)
    result |= {"V": vocabulary.size, "meaningless": int(vocabulary.meaningless.sum())}
    write_json(folder / "manifest.json", manifest("cost", identity, result))


def read_cost(folder: Path, vocabulary: Vocabulary) -> Cost:
    """Read a cost artefact, refusing one that was built for another vocabulary."""
    content = read_manifest(folder / "manifest.json", "cost")
    made_for, here = content["identity"]["vocabulary"], vocabulary_fingerprint(vocabulary)
    if made_for != here:
        raise InputError(
            f"the cost {folder} was built for another vocabulary ({made_for}) than this model's ({here}): "
            "build it again with `safecli cost`"
        )
    try:
        with safe_open(folder / "cost.safetensors", "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, FileNotFoundError) as error:
        raise InputError(f"the cost {folder} is broken ({error}): delete the folder, and it is built again") from error
    if content["result"]["kind"] == "dense":
        return DenseCost(tensors["features"])
    return SparseCost(tensors["starts"], tensors["neighbours"], tensors["costs"], content["result"]["ceiling"])
