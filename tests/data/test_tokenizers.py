import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diladiff_jax.data import tokenizers
from diladiff_jax.data.errors import DataError

REORDERING = {
    "LRE",
    "RLE",
    "LRO",
    "RLO",
    "PDF",
    "LRI",
    "RLI",
    "FSI",
    "PDI",
}  # Unicode's classes of characters that turn what follows around

TEXT = [
    "The small dog ran home. A cat sat on the mat!\n\n\tdef f(x):\n        return 1\n",
    "Once upon a time there was a fox.  The fox had two \N{FOX FACE} friends, né?",
] * 40
NASTY = [
    "",
    " ",
    "  a  b  ",
    "\n",
    "\n\na\n",
    "\t x\r\n",
    "▁",
    "▁▁a ▁ b▁",
    " ▁",
    "a▁",
    "▅",
    "\x00\x1f",
    "<unk><s></s>",
    "<0x41>",
    "<|endoftext|>",
    "[MASK] [PAD]",
    "👩‍👩‍👧‍👦 e\u0301 é \u202e",
    "\ufeffa",
    "\ufffd",
    "\u2028",
    "İßſ",
]


def byte_bpe_files(folder):
    """A byte-level vocabulary with a handful of merges."""
    from tokenizers import pre_tokenizers

    words = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["Ġt", "he", "Ġthe", "<|endoftext|>"]
    (folder / "my-vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "my-merges.txt").write_text("#version: 0.2\nĠ t\nh e\nĠt he\n")
    return folder / "my-vocab.json"


def wordpiece_file(folder):
    words = [
        "[PAD]",
        "[unused0]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "dog",
        "##s",
        "ran",
        "cafe",
        ".",
        ",",
    ]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder / "vocab.txt"


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabularies")
    made = {kind: tokenizers.train(TEXT, kind, 400) for kind in tokenizers.TRAINED}
    made["whole words"] = tokenizers.train(
        ["Mia ran home. The dog sat."] * 40, "unigram", 400, whole_words=6
    )  # none of its pieces is a space alone
    made["byte_bpe"] = tokenizers.from_vocabulary(byte_bpe_files(folder), "byte_bpe")
    made["wordpiece"] = tokenizers.from_vocabulary(
        wordpiece_file(folder), "wordpiece", lowercase=True
    )
    made["bpe"].save(folder / "bpe")
    made["sentencepiece"] = tokenizers.from_vocabulary(
        folder / "bpe" / "sentencepiece.model", "sentencepiece"
    )
    return made


@pytest.mark.parametrize("kind", ["unigram", "bpe", "byte_bpe", "whole words"])
def test_lossless(all_kinds, kind):
    tokenizer = all_kinds[kind]

    def survives(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert (
            ids.dtype == np.int32
            and tokenizer.sampleable[ids].all()
            and tokenizer.eot_id not in ids
        )

    for text in NASTY + TEXT[:2]:
        survives(text)
    settings(max_examples=300, deadline=None)(
        given(
            st.text(
                st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" ▁\n\t<>a")),
                max_size=30,
            )
        )(survives)
    )()
    for ids, text in zip(tokenizer.encode_batch(NASTY), NASTY):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


@pytest.mark.parametrize("kind", ["unigram", "bpe", "byte_bpe", "wordpiece", "sentencepiece"])
def test_whatever_text_encodes_to_can_be_sampled(all_kinds, kind):
    """Also what the vocabulary lacks: a token of probability zero in the data would make every bound infinite."""
    tokenizer = all_kinds[kind]
    for text in ("the fox \U0001f600 ran", "\u4e00\u4e8c", *NASTY):
        assert tokenizer.sampleable[tokenizer.encode(text)].all()


def test_ids_are_laid_out_as_documented(all_kinds):
    for kind, t in all_kinds.items():
        assert (
            t.kind == {"whole words": "unigram"}.get(kind, kind)
            and t.vocab_size % 128 == 0
            and t.sampleable.shape == (t.vocab_size,)
        )
        assert (
            len({t.pad_id, t.mask_id, t.eot_id}) == 3
            and max(t.pad_id, t.mask_id, t.eot_id) < t.vocab_size
        )
        assert t.sampleable[t.eot_id] and not t.sampleable[[t.pad_id, t.mask_id]].any()
        pieces = t.pieces(range(t.vocab_size))
        beyond = [i for i, p in enumerate(pieces) if p == "[UNUSED]"]
        assert not t.sampleable[beyond].any()
        assert beyond == [] or beyond == list(range(beyond[0], t.vocab_size))
        assert pieces[t.mask_id] == "[MASK]" and not t.sampleable.flags.writeable
        assert t.sampleable.sum() > 0


