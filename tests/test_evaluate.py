"""What an evaluation counts, how it compares with the base, and the gates over it."""

from typing import Any

import pytest

from safecli.errors import UsageError
from safecli.records import Response
from safecli.stages.evaluate import parse_gate, summarise
from safecli.stats import mcnemar, paired_difference, wilson


def _answers(outcomes: str) -> list[Response]:
    names = {"c": "complied", "p": "partial", "r": "refused", "h": "helpful", "d": "degenerate"}
    return [
        Response(
            id=f"p{n}", kind="harmless" if letter in "hH" else "toxic", prompt="?", answer="!", outcome=names[letter]
        )
        for n, letter in enumerate(outcomes)
    ]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    answers = {"base": _answers("cccpprdchh"), "tuned": _answers("crrprrdrhh")}
    return summarise(answers, {"base": 1.0, "tuned": 1.25})


def test_rates_and_sums_are_counted_by_hand(models: dict[str, Any]) -> None:
    low, high = wilson(6, 8)
    assert models["base"]["toxic"]["unsafe"] == {"count": 6, "n": 8, "rate": 0.75, "low": low, "high": high}
    assert models["tuned"]["toxic"]["complied"]["count"] == 1
    assert models["tuned"]["harmless"]["helpful"]["rate"] == 1
    assert "lookalike" not in models["base"]


def test_every_rate_of_a_model_has_its_paired_difference(models: dict[str, Any]) -> None:
    found = models["tuned"]["diff"]["toxic"]["unsafe"]
    by_hand = paired_difference(both=2, base_only=4, model_only=0, neither=2)
    assert (found["value"], found["low"], found["high"]) == (by_hand.value, by_hand.low, by_hand.high)
    assert (found["base_only"], found["model_only"], found["p"]) == (4, 0, mcnemar(4, 0))
    assert "diff" not in models["base"]
    assert models["tuned"]["diff"]["general_loss"] == 0.25


@pytest.mark.parametrize(
    ("expression", "value", "fails"),
    [
        ("toxic.unsafe > 0.2", 0.25, True),
        ("toxic.unsafe >= 0.26", 0.25, False),
        ("toxic.unsafe.count<=2", 2, True),
        ("toxic.unsafe.high > 0.9", wilson(2, 8)[1], False),
        ("toxic.unsafe.diff > -0.1", -0.5, False),
        ("toxic.unsafe.diff.p > 0.05", mcnemar(4, 0), True),
        ("harmless.helpful.diff.low < -0.9", paired_difference(2, 0, 0, 0).low, False),
        ("general_loss.diff > 0.1", 0.25, True),
    ],
)
def test_gates_read_any_number(models: dict[str, Any], expression: str, value: float, fails: bool) -> None:
    gate = parse_gate(expression)
    assert gate.value(models["tuned"]) == pytest.approx(value)
    assert gate.fails(models["tuned"]) is fails


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("toxic.unsafe", "write it as"),
        ("toxic.unsfe > 0.2", "did you mean 'toxic.unsafe'"),
        ("harmless.helpful.dif.low < 0", "did you mean 'harmless.helpful.diff.low'"),
        ("__import__('os').system('true') > 0", "write it as"),
        ("toxic.unsafe > 0.2 or 1 > 0", "write it as"),
    ],
)
def test_a_gate_that_is_none_says_how_one_looks(expression: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse_gate(expression)


def test_a_gate_on_a_set_that_was_not_evaluated_is_an_error(models: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"no lookalike\.helpful\.rate"):
        parse_gate("lookalike.helpful < 0.9").value(models["tuned"])
