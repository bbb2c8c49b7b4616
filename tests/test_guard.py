"""The guard on the real model: an adapter that costs helpful answers is scaled down until they hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import Result

from safecli.config import ModelOptions
from safecli.models import attention_layers, load_model
from safecli.stages import Reporter, probe
from safecli.stages.answers import load_judge

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "GUARD_TOKENS", 12)


class Said(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_the_guard_scales_an_adapter_down_until_helpful_answers_hold() -> None:
    model = load_model(ModelOptions(model="demo"))
    judge = load_judge("outcome")
    report = Said()
    guard = probe.Guard(model, report)
    layers = attention_layers(model.model)
    torch.manual_seed(0)
    model.model = peft.get_peft_model(model.model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=layers))
    assert guard.hold(model, judge) == 1
    before = {name: torch.randn_like(weight) for name, weight in b_matrices(model.model)}
    model.model.load_state_dict(before, strict=False)
    scale = guard.hold(model, judge)
    assert scale < 1
    assert scale == pytest.approx(0.8 ** (len(report.lines) - 2))
    assert report.lines[-1].startswith(f"helpful on dev prompts, adapter at {scale:.2f}")
    for name, weight in b_matrices(model.model):
        torch.testing.assert_close(weight.data, before[name] * scale)


def b_matrices(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, weight) for name, weight in model.named_parameters() if "lora_B" in name]


def test_training_that_costs_helpful_answers_keeps_the_adapter_that_the_guard_weakened(
    run_cli: Callable[..., Result], tmp_path: Path, records: Path
) -> None:
    command = ("train", "--run", tmp_path, "--model", "demo", "--unsafe", records, "--general", records)
    wild = ("--batch-size", 1, "--steps", 6, "--lr", 3e-3, "--general-weight", 0, "--probe-every", 0)
    result = run_cli(*command, *wild, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert 0.2 < found["scale"] < 1
    assert "helpful on dev prompts" in result.stderr
    assert f"Scaled by {found['scale']:g}" in (Path(found["adapter"]) / "README.md").read_text()
