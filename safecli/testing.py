"""Conformance checks that the author of a cost plugin runs in pytest, in one line:

test_my_cost = cost_conformance(MyCost, path="vectors.txt")
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from safecli.costs import Cost, CostBackend, DenseCost, Neighbours, SparseCost, Vocabulary
from safecli.costs.build import read_cost, save_cost, vocabulary_fingerprint
from safecli.costs.file import fault_of
from safecli.losses import linear_emd

_TEXT = (
    "the a of and to in is was he she it they we you I man woman boy girl child king queen dog cat horse bird fish "
    "tree house car road water fire food bread day night year good bad big small hot cold fast slow happy sad "
    "love hate war peace buy sell give take open close"
)
WORDS = _TEXT.split()


@cache
def vocabulary() -> Vocabulary:
    """Sixty-odd English words with and without a space before, two special tokens, a lone byte, and unused ids."""
    tokens = ["<s>", "</s>", *WORDS, *(f"Ġ{word}" for word in WORDS), "Ã"]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    embeddings = torch.randn(len(tokens) + 3, 24, generator=torch.Generator().manual_seed(0)) + 0.5
    return Vocabulary(wrapped, embeddings, torch.device("cpu"), embeddings)


def _built(backend: type[CostBackend], options: dict[str, Any]) -> torch.Tensor | Neighbours | SparseCost:
    return backend(backend.Options(**options)).build(vocabulary(), lambda _: None)


def _kept(backend: type[CostBackend], options: dict[str, Any], folder: Path) -> Cost:
    save_cost(folder, _built(backend, options), vocabulary(), {"vocabulary": vocabulary_fingerprint(vocabulary())})
    return read_cost(folder, vocabulary())


def check_shape(backend: type[CostBackend], options: dict[str, Any]) -> None:
    """Features [V, k], or neighbours [V, K] with a ceiling, or those in CSR form."""
    built = _built(backend, options)
    size = vocabulary().size
    if isinstance(built, SparseCost):
        assert built.vocab == size, f"{built.vocab} rows of neighbours for {size} tokens"
        assert not fault_of(built), fault_of(built)
    elif isinstance(built, Neighbours):
        assert built.indices.shape == built.costs.shape, "indices and costs have different shapes"
        assert built.indices.shape[0] == size, f"{built.indices.shape[0]} rows of neighbours for {size} tokens"
        assert not built.indices.is_floating_point(), "indices are not integers"
        assert int(built.indices.min()) >= -1, "an index below -1, which stands for none"
        assert int(built.indices.max()) < size, "an index beyond the vocabulary"
        assert 0 < built.ceiling <= 2, f"the ceiling {built.ceiling} is not in (0, 2]"
    else:
        assert built.ndim == 2, f"features of {built.ndim} dimensions, not [V, k]"
        assert built.shape[0] == size, f"{built.shape[0]} rows of features for {size} tokens"


def check_dtype(backend: type[CostBackend], options: dict[str, Any]) -> None:
    """Features and costs are floating point, and what is kept is float32."""
    built = _built(backend, options)
    values = built if isinstance(built, torch.Tensor) else built.costs
    assert values.is_floating_point(), f"{values.dtype} is not floating point"
    with tempfile.TemporaryDirectory() as folder:
        cost = _kept(backend, options, Path(folder))
    kept = cost.features if isinstance(cost, DenseCost) else cost.costs
    assert kept.dtype == torch.float32, f"{kept.dtype} was kept"


def check_device(backend: type[CostBackend], options: dict[str, Any]) -> None:
    """Whatever device is there to work on, what is built lies on the CPU."""
    for name in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        there = replace(vocabulary(), device=torch.device(name))
        built = backend(backend.Options(**options)).build(there, lambda _: None)
        tensors = [built] if isinstance(built, torch.Tensor) else vars(built).values()
        for tensor in tensors:
            on = tensor.device.type if isinstance(tensor, torch.Tensor) else "cpu"
            assert on == "cpu", f"built on {name}, it lies on {on}: move it to the CPU"


def check_finite(backend: type[CostBackend], options: dict[str, Any]) -> None:
    """No NaN or infinity."""
    built = _built(backend, options)
    values = built if isinstance(built, torch.Tensor) else built.costs
    assert values.isfinite().all(), "NaN or infinity"


def check_range(backend: type[CostBackend], options: dict[str, Any]) -> None:
    """Costs in [0, 2]."""
    built = _built(backend, options)
    if isinstance(built, Neighbours):
        costs = built.costs[built.indices >= 0]
        assert float(costs.min()) >= -1e-6, "a cost below 0"
        assert float(costs.max()) <= 2 + 1e-6, "a cost above 2"


def check_meaning(backend: type[CostBackend], options: dict[str, Any]) -> None:
    """Tokens are told apart: not all pairs of words cost the same."""
    with tempfile.TemporaryDirectory() as folder:
        rows = _kept(backend, options, Path(folder)).rows((~vocabulary().meaningless).nonzero()[:, 0])
    assert float(rows.std()) > 1e-4, "all tokens cost the same"


def check_symmetry(backend: type[CostBackend], options: dict[str, Any]) -> None:
    """C is symmetric and 0 on the diagonal, once it is kept."""
    with tempfile.TemporaryDirectory() as folder:
        rows = _kept(backend, options, Path(folder)).rows(torch.arange(vocabulary().size))
    assert torch.allclose(rows, rows.T, atol=1e-5), "C_ij and C_ji differ"
    assert not rows.diagonal().any(), "a token is not at 0 from itself"


def check_unit_norm(backend: type[CostBackend], options: dict[str, Any]) -> None:
    """Kept features have length 1, so that C is 1 - f_i . f_j."""
    with tempfile.TemporaryDirectory() as folder:
        cost = _kept(backend, options, Path(folder))
    if isinstance(cost, DenseCost):
        assert torch.allclose(cost.features.norm(dim=1), torch.ones(cost.vocab), atol=1e-4), "lengths other than 1"


def check_determinism(backend: type[CostBackend], options: dict[str, Any]) -> None:
    """Built twice, the same."""
    first, second = _built(backend, options), _built(backend, options)
    assert type(first) is type(second), "features once and neighbours once"
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        assert torch.equal(torch.as_tensor(first), torch.as_tensor(second)), "features differ from build to build"
        return
    for name, value in vars(first).items():
        other = getattr(second, name)
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same, f"{name} differ from one build to the next"


def check_input_is_left_alone(backend: type[CostBackend], options: dict[str, Any]) -> None:
    """The model's embeddings are not written to."""
    before = vocabulary().embeddings.clone()
    _built(backend, options)
    after = vocabulary().embeddings.clone()
    vocabulary().embeddings.copy_(before)
    assert torch.equal(before, after), "the build wrote to the model's embeddings"


