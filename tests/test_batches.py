"""From records to batches: masks, alignment with the reference, weights, targets, and the gradient they give."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from safecli.config import CAREFUL, TrainOptions
from safecli.costs import DenseCost
from safecli.errors import InputError, UsageError
from safecli.losses import Head, Target, emd
from safecli.models import LanguageModel
from safecli.records import Response
from safecli.stages import train
from safecli.stages.batches import (
    Collator,
    Example,
    Mix,
    content_tokens,
    examples,
    few_repeats,
    first_tokens,
    pack,
    training_records,
    unsafe_targets,
)
from safecli.stages.train import TaSftTrainer, _trainer, _with_lora, with_recipe

ANSWERS = [
    "Sure, here is how.",
    "No.",
    "First take the long way home, then call me, then wait for a while.",
    "Yes, it is.",
]
RESPONSES = [Response(prompt=f"Question {i}{' and more' * i}?", answer=text) for i, text in enumerate(ANSWERS)]


def _made(model: LanguageModel, **options: Any) -> list[Example]:
    return examples(RESPONSES, model, TrainOptions(**options))


def _collator(model: LanguageModel, cut: int | None = None, **options: Any) -> Collator:
    return Collator(with_recipe(TrainOptions(**options)), model.tokenizer.pad_token_id, content_tokens(model), cut)


def test_an_example_is_the_chat_template_token_by_token(demo: LanguageModel) -> None:
    for response, example in zip(RESPONSES, _made(demo), strict=True):
        turns = [{"role": "user", "content": response.prompt}, {"role": "assistant", "content": response.answer}]
        whole = demo.tokenizer.apply_chat_template(turns, tokenize=True)["input_ids"]
        assert example.prompt + example.answer == whole[: whole.index(demo.end_id, len(example.prompt)) + 1]
        assert demo.tokenizer.decode(example.answer) == response.answer + "<|im_end|>"


def test_an_answer_that_was_cut_short_has_no_end_token(demo: LanguageModel) -> None:
    (example,) = examples([RESPONSES[0].model_copy(update={"finished": False})], demo, TrainOptions())
    assert demo.end_id not in example.answer


def test_long_examples_are_cut_and_those_without_room_left_out(demo: LanguageModel) -> None:
    lengths = [len(example.prompt) for example in _made(demo)]
    longest = lengths[2] + 3
    made = _made(demo, max_tokens=longest)
    assert [len(example.prompt) for example in made] == [length for length in lengths if length < longest]
    assert max(len(example.prompt) + len(example.answer) for example in made) == longest


def test_the_careful_reference_sees_the_sentence_and_the_model_does_not(demo: LanguageModel) -> None:
    for example, base in zip(_made(demo, reference="careful"), _made(demo), strict=True):
        assert CAREFUL in demo.tokenizer.decode(example.reference)
        assert CAREFUL not in demo.tokenizer.decode(example.prompt)
        assert base.reference == base.prompt == example.prompt


@pytest.mark.parametrize("cut", [None, 1, 3])
def test_reference_positions_predict_the_same_answer_tokens(demo: LanguageModel, cut: int | None) -> None:
    made = _made(demo)
    batch = _collator(demo, cut)([(made[0], made[1], made[3]), (made[2], made[3], None), (made[1], made[2], made[0])])
    rows, reference = batch["input_ids"].flatten(), batch["reference_ids"].flatten()
    unsafe = [token for i in (1, 3, 2) for token in made[i].answer[:cut]]
    general = [token for i in (0, 2, 1) for token in made[i].answer]
    safe = [token for i in (3, 0) for token in made[i].answer]
    for kind, expected in (("unsafe", unsafe), ("general", general), ("safe", safe)):
        assert rows[batch[f"{kind}_at"] + 1].tolist() == expected
        if kind != "safe":
            assert reference[batch[f"{kind}_reference_at"] + 1].tolist() == expected
    assert batch["unsafe_ids"][:, 0].tolist() == unsafe
    assert batch["general_ids"].tolist() == general
    assert "safe_reference_at" not in batch
    assert batch["attention_mask"].sum() == sum(len(made[i].prompt) for i in (0, 2, 1, 1, 3, 2, 3, 0)) + len(
        unsafe + general + safe
    )


def test_every_example_of_a_kind_weighs_the_same(demo: LanguageModel) -> None:
    made = _made(demo)
    batch = _collator(demo)([(one, one, None) for one in made])
    lengths = [len(example.answer) for example in made]
    for kind in ("general", "unsafe"):
        shares = [float(part.sum()) for part in batch[f"{kind}_weight"].split(lengths)]
        assert shares == pytest.approx([1 / len(made)] * len(made))
    assert not any(key.startswith("safe") for key in batch)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.data())
def test_targets_are_distributions_over_what_comes_next(answer: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(answer)))
    onehot = unsafe_targets(answer, count, "onehot", set())
    assert onehot == [{token: 1.0} for token in answer[:count]]
    window = unsafe_targets(answer, count, "window", set())
    bag = unsafe_targets(answer, count, "bag", {1, 2})
    for position in range(count):
        assert set(window[position]) == set(answer[position : position + 4])
        assert sum(window[position].values()) == pytest.approx(1)
        assert sum(bag[position].values()) == pytest.approx(1)
    words = Counter(token for token in answer if token in (1, 2))
    if words:
        assert bag == [{token: n / words.total() for token, n in words.items()}] * count
    else:
        assert bag == onehot


def test_a_window_halves_its_weights_and_adds_up_a_token_that_comes_twice() -> None:
    assert unsafe_targets([7, 8, 7], 1, "window", set()) == [{7: pytest.approx(5 / 7), 8: pytest.approx(2 / 7)}]


@given(st.lists(st.dictionaries(st.integers(0, 9), st.floats(0.1, 1), min_size=1, max_size=4), min_size=1))
def test_packing_keeps_every_distribution(targets: list[dict[int, float]]) -> None:
    packed = pack(targets)
    dense = torch.zeros(len(targets), 10).scatter_add(1, packed.ids, packed.weights)
    expected = torch.tensor([[target.get(token, 0.0) for token in range(10)] for target in targets])
    torch.testing.assert_close(dense, expected)


def test_content_tokens_are_words_of_four_letters(demo: LanguageModel) -> None:
    content = {demo.tokenizer.decode([token]) for token in content_tokens(demo)}
    assert {" weapon", " money"} <= content
    assert not {" the", " you", ".", " 2021", "tion", "<|im_end|>"} & content


@pytest.mark.parametrize(("tokens", "count"), [("all", None), ("first:1", 1), ("first:16", 16)])
def test_which_tokens_count_is_read(tokens: str, count: int | None) -> None:
    assert first_tokens(tokens) == count


@pytest.mark.parametrize("tokens", ["first", "first:0", "first:-1", "16", "first:1.5", "all ", ""])
def test_which_tokens_count_is_refused(tokens: str) -> None:
    with pytest.raises(UsageError, match=r"first:K .*or all"):
        first_tokens(tokens)


def test_a_stock_sentence_is_kept_three_times() -> None:
    stock = "I'm sorry, but I can't help with that, no matter {}."
    rows = [Response(prompt=str(i), answer=stock.format(i)) for i in range(9)]
    rows += [Response(prompt="x", answer="Let me say why.")] * 2
    assert [row.prompt for row in few_repeats(rows)] == ["0", "1", "2", "x", "x"]


def test_the_mix_takes_every_example_once_a_pass_and_depends_on_the_seed() -> None:
    kinds = [[Example([kind], [i], []) for i in range(size)] for kind, size in ((0, 4), (1, 3))]
    mix = Mix(*kinds, [], length=12, seed=1)
    units = [mix[i] for i in range(len(mix))]
    assert Counter(general.answer[0] for general, _, _ in units if general) == dict.fromkeys(range(4), 3)
    assert {unsafe.answer[0] for _, unsafe, _ in units[:3] if unsafe} == {0, 1, 2}
    assert {safe for _, _, safe in units} == {None}
    again, other = (Mix(*kinds, [], length=12, seed=seed) for seed in (1, 2))
    assert units == [again[i] for i in range(12)] != [other[i] for i in range(12)]


def test_a_row_that_says_its_use_is_taken_for_that_only(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    rows = [{"prompt": "p", "answer": f"a{i}", "use": use} for i, use in enumerate(["unsafe", "general", "left_out"])]
    path.write_text(
        "\n".join(map(json.dumps, [*rows, {"prompt": "p", "answer": "plain"}, {"prompt": "p", "answer": " "}]))
    )
    found, paths = training_records(TrainOptions(unsafe=[path], general=[path], recipe="paper"), None)
    assert [row.answer for row in found["unsafe"]] == ["a0", "plain"]
    assert [row.answer for row in found["general"]] == ["a1", "plain"]
    assert found["safe"] == []
    assert paths == [path]


def test_records_that_lack_a_kind_say_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no unsafe answers: run `safecli collect` first, or give --unsafe FILE"):
        training_records(TrainOptions(run=tmp_path), None)


@pytest.fixture(scope="module")
def tiny(demo: LanguageModel) -> LanguageModel:
    """A small untrained model with the demo's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(demo.tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return replace(demo, model=LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def cost(tiny: LanguageModel) -> DenseCost:
    features = torch.tensor(np.random.default_rng(0).normal(size=(tiny.head.shape[0], 8)), dtype=torch.float32)
    return DenseCost(functional.normalize(features, dim=-1))


