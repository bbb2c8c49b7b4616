"""The cost backends on real tokens: laws of a cost, tokens without meaning, and the artefact in the cache."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from safecli.config import CostOptions
from safecli.costs import Cost, DenseCost, Neighbours, SparseCost, Vocabulary, anisotropy, hubness, unit
from safecli.costs.build import load_cost, read_cost, vocabulary_of
from safecli.costs.faiss import FaissCost
from safecli.costs.token import TokenCost
from safecli.errors import InputError, SafecliError, UsageError
from safecli.models import LanguageModel
from safecli.stages.cost import compared, token_id

V = 1500
BACKENDS = [
    ("token", []),
    ("token", ["transform=centred"]),
    ("token", ["transform=whitened", "remove=3"]),
    ("sentence", []),
    ("faiss", ["k=8"]),
    ("mix:token=0.7,sentence=0.3", []),
]


@pytest.fixture(scope="module")
def small(demo: LanguageModel) -> LanguageModel:
    """A one-layer model with the demo's tokenizer and the embeddings of its first tokens."""
    config = LlamaConfig(
        vocab_size=V, hidden_size=576, num_hidden_layers=1, intermediate_size=16, num_attention_heads=9
    )
    model = LlamaForCausalLM(config)
    model.get_input_embeddings().weight.data = demo.model.get_input_embeddings().weight.detach()[:V].clone()
    return replace(demo, model=model)


@pytest.fixture(scope="module")
def vocabulary(small: LanguageModel) -> Vocabulary:
    return vocabulary_of(small)


@pytest.fixture(scope="module", params=BACKENDS, ids=lambda backend: "-".join([backend[0], *backend[1]]))
def built(
    request: pytest.FixtureRequest, small: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Cost, Path]:
    name, options = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFECLI_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load_cost(CostOptions(cost=name, cost_opt=options), small)


def test_a_cost_is_symmetric_zero_on_the_diagonal_and_at_most_two(built: tuple[Cost, Path]) -> None:
    cost, _ = built
    matrix = cost.rows(torch.arange(V))
    assert cost.vocab == V
    torch.testing.assert_close(matrix, matrix.T, atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix.diagonal(), torch.zeros(V), atol=1e-6, rtol=0)
    assert matrix.min() >= -1e-6
    assert matrix.max() <= 2 + 1e-6
    assert matrix.std() > 0.01


def test_like_words_cost_less_than_the_mean_word(built: tuple[Cost, Path], vocabulary: Vocabulary) -> None:
    cost, _ = built
    he, his = (vocabulary.texts.index(text) for text in (" he", " his"))
    row = cost.rows(torch.tensor([he]))[0]
    assert row[his] < row[~vocabulary.meaningless].mean() - 0.1


def test_tokens_without_meaning_are_special_or_no_character(vocabulary: Vocabulary) -> None:
    tokenizer = vocabulary.tokenizer
    assert vocabulary.meaningless[tokenizer.all_special_ids].all()
    assert vocabulary.meaningless[tokenizer.convert_tokens_to_ids("<jupyter_code>")]
    assert [tokenizer.decode([i]) for i in (~vocabulary.meaningless).nonzero()[:, 0]] == [
        t for t in vocabulary.texts if t
    ]
    assert 0 < int(vocabulary.meaningless.sum()) < V // 4


def test_ids_beyond_the_tokenizer_have_no_meaning(vocabulary: Vocabulary) -> None:
    known = len(vocabulary.tokenizer)
    padded = replace(vocabulary, embeddings=torch.zeros(known + 5, 2))
    assert padded.meaningless[known:].tolist() == [True] * 5


def test_tokens_without_meaning_are_average_or_at_the_ceiling(built: tuple[Cost, Path], vocabulary: Vocabulary) -> None:
    cost, _ = built
    odd = vocabulary.meaningless.nonzero()[:, 0]
    if isinstance(cost, SparseCost):
        expected = torch.full((len(odd), V), cost.ceiling)
        expected[torch.arange(len(odd)), odd] = 0
        torch.testing.assert_close(cost.rows(odd), expected)
    else:
        mean = torch.nn.functional.normalize(cost.features[~vocabulary.meaningless].mean(0), dim=0)
        torch.testing.assert_close(cost.features[odd], mean.expand(len(odd), -1), atol=1e-6, rtol=0)