def test_published_vocabularies_keep_their_own_ids(all_kinds):
    bert = all_kinds["wordpiece"]
    assert (bert.pad_id, bert.mask_id, bert.eot_id, bert.vocab_size) == (0, 5, 4, 128)
    assert bert.pieces(np.flatnonzero(bert.sampleable)) == [
        "[UNK]",
        "[SEP]",
        "the",
        "dog",
        "##s",
        "ran",
        "cafe",
        ".",
        ",",
    ]
    assert bert.pieces(bert.encode("The DOGS ran, café.")) == [
        "the",
        "dog",
        "##s",
        "ran",
        ",",
        "cafe",
        ".",
    ]
    assert bert.decode(bert.encode("The dogs ran, cafe.")) == "the dogs ran, cafe."
    gpt2 = all_kinds["byte_bpe"]
    assert (gpt2.eot_id, gpt2.pad_id, gpt2.mask_id, gpt2.vocab_size) == (259, 260, 261, 384)
    assert gpt2.pieces(gpt2.encode("at the")) == ["a", "t", "Ġthe"]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_training_depends_on_the_documents_alone(kind):
    first, second = (tokenizers.train(iter(TEXT), kind, 350) for _ in range(2))
    assert first.file_hashes() == second.file_hashes()
    assert tokenizers.train(TEXT[:1] * 80, kind, 350).file_hashes() != first.file_hashes()
    capped = tokenizers.train(TEXT[:2] + ["zebra quartz " * 99] * 40, kind, 350, max_documents=2)
    assert capped.file_hashes() == tokenizers.train(TEXT[:2], kind, 350).file_hashes()


def test_a_closed_vocabulary_becomes_one_piece_a_word():
    words = [
        f"{a}{b}"
        for a in ("gar", "ble", "fro", "Pim")
        for b in ("den", "sky", "low", "kets", "ming")
    ]
    rng = np.random.default_rng(0)
    docs = [" ".join(rng.choice(words, 6)) + "." for _ in range(300)]
    tokenizer = tokenizers.train(docs, "bpe", 400)
    for doc in docs[:20]:
        assert [p.removeprefix("▁") for p in tokenizer.pieces(tokenizer.encode(doc))] == doc[
            :-1
        ].split() + ["."]


def test_masks_and_documents_are_rendered_and_read(all_kinds):
    text = "The small [MASK] ran [MASK]. A [MASK][MASK] home"
    for kind in ("unigram", "bpe", "byte_bpe"):
        t = all_kinds[kind]
        ids = t.encode_masked(text)
        assert (ids == t.mask_id).sum() == 4
        assert t.decode(ids) == "The small [MASK] ran [MASK]. A [MASK] [MASK] home"
        # A mask takes the place of a word with its space.
        word = t.encode(" small dog" if kind == "byte_bpe" else "small dog")
        filled = ids.tolist()
        at = filled.index(t.mask_id)
        before = t.encode("The small")
        np.testing.assert_array_equal(ids[:at], before)
        assert t.decode(filled[:at] + word[len(word) - 1 :].tolist())  # any word fits there
        ids = np.concatenate(
            [
                [t.eot_id],
                t.encode("a b"),
                [t.eot_id, t.pad_id, t.eot_id],
                t.encode(" c"),
                [t.eot_id, t.pad_id, t.vocab_size - 1],
            ]
        )
        assert t.documents(ids) == ["a b", " c"] and t.decode(ids) == "a b\n c"
    bert = all_kinds["wordpiece"]
    assert bert.decode(bert.encode_masked("the [MASK] ran.")) == "the [MASK] ran."
    assert bert.decode(bert.encode_masked("[MASK] ran [MASK]")) == "[MASK] ran [MASK]"
    assert bert.decode([]) == ""


