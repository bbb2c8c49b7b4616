"""How a model answers: alone, in a batch, and in rows that take up the next prompt when an answer ends."""

from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from safecli.generation import (
    Answer,
    Request,
    _can_refill,
    _Engine,
    _Picker,
    _places,
    _Room,
    _whole_batches,
    fitting_batch,
    generate,
)
from safecli.models import LanguageModel
from safecli.records import shipped

PROMPTS = ["Name a colour.", "What is two plus two?", "Write one sentence about the sea, please.", "Hi"]


def test_an_answer_does_not_depend_on_the_batch_it_is_in(demo: LanguageModel) -> None:
    requests = [Request(demo.prompt_ids(prompt), seed) for seed, prompt in enumerate(PROMPTS)]
    for temperature in (0.0, 0.8):
        together = generate(demo, requests, 6, temperature)
        assert generate(demo, requests[::-1], 6, temperature) == together[::-1]
        assert generate(demo, requests[2:3], 6, temperature) == together[2:3]


def test_samples_differ_by_their_seed_and_only_by_it(demo: LanguageModel) -> None:
    ids = demo.prompt_ids("Tell me a story.")
    answers = generate(demo, [Request(ids, seed) for seed in (1, 2, 1)], 12, temperature=1.0)
    assert answers[0] == answers[2] != answers[1]


def test_an_answer_says_whether_the_model_ended_it(demo: LanguageModel) -> None:
    (short,) = generate(demo, [Request(demo.prompt_ids("What is two plus two?"))], 2)
    assert (short.tokens, short.finished) == (2, False)
    (ended,) = generate(demo, [Request(demo.prompt_ids("Is there a neat way to crack an egg with one hand?"))], 60)
    assert ended.finished
    assert ended.tokens < 60
    assert "<|" not in ended.text


def test_the_sampler_draws_from_the_softmax_at_its_temperature(demo: LanguageModel) -> None:
    scores = torch.tensor([[1.0, 0.0, -1.0]])
    generators = [torch.Generator().manual_seed(seed) for seed in range(4000)]
    found = _Picker(demo.model, 0.5).scores(torch.empty(4000, 0), scores.expand(4000, 3), generators)
    draws = found.argmax(-1)
    expected = (scores[0] / 0.5).softmax(-1)
    torch.testing.assert_close(draws.bincount(minlength=3) / 4000, expected, atol=0.03, rtol=0)


def test_longer_sequences_fit_in_smaller_batches(demo: LanguageModel) -> None:
    sizes = [fitting_batch(demo, tokens, cap=10**9) for tokens in (64, 1024, 10**8)]
    assert sizes[0] > sizes[1] > sizes[2] == 1
    assert fitting_batch(demo, 64) <= 48


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_refilled_rows_answer_as_whole_batches_do(demo: LanguageModel, slots: int, temperature: float) -> None:
    texts = [prompt.prompt for prompt in shipped("harmless", "dev")[:7]] + ["What is two plus two?"]
    requests = [Request(demo.prompt_ids(text), seed) for seed, text in enumerate(texts)]
    engine = _Engine(demo, requests, 12, temperature)
    with torch.inference_mode():
        whole = _whole_batches(engine, len(requests))
        refilled = engine.run(slots)
    assert _can_refill(demo.model)
    assert refilled == whole
    assert {len(said) for said in whole} != {12}  # some of them end by themselves


def test_an_opening_is_part_of_the_answer(demo: LanguageModel) -> None:
    opening = tuple(demo.answer_ids("The colour is"))
    (found,) = generate(demo, [Request(demo.prompt_ids("Name a colour."), opening=opening)], 4)
    assert isinstance(found, Answer)
    assert found.text.startswith("The colour is ")
    assert found.tokens == 4


@given(
    st.lists(st.tuples(st.sampled_from(["say", "keep", "join"]), st.integers(0, 2**16)), max_size=25),
    st.integers(1, 5),
    st.integers(1, 9),
)
@example([("join", 10), ("keep", 1), ("join", 33), ("join", 3)], 1, 1)  # a window that shrinks and grows again
def test_rooms_hold_what_was_written_for_every_row_and_nothing_before(
    steps: list[tuple[str, int]], rows: int, length: int
) -> None:
    """Rows that are dropped hold infinity, which no mask would hide."""

    def write(room: _Room, keys: torch.Tensor) -> list[torch.Tensor]:
        room.update(keys, -keys[..., :2])
        return list(keys)

    with mock.patch("safecli.generation.ROOM", 3):
        room = _Room()
        expected = write(room, torch.randn(rows, 2, length, 4))
        for step, number in steps:
            if step == "say":
                said = write(room, torch.randn(len(expected), 2, 1, 4))
                expected = [torch.cat([old, new], 1) for old, new in zip(expected, said, strict=True)]
            elif step == "keep":
                staying = [row for row in range(len(expected)) if number >> row & 1] or [0]
                for row in set(range(len(expected))) - set(staying):
                    room.keys[row] = room.values[row] = torch.inf
                order = _places(staying)
                assert sorted(order) == staying
                expected = [expected[row] for row in order]
                room.keep(order, room.keys.shape[2] - max(row.shape[1] for row in expected))
            else:
                other = _Room()
                expected += write(other, torch.randn(1 + number % 3, 2, 1 + number % 11, 4))
                room.join(other)
            assert room.keys.shape[:3] == (len(expected), 2, max(row.shape[1] for row in expected))
            for keys, values, row in zip(room.keys, room.values, expected, strict=True):
                assert torch.equal(keys[:, -row.shape[1] :], row)
                assert torch.equal(values[:, -row.shape[1] :], -row[..., :2])
            assert room.keys.isfinite().all()
            assert room.values.isfinite().all()
