"""Perplexity under a GPT-2 from files, compared with NumPy, for any padding, batch and mesh."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from diladiff_jax.data import tokenizers
from diladiff_jax.evaluation.measures import samples, scorer
from diladiff_jax.nn import gpt2
from diladiff_jax.parallel import sharding
from diladiff_jax.storage import pretrained, scorers

TEXTS = ["the theory", "", "a", "the cat, the hat and the bat", "naïve 🦊", "the " * 40]
POSITIONS = 80


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny GPT-2 as published: config.json, model.safetensors, vocab.json and merges.txt."""
    from tokenizers import pre_tokenizers

    folder = tmp_path_factory.mktemp("gpt2")
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "he", "Ġthe", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nĠ t\nh e\nĠt he\n")
    config = dict(
        model_type="gpt2",
        vocab_size=len(words),
        n_positions=POSITIONS,
        n_embd=16,
        n_layer=1,
        n_head=2,
    )
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    shapes = {"wte.weight": (len(words), 16), "wpe.weight": (POSITIONS, 16)}
    for name, shape in {
        "attn.c_attn": (16, 48),
        "attn.c_proj": (16, 16),
        "mlp.c_fc": (16, 64),
        "mlp.c_proj": (64, 16),
    }.items():
        shapes |= {f"h.0.{name}.weight": shape, f"h.0.{name}.bias": shape[1:]}
    for name in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
        shapes |= {f"{name}.weight": (16,), f"{name}.bias": (16,)}
    safetensors.numpy.save_file(
        {n: rng.normal(size=s).astype(np.float32) / 2 for n, s in shapes.items()},
        folder / "model.safetensors",
    )
    return folder


def make(folder, batch=4, mesh=None):
    found = scorers.load_scorer(str(folder))
    params, rows, multiple = found.params, None, 1
    if mesh is not None:
        params = sharding.place(
            params, sharding.parameter_shardings(gpt2.abstract_parameters(found.network), mesh)
        )
        rows, multiple = sharding.batch_sharding(mesh), 4
    return (
        scorer.Scorer(found, params, batch=batch, multiple=multiple, batch_sharding=rows),
        found.network,
        params,
    )


def test_the_nll_matches_log_softmax_in_numpy(folder):
    """Text by text without padding, after an end-of-text, cut at the model's positions.

    Perplexity is exp of the total over the total; empty texts are left out and counted.
    """
    judge, network, params = make(folder)
    logits_of = jax.jit(network.apply)
    scored = judge.score(TEXTS)
    nll, counts = scored.nll, scored.counts
    np.testing.assert_array_equal(counts, [len(ids) for ids in judge.encode(TEXTS)])
    assert (
        counts[1] == 0 and counts[5] == 42 and len(judge.encode(["the" * 60])[0]) == POSITIONS
    )  # 2 ids each, 80 at most
    for text, total in zip(TEXTS, nll, strict=True):
        ids, expected = judge.encode([text])[0], 0.0
        if len(ids):
            logits = np.asarray(logits_of({"params": params}, jnp.asarray([[259, *ids[:-1]]])))[
                0
            ].astype(np.float64)
            log_p = logits - logits.max(axis=-1, keepdims=True)
            log_p -= np.log(np.exp(log_p).sum(axis=-1, keepdims=True))
            expected = -sum(log_p[i, ids[i]] for i in range(len(ids)))
        np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-4)
    measures = judge.measures(TEXTS)
    assert measures["gen_ppl"]["value"] == pytest.approx(np.exp(nll.sum() / counts.sum()), rel=1e-6)
    assert measures["gen_ppl"]["low"] <= measures["gen_ppl"]["value"] <= measures["gen_ppl"]["high"]
    assert measures["empty"]["value"] == pytest.approx(1 / 6)
    assert "gen_ppl" not in judge.measures(["", ""])


def test_counted_ids_are_those_of_mdlms_published_evaluation(folder):
    """Its formula, on rows of ids that begin with end-of-text: a token counts if it is not
    end-of-text, or before the second one; the first position never counts.
    """
    judge = make(folder)[0]
    for text in (
        "<|endoftext|>the<|endoftext|>a cat<|endoftext|>",
        "<|endoftext|>",
        "<|endoftext|>a",
    ):
        row, counted = judge.row(judge.encode([text])[0])
        np.testing.assert_array_equal(row, judge.encode([text])[0])
        first = (row == judge.end_id).cumsum() == 1
        theirs = first[1:] | (row != judge.end_id)[1:]
        np.testing.assert_array_equal(counted[1:], theirs)
        assert not counted[0]