def test_faiss_finds_the_nearest_tokens_of_the_dense_cost(
    small: LanguageModel, vocabulary: Vocabulary, cache: Path
) -> None:
    dense, _ = load_cost(CostOptions(cost="token"), small)
    sparse, _ = load_cost(CostOptions(cost="faiss", cost_opt=["k=8"]), small)
    assert isinstance(sparse, SparseCost)
    meaningful = (~vocabulary.meaningless).nonzero()[:, 0]
    exact, near = (cost.rows(meaningful[100:200])[:, meaningful] for cost in (dense, sparse))
    nearest = exact.topk(6, largest=False).indices
    torch.testing.assert_close(near.gather(1, nearest), exact.gather(1, nearest).clamp(min=0), atol=1e-5, rtol=0)
    assert ((near - exact).abs() < 1e-5).logical_or(near == sparse.ceiling).all()


def test_a_graph_finds_nearly_all_neighbours_and_says_how_many(small: LanguageModel, cache: Path) -> None:
    (exact, _), (graph, folder) = (
        load_cost(CostOptions(cost=f"faiss:k=8,search={search}"), small) for search in ("exact", "hnsw")
    )
    found = json.loads((folder / "manifest.json").read_text())["result"]["recall"]
    assert 0.9 < found <= 1
    near = exact.rows(torch.arange(V)) < exact.ceiling
    also = graph.rows(torch.arange(V)) < graph.ceiling
    assert float((near & also).sum() / near.sum()) == pytest.approx(found, abs=0.05)


def test_a_poor_graph_has_a_poor_recall(small: LanguageModel, vocabulary: Vocabulary) -> None:
    options = FaissCost.Options(k=32, search="hnsw", links=4, effort=1)
    assert FaissCost(options).build(vocabulary, lambda _: None).measured["recall"] < 0.95


def test_a_cost_is_kept_as_safetensors_with_what_decided_it(built: tuple[Cost, Path]) -> None:
    _, folder = built
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "cost.safetensors", "manifest.json"]
    assert load_file(folder / "cost.safetensors")


def test_a_cost_is_built_once(small: LanguageModel, cache: Path) -> None:
    said: list[str] = []
    options = CostOptions(cost="faiss", cost_opt=["k=4"])
    first, folder = load_cost(options, small, said.append)
    assert any("building" in line for line in said)
    stamp = (folder / "cost.safetensors").stat().st_mtime_ns
    said.clear()
    second, again = load_cost(options, small, said.append)
    assert (again, said) == (folder, [])
    assert (again / "cost.safetensors").stat().st_mtime_ns == stamp
    torch.testing.assert_close(second.rows(torch.arange(50)), first.rows(torch.arange(50)))
    assert load_cost(CostOptions(cost="faiss", cost_opt=["k=5"]), small)[1] != folder


def test_a_cost_of_another_vocabulary_is_refused_with_both_fingerprints(
    small: LanguageModel, vocabulary: Vocabulary, cache: Path
) -> None:
    _, folder = load_cost(CostOptions(cost="faiss", cost_opt=["k=4"]), small)
    other = replace(vocabulary, embeddings=vocabulary.embeddings[:-1])
    with pytest.raises(InputError, match=r"another vocabulary \([0-9a-f]{16}\) than this model's \([0-9a-f]{16}\)"):
        read_cost(folder, other)


@pytest.mark.parametrize(
    ("chosen", "kind", "hint"),
    [
        ({"cost": "tokn"}, UsageError, "did you mean 'token'"),
        ({"cost_opt": ["transform"]}, UsageError, "key=value"),
        ({"cost_opt": ["transfrom=raw"]}, UsageError, "did you mean 'transform'"),
        ({"cost": "faiss", "cost_opt": ["k=0"]}, UsageError, "k: .*greater than or equal to 1"),
        ({"cost": "faiss", "cost_opt": ["k=many"]}, UsageError, "k: .*integer"),
    ],
)
def test_a_wrong_option_says_which_and_what_is_meant(
    small: LanguageModel, chosen: dict[str, Any], kind: type[SafecliError], hint: str, cache: Path
) -> None:
    with pytest.raises(kind, match=hint):
        load_cost(CostOptions(**chosen), small)
    assert not (cache / "costs").exists()


