"""The backend conforms, and reads word2vec's text format."""

from pathlib import Path

import pytest
import torch
from safecli_cost_vectors import VectorsCost, read_vectors

from safecli.errors import InputError
from safecli.testing import cost_conformance, vocabulary

VECTORS = Path(__file__).with_name("few.vec")

test_vectors = cost_conformance(VectorsCost, path=VECTORS)


def test_a_word_has_the_vector_of_the_file() -> None:
    built = VectorsCost(VectorsCost.Options(path=VECTORS)).build(vocabulary(), lambda _: None)
    for text in ("king", " king"):
        torch.testing.assert_close(built[vocabulary().texts.index(text)], torch.tensor([0.9, 0.1, 0.3]))
    assert not built[vocabulary().texts.index("the")].any()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("2 2\nking 1 2\nqueen 1\n", "line 3: 1 numbers where the lines before have 2"),
        ("king 1 x\n", "line 1: could not convert"),
        ("", "none of its words"),
    ],
)
def test_a_broken_file_names_its_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "broken.vec"
    path.write_text(text)
    with pytest.raises(InputError, match=told):
        VectorsCost(VectorsCost.Options(path=path)).build(vocabulary(), lambda _: None)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(InputError, match=r"nowhere\.vec can't be read"):
        read_vectors(Path("nowhere.vec"), {"king"})