def _training(tiny: LanguageModel, cost: DenseCost, folder: Path, **chosen: Any) -> TaSftTrainer:
    """The trainer as `safecli train` sets it up, on a fresh LoRA adapter that isn't zero."""
    options = with_recipe(TrainOptions(**{"steps": 1, "lora_rank": 2, **chosen}))
    made = examples(RESPONSES, tiny, options)
    kinds = {"general": made, "unsafe": made[::-1], "safe": made[1:3]}
    torch.manual_seed(1)
    copied = LlamaForCausalLM(tiny.model.config)
    copied.load_state_dict(tiny.model.state_dict())
    model = replace(tiny, model=_with_lora(copied, options))
    for name, parameter in model.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return _trainer(model, cost, kinds, first_tokens(options.tokens or "all"), options, folder)


def _gradients(trainer: TaSftTrainer, parts: int) -> dict[str, Tensor]:
    """The gradient of the first four units of the mix, in as many micro-batches as asked for."""
    units = [trainer.train_dataset[i] for i in range(4)]
    trainer.current_gradient_accumulation_steps = parts
    size = len(units) // parts
    for start in range(0, len(units), size):
        trainer.training_step(trainer.model, trainer.data_collator(units[start : start + size]))
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chosen", [{}, {"recipe": "paper"}, {"target": "window", "tokens": "all"}, {"target": "bag"}])
@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_give_the_gradient_of_the_whole_batch(
    tiny: LanguageModel, cost: DenseCost, tmp_path: Path, chosen: dict[str, Any], parts: int
) -> None:
    whole = _gradients(_training(tiny, cost, tmp_path, batch_size=4, **chosen), 1)
    several = _gradients(_training(tiny, cost, tmp_path, batch_size=4 // parts, accumulate=parts, **chosen), parts)
    assert len(whole) > 10
    assert sum(float(gradient.norm()) for gradient in whole.values()) > 0.1
    torch.testing.assert_close(several, whole, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("general_loss", ["kl", "sft"])
def test_the_loss_is_the_formula_on_every_example_by_itself(
    tiny: LanguageModel, cost: DenseCost, tmp_path: Path, general_loss: str
) -> None:
    trainer = _training(tiny, cost, tmp_path, batch_size=4, tokens="first:3", general_loss=general_loss)
    units = [trainer.train_dataset[i] for i in range(4)]
    found = trainer.compute_loss(trainer.model, trainer.data_collator(units))
    options, model = trainer.options, trainer.model.eval()

    def predicted(prompt: list[int], answer: list[int]) -> Tensor:
        logits = model(torch.tensor([prompt + answer])).logits[0]
        return logits[len(prompt) - 1 : -1].double().log_softmax(-1)

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * (p - q)).sum(-1).mean()

    expected = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for general, unsafe, safe in units:
            cut = unsafe.answer[:3]
            p, plain = predicted(unsafe.prompt, cut), predicted(general.prompt, general.answer)
            with model.disable_adapter():
                careful, base = predicted(unsafe.reference, cut), predicted(general.prompt, general.answer)
            moved = emd.exact_onehot(p.exp(), torch.arange(len(cut)), cost.rows(torch.tensor(cut)).double())
            learned = plain[torch.arange(len(general.answer)), general.answer]
            term = divergence(base, plain) if general_loss == "kl" else -learned.mean()
            expected += options.general_weight * term
            expected += divergence(p, careful) - options.strength * moved.mean()
            own = predicted(safe.prompt, safe.answer)
            expected -= options.safe_weight * own[torch.arange(len(safe.answer)), safe.answer].mean()
    torch.testing.assert_close(found.double().detach(), expected / 4, atol=1e-4, rtol=1e-4)


def _plain_losses(
    hidden: Tensor,
    head: Head,
    terms: dict[str, float],
    target: Target,
    cost: DenseCost | None = None,
    *_: Any,
    **given: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What `linear_losses` is for one-hot targets, as the formulas read, in float64 and with autograd."""
    reference = given.get("reference", _[-1] if _ else None)
    log_p, log_ref = ((h.double() @ head.weight.double().T).log_softmax(-1) for h in (hidden, reference.hidden))
    ids = target.ids[:, 0]
    values = {
        "cross_entropy": -log_p.gather(1, target.ids)[:, 0],
        "reverse_kl": (log_p.exp() * (log_p - log_ref)).sum(-1),
    }
    if cost is not None:
        values["emd"] = (log_p.exp() * cost.rows(ids).double()).sum(-1)
    values = {name: values[name] for name in terms}
    return sum((-w if name == "emd" else w) * values[name] for name, w in terms.items()), values


def test_training_follows_the_curve_of_the_reference(
    tiny: LanguageModel, cost: DenseCost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = []
    for name, losses in (("operator", train.linear_losses), ("reference", _plain_losses)):
        monkeypatch.setattr(train, "linear_losses", losses)
        trainer = _training(tiny, cost, tmp_path / name, steps=20, batch_size=2)
        trainer.train()
        curves.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(curves[0]) == 20
    assert max(curves[0]) - min(curves[0]) > 1
    torch.testing.assert_close(*map(torch.tensor, curves), atol=1e-4, rtol=1e-4)