@given(st.integers(2, 9), st.integers(1, 6), st.integers(0, 10_000))
def test_neighbours_become_symmetric_with_the_smaller_cost(vocab: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    indices, costs, ceiling = rng.integers(-1, vocab, (vocab, k)), rng.uniform(0, 1.5, (vocab, k)), 1.2
    expected = np.full((vocab, vocab), ceiling)
    for i, j, cost in zip(np.repeat(np.arange(vocab), k), indices.ravel(), costs.ravel(), strict=True):
        if j >= 0:
            expected[i, j] = expected[j, i] = min(expected[i, j], cost)
    np.fill_diagonal(expected, 0)
    sparse = Neighbours(torch.tensor(indices), torch.tensor(costs), ceiling).symmetric()
    torch.testing.assert_close(sparse.rows(torch.arange(vocab)).double(), torch.tensor(expected), atol=1e-6, rtol=0)


def test_a_row_of_zeros_costs_nothing_to_itself() -> None:
    features = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0], [9.0, 9.0]])
    made = DenseCost(unit(features, torch.tensor([False, False, False, True])))
    torch.testing.assert_close(made.rows(torch.arange(4)).diagonal(), torch.zeros(4))


def test_a_token_is_named_by_a_text_that_is_one(demo: LanguageModel) -> None:
    assert demo.tokenizer.decode([token_id(demo, " gun")]) == " gun"
    with pytest.raises(UsageError, match=r"2 tokens of this model \('two', ' words'\): try it with a leading space"):
        token_id(demo, "two words")


def test_a_word_of_several_tokens_has_neighbours_too(run_cli: Callable[..., Result], cache: Path) -> None:
    found = {}
    for text in (" gun", " gunfighter", ""):
        found[text] = run_cli("cost", "show", "--model", "demo", "--token", text, "--json")
    one, several = (json.loads(found[text].stdout) for text in (" gun", " gunfighter"))
    assert one["tokens"] == [" gun"]
    assert one["nearest"][0] in ([" gun", 0], ["gun", 0])
    assert "".join(several["tokens"]) == " gunfighter"
    assert len(several["tokens"]) > 1
    assert {" gun", " fighter"} & {token for token, _ in several["nearest"]}
    assert found[""].exit_code == 2


def test_a_mixture_is_the_weighted_mean_of_its_costs(small: LanguageModel, vocabulary: Vocabulary, cache: Path) -> None:
    token, sentence, mixed = (
        load_cost(CostOptions(cost=name), small)[0] for name in ("token", "sentence", "mix:token=1.4,sentence=0.6")
    )
    known = (~vocabulary.meaningless).nonzero()[:, 0]
    expected = 0.7 * token.rows(known[:50]) + 0.3 * sentence.rows(known[:50])
    torch.testing.assert_close(mixed.rows(known[:50])[:, known], expected[:, known], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mix", "of: Field required"),
        ("mix:token=-1", "of.token: .*greater than 0"),
        ("mix:token", "of.token: .*valid number"),
        ("mix:tokn=1", "did you mean 'token'"),
        ("mix:faiss=1", "'faiss' gives neighbours"),
        ("token:sentence=1", "unknown key 'sentence'"),
        ("token:raw", "write it as key=value"),
    ],
)
def test_a_mixture_that_can_not_be_says_why(small: LanguageModel, name: str, hint: str, cache: Path) -> None:
    with pytest.raises(UsageError, match=hint):
        load_cost(CostOptions(cost=name), small)


def test_the_output_embeddings_are_those_of_the_head(vocabulary: Vocabulary) -> None:
    built = TokenCost(TokenCost.Options(embeddings="output")).build(vocabulary, print)
    assert torch.equal(built, vocabulary.output_embeddings)
    assert not torch.equal(built, vocabulary.embeddings)


