"""The checks for authors of cost plugins: our own backends pass, and each check fails on what is broken so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field

from safecli import testing
from safecli.costs import Neighbours, Vocabulary
from safecli.costs.faiss import FaissCost
from safecli.costs.mix import MixCost
from safecli.costs.sentence import SentenceCost
from safecli.costs.token import TokenCost

test_token = testing.cost_conformance(TokenCost)
test_token_whitened = testing.cost_conformance(TokenCost, transform="whitened", remove=2)
test_sentence = testing.cost_conformance(SentenceCost)
test_faiss = testing.cost_conformance(FaissCost, k=5)
test_mix = testing.cost_conformance(MixCost, of={"token": 0.5, "sentence": 0.5})


def backend(build: Callable[[Vocabulary], Any], options: type[BaseModel] | None = None) -> Any:
    """A backend that builds so."""

    class Good(BaseModel):
        model_config = ConfigDict(extra="forbid")
        k: int = Field(3, description="A number.")

    class Made:
        Options = options or Good

        def __init__(self, options: BaseModel) -> None: ...

        def build(self, vocabulary: Vocabulary, say: Callable[[str], None]) -> Any:
            return build(vocabulary)

    return Made


class Undescribed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    k: int = 3


class Lenient(BaseModel):
    k: int = Field(3, description="A number.")


def neighbours(vocabulary: Vocabulary, **changed: Any) -> Neighbours:
    odd, size = vocabulary.meaningless, vocabulary.size
    indices = (torch.arange(size)[:, None] + torch.tensor([1, 2])) % size
    indices[odd[indices] | odd[:, None]] = -1
    costs = torch.linspace(0.1, 0.9, size)[:, None].repeat(1, 2)
    return Neighbours(**{"indices": indices, "costs": costs, "ceiling": 1.0, **changed})


def spoiled(vocabulary: Vocabulary) -> torch.Tensor:
    vocabulary.embeddings[5] += 1
    return vocabulary.embeddings.clone()


def with_a_nan(vocabulary: Vocabulary) -> torch.Tensor:
    features = vocabulary.embeddings.clone()
    features[4, 0] = torch.nan
    return features


BROKEN = [
    (testing.check_shape, lambda v: v.embeddings[:-1]),
    (testing.check_dtype, lambda v: v.embeddings.long()),
    (testing.check_device, lambda v: v.embeddings.to("meta")),
    (testing.check_shape, lambda v: neighbours(v, ceiling=3.0)),
    (testing.check_shape, lambda v: neighbours(v, indices=neighbours(v).indices + v.size)),
    (testing.check_finite, with_a_nan),
    (testing.check_range, lambda v: neighbours(v, costs=neighbours(v).costs - 0.5)),
    (testing.check_meaning, lambda v: torch.ones(v.size, 4)),
    (testing.check_symmetry, with_a_nan),
    (testing.check_unit_norm, with_a_nan),
    (testing.check_determinism, lambda v: torch.randn(v.size, 4)),
    (testing.check_input_is_left_alone, spoiled),
    (testing.check_special_tokens, lambda v: neighbours(v, indices=torch.zeros(v.size, 2, dtype=torch.long))),
    (testing.check_loss, lambda v: torch.ones(v.size, 4)),
]


def test_a_sound_backend_of_neighbours_passes() -> None:
    for check in testing.COST_CHECKS:
        check(backend(neighbours), {})


@pytest.mark.parametrize(("check", "build"), BROKEN)
def test_a_check_fails_on_what_it_is_for(check: Callable[..., None], build: Callable[[Vocabulary], Any]) -> None:
    with pytest.raises(AssertionError):
        check(backend(build), {})


@pytest.mark.parametrize("options", [Undescribed, Lenient])
def test_options_that_say_nothing_or_take_anything_fail(options: type[BaseModel]) -> None:
    with pytest.raises(AssertionError):
        testing.check_options(backend(lambda v: v.embeddings, options), {})


def test_an_artefact_that_does_not_keep_what_was_built_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = iter(range(10))
    read = testing.read_cost

    def forgetful(*arguments: Any) -> Any:
        cost = read(*arguments)
        return type(cost)(cost.features.roll(next(reads), 0))

    monkeypatch.setattr(testing, "read_cost", forgetful)
    with pytest.raises(AssertionError, match="differs from what was kept"):
        testing.check_artefact(TokenCost, {})


def test_the_vocabulary_has_words_and_tokens_without_meaning() -> None:
    vocabulary = testing.vocabulary()
    assert int(vocabulary.meaningless.sum()) == 6
    assert vocabulary.texts[2] == "the"
    assert " the" in vocabulary.texts