def check_special_tokens(backend: type[CostBackend], options: dict[str, Any]) -> None:
    """Tokens without meaning are average, or at the ceiling from all others: neighbours leave them out."""
    built, odd = _built(backend, options), vocabulary().meaningless
    if isinstance(built, Neighbours):
        assert (built.indices[odd] == -1).all(), "special tokens have neighbours: give them -1"
        assert not odd[built.indices[built.indices >= 0]].any(), "special tokens are neighbours of words"
    if isinstance(built, SparseCost):
        assert (built.starts.diff()[odd] == 1).all(), "special tokens have neighbours beside themselves"


def check_artefact(backend: type[CostBackend], options: dict[str, Any]) -> None:
    """It is kept as safetensors, never pickle, and read again as it was."""
    with tempfile.TemporaryDirectory() as name:
        cost = _kept(backend, options, Path(name))
        tensors = load_file(Path(name) / "cost.safetensors")
        assert tensors, "nothing was kept"
        again = read_cost(Path(name), vocabulary())
    ids = torch.arange(vocabulary().size)
    assert torch.equal(cost.rows(ids), again.rows(ids)), "what is read differs from what was kept"


def check_options(backend: type[CostBackend], options: dict[str, Any]) -> None:
    """Options survive JSON, refuse unknown names, and each says what it is."""
    chosen = backend.Options(**options)
    assert backend.Options.model_validate_json(chosen.model_dump_json()) == chosen, "options don't survive JSON"
    assert backend.Options.model_config.get("extra") == "forbid", "an unknown option is not refused: extra='forbid'"
    for name, field in backend.Options.model_fields.items():
        assert field.description, f"the option {name} has no description"


def check_loss(backend: type[CostBackend], options: dict[str, Any]) -> None:
    """`linear_emd` takes it, and its gradient moves."""
    with tempfile.TemporaryDirectory() as folder:
        cost = _kept(backend, options, Path(folder))
    words = (~vocabulary().meaningless).nonzero()[:8, 0]
    hidden = torch.zeros(8, 24, requires_grad=True)
    loss = linear_emd(hidden, vocabulary().embeddings, words, cost)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.isfinite(), "the loss is not finite"
    assert gradient.isfinite().all(), "the gradient is not finite"
    assert gradient.any(), "the gradient is zero: all tokens cost the same"


COST_CHECKS = (
    check_shape,
    check_dtype,
    check_device,
    check_finite,
    check_range,
    check_meaning,
    check_symmetry,
    check_unit_norm,
    check_determinism,
    check_input_is_left_alone,
    check_special_tokens,
    check_artefact,
    check_options,
    check_loss,
)


def cost_conformance(backend: type[CostBackend], **options: Any) -> Callable[..., None]:
    """A test for pytest that runs every check on a backend with these options; assign it to a name `test_…`."""
    import pytest

    def conforms(check: Callable[..., None]) -> None:
        check(backend, options)

    names = [check.__name__.removeprefix("check_") for check in COST_CHECKS]
    test: Callable[..., None] = pytest.mark.parametrize("check", COST_CHECKS, ids=names)(conforms)
    return test
