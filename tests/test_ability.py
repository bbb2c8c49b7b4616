"""General ability: the shipped questions, and what lm-evaluation-harness makes of a local task."""

import json
import sys
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from safecli.errors import InputError, MissingError
from safecli.models import LanguageModel
from safecli.stages.ability import right_answers
from safecli.stages.gates import parse_gate
from safecli.stages.summary import add_ability
from safecli.stats import mcnemar

TASK = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: own.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""


def test_the_shipped_questions_are_whole() -> None:
    text = files("safecli").joinpath("data", "ability", "basics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert len({row["question"] for row in rows}) == 100
    assert all(len(set(row["choices"])) == 4 for row in rows)
    assert max(Counter(row["answer"] for row in rows).values()) <= 30
    assert len({row["category"] for row in rows}) == 5


def test_right_answers_are_compared_with_the_base() -> None:
    models: dict[str, Any] = {"base": {}, "tuned": {"diff": {}}}
    add_ability(models, {"base": {"own": [True] * 8 + [False]}, "tuned": {"own": [True] * 2 + [False] * 7}})
    assert (models["base"]["ability"]["own"]["count"], models["tuned"]["ability"]["own"]["n"]) == (8, 9)
    assert models["tuned"]["diff"]["ability"]["own"]["p"] == mcnemar(6, 0)
    assert parse_gate("ability.own.diff < -0.5", tasks=["own"]).fails(models["tuned"])
    assert not parse_gate("ability.own < 0.2", tasks=["own"]).fails(models["tuned"])


def test_without_lm_eval_the_command_is_named(demo: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingError, match=r"pip install 'safecli\[ability\]'"):
        right_answers(demo, ["basics"], None, 0)


@pytest.mark.slow
def test_lm_eval_asks_local_tasks(demo: LanguageModel, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [
        {"question": "The sky on a clear day is", "choices": ["blue", "xqzv lrgh"], "answer": 0},
        {"question": "The sky on a clear day is", "choices": ["blue", "xqzv lrgh"], "answer": 1},
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "own.yaml").write_text(TASK, encoding="utf-8")
    found = right_answers(demo, [str(tmp_path / "own.yaml"), "basics"], 40, 0)
    assert found["own"] == [True, False]
    assert 0.25 < sum(found["basics"]) / len(found["basics"]) <= 1
    with pytest.raises(InputError, match="no such file"):
        right_answers(demo, [str(tmp_path / "none.yaml")], None, 0)
    (tmp_path / "code.yaml").write_text("process_docs: !function code.run\n", encoding="utf-8")
    with pytest.raises(InputError, match="!function"):
        right_answers(demo, [str(tmp_path / "code.yaml")], None, 0)
    with pytest.raises(InputError, match="--ability no_such_task"):
        right_answers(demo, ["no_such_task"], None, 0)