def test_a_text_that_begins_within_a_document_is_scored_after_end_of_text(folder):
    """Its first id counts, and so does its first end-of-text, but none after that."""
    judge = make(folder)[0]
    row, counted = judge.row(judge.encode(["a<|endoftext|>b<|endoftext|>c"])[0])
    assert [*row[[0, 2, 4]]] == [judge.end_id] * 3 and len(row) == 6
    assert counted.tolist() == [False, True, True, True, False, True]


@pytest.mark.parametrize("size", [1, 32, 33, 40, 41, 64, 65, 100, 129, 1000])
def test_rows_are_padded_by_at_most_a_quarter(size):
    padded = scorer.padded_length(size)
    assert size <= padded <= max(32, 1.25 * size) and padded % 8 == 0
    assert scorer.padded_length(padded) == padded


def test_features_are_the_mean_hidden_state_of_a_texts_own_ids_but_the_last(folder):
    judge, network, params = make(folder)
    ids = judge.encode([TEXTS[3]])[0]
    h = network.apply(
        {"params": params}, jnp.asarray([[judge.end_id, *ids[:-1]]]), method="hidden_states"
    )
    features = judge.score(TEXTS).features
    np.testing.assert_allclose(features[3], h[0, 1:].mean(axis=0), rtol=1e-4, atol=1e-5)
    assert not features[1].any() and not features[2].any()  # no id, and only one


def test_neither_padding_nor_batch_nor_mesh_changes_the_result(folder):
    """The mesh is 2 x 2 x 2, with sharded parameters."""
    alone = [make(folder, batch=1)[0].score([text]).nll[0] for text in TEXTS]
    np.testing.assert_allclose(
        make(folder, batch=6)[0].score([*TEXTS, "the" * 60]).nll[:6], alone, rtol=1e-5, atol=1e-4
    )
    judge, _, params = make(
        folder, batch=4, mesh=sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    )
    assert any(x.addressable_shards[0].data.size * 4 == x.size for x in jax.tree.leaves(params))
    np.testing.assert_allclose(judge.score(TEXTS).nll, alone, rtol=1e-4, atol=1e-4)


def test_tokenizer_json_gives_the_ids_of_vocabulary_and_merges(folder, tmp_path):
    """Truncation and padding in the file are ignored. A folder without a tokenizer is rejected."""
    engine = scorers.load_tokenizer(folder)
    engine.enable_truncation(3)
    engine.enable_padding()
    engine.save(str(tmp_path / "tokenizer.json"))
    again = scorers.load_tokenizer(tmp_path)
    assert [again.encode(t).ids for t in TEXTS] == [
        scorers.load_tokenizer(folder).encode(t).ids for t in TEXTS
    ]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(pretrained.PretrainedError, match="cannot be read"):
        scorers.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(
        pretrained.PretrainedError,
        match=r"no tokenizer, expected tokenizer\.json, or vocab\.json",
    ):
        scorers.load_tokenizer(tmp_path)


def test_a_published_scorer_replaces_the_trained_one(folder, monkeypatch):
    """It judges the text of the rows, and the setting names it."""
    judge, tokenizer = (
        make(folder)[0],
        tokenizers.from_vocabulary(folder / "vocab.json", "byte_bpe"),
    )
    rows = np.full((2, 12), tokenizer.eot_id, np.int32)
    for row, text in zip(rows, TEXTS, strict=False):
        row[: len(tokenizer.encode(text))] = tokenizer.encode(text)
    monkeypatch.setattr(scorer, "published_scorer", lambda model: judge)
    config = SimpleNamespace(
        evaluation=SimpleNamespace(scorer="gpt2"), data=SimpleNamespace(corpus="pydocs")
    )
    model = SimpleNamespace(tokenizer=tokenizer, config=config, has=lambda stage: True)
    measures = samples.sample_measures(model)(rows)
    assert (
        measures["gen_ppl"] == judge.measures([f"{t}<|endoftext|>" for t in TEXTS[:2]])["gen_ppl"]
        and measures["empty"]["value"] == 0.5
        and "entropy" in measures
    )
    assert samples.scorer_setting(model) == judge.origin | {"length": POSITIONS}


def test_a_published_scorer_is_loaded_once_per_model(folder):
    class Loaded:
        devices = 8
        experiment = SimpleNamespace(mesh=sharding.make_mesh({"data": 8, "fsdp": 1, "tensor": 1}))
        config = SimpleNamespace(
            evaluation=SimpleNamespace(scorer=str(folder)), sampling=SimpleNamespace(batch=3)
        )

    model = Loaded()
    judge = scorer.published_scorer(model)
    assert judge.length == POSITIONS and scorer.published_scorer(model) is judge
    assert scorer.published_scorer(Loaded()) is not judge
    model.config = SimpleNamespace(evaluation=SimpleNamespace(scorer=""))
    assert scorer.published_scorer(model) is None
