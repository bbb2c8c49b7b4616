"""Every shape in which users bring prompts and answers, and files that were cut short."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safecli.errors import InputError, MissingError
from safecli.records import (
    MAX_LINE,
    SETS,
    Prompt,
    Response,
    append,
    prompts_fingerprint,
    read_jsonl,
    read_prompts,
    read_responses,
    shipped,
    truncate_to_whole,
    usable,
)

TWO = ["How do I bake bread?", "Was ist «Öl»? 油"]


def _write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_several_files_are_one_list_of_prompts(tmp_path: Path) -> None:
    files = [_write(tmp_path, "one.txt", TWO[0]), _write(tmp_path, "two.json", json.dumps([TWO[1]]))]
    found = read_prompts(files, "toxic")
    assert [(prompt.id, prompt.prompt) for prompt in found] == [("toxic-0001", TWO[0]), ("toxic-0002", TWO[1])]
    with pytest.raises(InputError, match=r"none\.txt holds no prompts"):
        read_prompts([*files, _write(tmp_path, "none.txt", "")], "toxic")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("instructions.json", json.dumps({"instructions": TWO})),
        ("strings.json", json.dumps(TWO)),
        ("alpaca.json", json.dumps([{"instruction": text, "input": "", "output": "So."} for text in TWO])),
        ("prompts.jsonl", "".join(json.dumps({"prompt": text}) + "\n" for text in TWO)),
        ("PROMPTS.JSONL", "".join(json.dumps({"prompt": text}) + "\n" for text in TWO)),
        ("prompts.ndjson", "".join(json.dumps({"text": text}) + "\n" for text in TWO)),
        ("blank.jsonl", "\n".join(["", json.dumps({"question": TWO[0]}), "   ", json.dumps({"text": TWO[1]})])),
        ("strings.jsonl", "\n".join(map(json.dumps, TWO))),
        ("xstest.csv", f'id,prompt,type,label,focus,note\n1,"{TWO[0]}",a,safe,,\n2,{TWO[1]},b,safe,x,y\n'),
        ("prompts.txt", "\n\n".join(TWO) + "\n"),
        ("prompts", "\n".join(TWO)),
    ],
)
@pytest.mark.parametrize("form", ["plain", "bom", "crlf"])
def test_prompts_are_read_from_every_shape(tmp_path: Path, name: str, content: str, form: str) -> None:
    raw = content.replace("\n", "\r\n").encode() if form == "crlf" else content.encode()
    found = read_prompts(_write(tmp_path, name, b"\xef\xbb\xbf" + raw if form == "bom" else raw), "toxic")
    assert [prompt.prompt for prompt in found] == TWO
    assert [prompt.id for prompt in found] == ["toxic-0001", "toxic-0002"]
    assert {prompt.kind for prompt in found} == {"toxic"}


def test_an_input_stands_under_its_instruction(tmp_path: Path) -> None:
    row = {"instruction": "Translate.", "input": "Guten Tag", "output": "Good day"}
    source = _write(tmp_path, "alpaca.json", json.dumps([row]))
    assert read_prompts(source, "harmless")[0].prompt == "Translate.\n\nGuten Tag"


def test_a_csv_cell_may_hold_lines_and_says_where_it_ends(tmp_path: Path) -> None:
    source = _write(tmp_path, "cells.csv", 'prompt,note\n"one\ntwo, three",x\nfour,y\n')
    found = read_prompts(source, "toxic")
    assert [(prompt.prompt, prompt.where) for prompt in found] == [
        ("one\ntwo, three", "cells.csv:3"),
        ("four", "cells.csv:4"),
    ]


def test_a_column_of_any_name_can_be_named(tmp_path: Path) -> None:
    source = _write(tmp_path, "odd.csv", "Frage,prompt\nWarum?,other\n")
    assert read_prompts(source, "toxic", "Frage")[0].prompt == "Warum?"


@pytest.mark.parametrize(
    ("name", "content", "column", "told"),
    [
        ("a.csv", "Frage,Antwort\nx,y\n", None, r"a\.csv:2: no column 'prompt' \(columns: Frage, Antwort\)"),
        ("a.csv", "prompt\nx\n", "Frage", r"no column 'Frage' \(columns: prompt\)"),
        ("a.csv", "prompt\nyes, this\n", None, r"a\.csv:2: more cells"),
        ("a.csv", "prompt\nx\0y\n", None, r"a\.csv:2: .*NUL"),
        ("a.csv", f"prompt\n{'x' * 200_000}\n", None, r"a\.csv:\d: not valid CSV"),
        ("a.json", '{"prompts": []}', None, "expected"),
        ("a.json", '["x",\n', None, r"a\.json:2: not valid JSON"),
        ("a.json", "[1]", None, r"record 1: expected an object with a prompt, got int"),
        ("a.json", '[{"prompt": 3}]', None, r"record 1: 'prompt' must be text, got int"),
        ("a.json", '["\\ud800"]', None, "lone surrogate"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', None, r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", '{"prompt": "a\\u0000b"}', None, r"a\.jsonl:1: .*NUL"),
        ("a.jsonl", json.dumps({"prompt": "x" * MAX_LINE}), None, r"a\.jsonl:1: the line has 1,048,\d+ characters"),
        ("a.txt", "fine\nna\0ul\n", None, r"a\.txt:2: .*NUL"),
        ("a.txt", b"caf\xe9", None, "byte 3 is not UTF-8"),
        ("a.txt", " \n\n", None, "no prompts"),
        ("a.json", "[]", None, "no prompts"),
        ("a.csv", "prompt\n", None, "no prompts"),
    ],
)
def test_a_fault_is_told_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, column: str | None, told: str
) -> None:
    with pytest.raises(InputError, match=told):
        read_prompts(_write(tmp_path, name, content), "toxic", column)


@pytest.mark.parametrize("source", ["nowhere.jsonl", "./nowhere"])
def test_a_file_that_is_not_there_is_bad_input(source: str) -> None:
    with pytest.raises(InputError, match=f"no file {source}"):
        read_prompts(source, "toxic")


def test_a_dataset_that_is_not_there_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(MissingError, match="surely-not-a-dataset:test"):
        read_prompts("owner/surely-not-a-dataset:test", "toxic")


def test_a_folder_is_not_a_file_of_prompts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read"):
        read_prompts(str(tmp_path), "toxic")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("alpaca.json", json.dumps([{"instruction": "Hi", "input": "", "output": "Ho"}])),
        ("safety.json", json.dumps([{"instruction": "Hi", "output": "Ho"}])),
        ("outcomes.jsonl", json.dumps({"prompt": "Hi", "kind": "toxic", "answer": "Ho", "source": "b", "label": "x"})),
        ("numbered.jsonl", json.dumps({"id": 7, "question": "Hi", "response": "Ho", "extra": [1]})),
        ("xstest.csv", "id,type,prompt,completion,agreement\nv2-1,homonyms,Hi,Ho,1\n"),
    ],
)
def test_answers_from_elsewhere_need_a_prompt_and_an_answer(tmp_path: Path, name: str, content: str) -> None:
    (found,) = read_responses(Path(_write(tmp_path, name, content)))
    assert (found.prompt, found.answer, found.use) == ("Hi", "Ho", None)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "Hi"}, "a.jsonl:1: no answer"),
        ({"answer": "Hi"}, "a.jsonl:1: no column 'prompt'"),
        ({"prompt": "Hi", "answer": None}, "a.jsonl:1: answer: .*string"),
        ({"prompt": "Hi", "answer": "Ho", "use": "train"}, "a.jsonl:1: use: .*'unsafe'"),
        ("Hi", "a.jsonl:1: expected an object"),
    ],
)
def test_a_response_that_lacks_something_says_what(tmp_path: Path, row: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        read_responses(Path(_write(tmp_path, "a.jsonl", json.dumps(row))))


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(st.lists(st.tuples(texts, texts), min_size=1))
def test_responses_come_back_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, pairs: list[Any]) -> None:
    path = tmp_path_factory.mktemp("records") / "responses.jsonl"
    rows = [Response(prompt=prompt, answer=answer, use="unsafe", score=0.25) for prompt, answer in pairs]
    append(path, rows[:1])
    append(path, rows[1:])
    assert read_responses(path) == rows
    assert len(list(read_jsonl(path))) == len(rows)


def test_empty_long_and_repeated_prompts_are_told_apart() -> None:
    rows = ["a", " ", "b", " a ", "c"]
    prompts = [Prompt(id=str(i), kind="toxic", prompt=text, where=f"f:{i}") for i, text in enumerate(rows, 1)]
    other = Prompt(id="6", kind="harmless", prompt="a", where="g:1")
    kept, faults = usable([*prompts, other], [1, 0, 99, 1, 8, 1], longest=8)
    assert [prompt.where for prompt in kept] == ["f:1", "f:5", "g:1"]
    assert faults == ["f:2: empty", "f:3: too long (99 tokens, the limit is 8)", "f:4: duplicate of f:1"]


@given(st.binary(max_size=60), st.lists(st.integers(1, 3), max_size=8))
def test_a_torn_file_is_cut_to_whole_batches(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, counts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("torn") / "r.jsonl"
    path.write_bytes(content)
    done = truncate_to_whole(path, counts)
    left = path.read_bytes()
    assert content.startswith(left)
    assert left.count(b"\n") == sum(counts[:done])
    assert left.endswith(b"\n") or not left
    assert done == len(counts) or content.count(b"\n") < sum(counts[: done + 1])


def test_a_file_that_is_not_there_holds_no_batches(tmp_path: Path) -> None:
    assert truncate_to_whole(tmp_path / "none.jsonl", [2, 2]) == 0


def test_shipped_prompts_are_of_one_split_each_and_never_twice() -> None:
    for kind in SETS:
        splits = {split: shipped(kind, split) for split in ("train", "dev", "test")}
        every = [prompt.prompt.casefold() for prompts in splits.values() for prompt in prompts]
        assert all(splits.values())
        assert len(set(every)) == len(every)


def test_the_fingerprint_of_prompts_is_of_their_texts_not_of_their_file() -> None:
    prompt = Prompt(id="1", kind="toxic", prompt="a", where="f:1")
    assert prompts_fingerprint([prompt]) == prompts_fingerprint([prompt.model_copy(update={"where": "g:9"})])
    assert prompts_fingerprint([prompt]) != prompts_fingerprint([prompt.model_copy(update={"prompt": "b"})])