def test_anisotropy_and_hubness_of_shapes_that_are_known() -> None:
    angle = torch.arange(360) * torch.pi / 180
    ring = torch.stack([angle.cos(), angle.sin()], dim=1)
    assert anisotropy(torch.eye(30)) == pytest.approx(0, abs=1e-9)
    assert anisotropy(torch.ones(30, 1)) == pytest.approx(1)
    assert anisotropy(ring) == pytest.approx(-1 / 359, abs=1e-6)
    assert abs(hubness(ring, k=4)) < 0.5
    star = torch.nn.functional.normalize(torch.cat([torch.eye(40), torch.ones(1, 40)]), dim=1)  # one near to all
    assert hubness(star, k=1) > 5


def test_whitened_embeddings_share_no_direction(small: LanguageModel, vocabulary: Vocabulary, cache: Path) -> None:
    shared = {}
    for transform in ("raw", "centred", "whitened"):
        cost, _ = load_cost(CostOptions(cost="token", cost_opt=[f"transform={transform}"]), small)
        assert isinstance(cost, DenseCost)
        shared[transform] = anisotropy(cost.features[~vocabulary.meaningless])
    assert shared["raw"] > 0.05
    assert abs(shared["centred"]) < shared["raw"] / 5
    assert abs(shared["whitened"]) < shared["raw"] / 5


def test_options_may_stand_behind_the_name(small: LanguageModel, cache: Path) -> None:
    _, behind = load_cost(CostOptions(cost="token:transform=whitened,remove=3"), small)
    _, before = load_cost(CostOptions(cost="token", cost_opt=["transform=whitened", "remove=3"]), small)
    assert behind == before
    assert behind.name.startswith("token-")


def test_two_costs_are_compared(small: LanguageModel, cache: Path) -> None:
    same = compared(small, *(load_cost(CostOptions(cost="token"), small)[0] for _ in range(2)), count=3)
    assert (same.rank_correlation, same.overlap) == (pytest.approx(1), 1)
    token, sentence, near = (
        load_cost(CostOptions(cost=name), small)[0] for name in ("token", "sentence", "faiss:k=32")
    )
    apart, sparse = compared(small, token, sentence, count=3), compared(small, token, near, count=3)
    assert 0 < apart.overlap < 0.7
    assert -0.2 < apart.rank_correlation < 0.9
    assert sparse.overlap > 0.95
    assert len(apart.differing) == 3
    assert apart.differing[0].overlap <= apart.differing[-1].overlap < apart.overlap
    assert len(apart.differing[0].first) == len(apart.differing[0].second) == 10


def test_the_comparison_is_a_command(run_cli: Callable[..., Result], cache: Path) -> None:
    result = run_cli("cost", "compare", "token", "token:transform=centred", "--model", "demo", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert 0.3 < found["overlap"] < 1
    assert found["differing"]


def test_a_cost_is_held_against_people(run_cli: Callable[..., Result], cache: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.tsv"
    rated = ["cat\tdog\t8", "king\tqueen\t9", "car\ttrain\t6", "cat\tmoney\t1", "king\tsoup\t1", "car\tlove\t0.5"]
    pairs.write_text("word\tother\tscore\n# comment\n" + "\n".join([*rated, "onomatopoeia\tcat\t3"]) + "\n")
    result = run_cli(
        "cost", "quality", "--cost", "token:transform=whitened", "--model", "demo", "--pairs", pairs, "--json"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["pairs"], found["used"]) == (7, 6)
    assert found["spearman"] > 0.6
    assert 0 < found["contrasts"]["hot cold"] < found["mean_cost"]


@pytest.mark.parametrize(
    ("text", "told"),
    [("cat\tdog\t8\ncat dog\n", "line 2: write two words and a number"), ("cat\tdog\t8\n", "1 pairs are of words")],
)
def test_word_pairs_that_can_not_be_used_say_why(
    run_cli: Callable[..., Result], cache: Path, tmp_path: Path, text: str, told: str
) -> None:
    (tmp_path / "pairs.tsv").write_text(text)
    result = run_cli("cost", "quality", "--model", "demo", "--pairs", tmp_path / "pairs.tsv")
    assert result.exit_code == 3
    assert told in result.stderr