def test_lowercase_applies_before_training_and_encoding():
    tokenizer = tokenizers.train(TEXT, "bpe", 350, lowercase=True)
    assert tokenizer.decode(tokenizer.encode("The FOX")) == "the fox"
    assert not any(
        c.isupper()
        for p in tokenizer.pieces(range(257, 340))
        for c in p
        if not p.startswith(("[", "<0"))
    )


def test_save_and_load(all_kinds, tmp_path):
    for kind, t in all_kinds.items():
        t.save(tmp_path / kind, {"from": "tests"})
        again = tokenizers.load(tmp_path / kind)
        assert tokenizers.source(tmp_path / kind) == {"from": "tests"}
        assert vars(again).keys() == vars(t).keys()
        for name in ("kind", "lowercase", "vocab_size", "pad_id", "mask_id", "eot_id"):
            assert getattr(again, name) == getattr(t, name)
        np.testing.assert_array_equal(again.sampleable, t.sampleable)
        np.testing.assert_array_equal(again.encode(TEXT[1]), t.encode(TEXT[1]))
        assert {p.suffix for p in (tmp_path / kind).iterdir()} <= {".json", ".txt", ".model"}
    assert not list(tmp_path.glob("*tmp*"))


def test_bad_input_is_refused_in_one_line(all_kinds, tmp_path):
    saved = tmp_path / "saved"
    all_kinds["bpe"].save(saved)
    damaged = tmp_path / "damaged"
    all_kinds["bpe"].save(damaged)
    (damaged / "sentencepiece.model").write_bytes(b"x")
    forged = tmp_path / "forged"
    all_kinds["bpe"].save(forged)
    record = json.loads((forged / "tokenizer.json").read_text())
    (forged / "tokenizer.json").write_text(json.dumps(record | {"mask_id": 1}))
    (tmp_path / "bad.txt").write_text("a\nb\n")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("")
    attempts = [
        lambda: all_kinds["bpe"].encode("a\ud800"),
        lambda: tokenizers.train(["a\udfff"], "bpe", 300),
        lambda: all_kinds["bpe"].decode([10**6]),
        lambda: all_kinds["bpe"].decode([-1]),
        lambda: all_kinds["bpe"].save(saved),
        lambda: tokenizers.load(tmp_path / "nowhere"),
        lambda: tokenizers.load(damaged),
        lambda: tokenizers.load(forged),
        lambda: tokenizers.train(TEXT, "wordpiece", 400),
        lambda: tokenizers.train(TEXT, "bpe", 100),
        lambda: tokenizers.train([], "bpe", 400),
        lambda: tokenizers.from_vocabulary(tmp_path / "bad.txt", "wordpiece"),
        lambda: tokenizers.from_vocabulary(tmp_path / "bad.txt", "byte_bpe"),
        lambda: tokenizers.from_vocabulary(tmp_path / "vocab.json", "byte_bpe"),
        lambda: tokenizers.from_vocabulary(tmp_path / "bad.txt", "sentencepiece"),
        lambda: tokenizers.from_vocabulary(tmp_path / "absent", "wordpiece"),
        lambda: tokenizers.from_vocabulary(tmp_path / "bad.txt", "bpe"),
    ]
    for number, attempt in enumerate(attempts):
        with pytest.raises(DataError) as error:
            attempt()
            pytest.fail(f"attempt {number} was accepted")
        assert "\n" not in str(error.value) and len(str(error.value)) > 10


@given(st.text(st.characters(codec=None)))
def test_printable_text_steers_no_terminal_and_loses_nothing(text):
    """Against Unicode's own categories: no control, surrogate or separator of lines is left, and all else stays as it was."""
    shown = tokenizers.printable(text)
    assert all(
        c in "\n\t"
        or (
            unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp")
            and unicodedata.bidirectional(c) not in REORDERING
        )
        for c in shown
    )
    assert shown == "".join(tokenizers.printable(c) for c in text)
    assert all(tokenizers.printable(c) in (c, ascii(c)[1:-1]) for c in text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("\u202etxt", "\\u202etxt"),
        ("a\r\nb\tc", "a\\r\nb\tc"),
        ("caf\xe9 \u65e5\xa0\u200d", "caf\xe9 \u65e5\xa0\u200d"),
    ],
)
def test_what_is_shown_of_a_text(text, shown):
    """Letters, spaces and joiners of any script stay."""
    assert tokenizers.printable(text) == shown
