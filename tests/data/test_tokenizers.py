"""Tokenizers: round trips, the layout of ids, training, files, and printable text."""

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diladiff_jax.data import DataError, TokenizerOptions, printable, tokenizers

# Unicode's classes of characters that change the direction of the following text.
REORDERING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}

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

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, "Ġt", "he", "Ġthe", "<|endoftext|>"]
    (folder / "my-vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "my-merges.txt").write_text("#version: 0.2\nĠ t\nh e\nĠt he\n")
    return folder / "my-vocab.json"


def wordpiece_file(folder):
    specials = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*specials, "the", "dog", "##s", "ran", "cafe", ".", ","]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder / "vocab.txt"


def train(documents, kind, vocab_size, limits=None, **more):
    options = TokenizerOptions(kind=kind, vocab_size=vocab_size, **more)
    return tokenizers.train(documents, options, **(limits or {}))


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabularies")
    made = {kind: train(TEXT, kind, 400) for kind in tokenizers.TRAINED}
    # None of the pieces of this one is a single space.
    made["whole words"] = train(["Mia ran home. The dog sat."] * 40, "unigram", 400, whole_words=6)
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
def test_decoding_undoes_encoding_for_any_text(all_kinds, kind):
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
    for ids, text in zip(tokenizer.encode_batch(NASTY), NASTY, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


@pytest.mark.parametrize("kind", ["unigram", "bpe", "byte_bpe", "wordpiece", "sentencepiece"])
def test_every_id_that_text_encodes_to_can_be_sampled(all_kinds, kind):
    """Also the ids of characters that the vocabulary lacks. A token of the data that has
    probability zero would make every likelihood bound infinite."""
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
        *("[UNK]", "[SEP]", "the", "dog", "##s", "ran", "cafe", ".", ","),
    ]
    pieces = bert.pieces(bert.encode("The DOGS ran, café."))
    assert pieces == ["the", "dog", "##s", "ran", ",", "cafe", "."]
    assert bert.decode(bert.encode("The dogs ran, cafe.")) == "the dogs ran, cafe."
    gpt2 = all_kinds["byte_bpe"]
    assert (gpt2.eot_id, gpt2.pad_id, gpt2.mask_id, gpt2.vocab_size) == (259, 260, 261, 384)
    assert gpt2.pieces(gpt2.encode("at the")) == ["a", "t", "Ġthe"]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_training_depends_on_the_documents_only(kind):
    first, second = (train(iter(TEXT), kind, 350) for _ in range(2))
    assert first.file_hashes() == second.file_hashes()
    assert train(TEXT[:1] * 80, kind, 350).file_hashes() != first.file_hashes()
    longer = TEXT[:2] + ["zebra quartz " * 99] * 40
    limited = train(longer, kind, 350, limits={"max_documents": 2})
    assert limited.file_hashes() == train(TEXT[:2], kind, 350).file_hashes()


def test_a_small_vocabulary_gets_one_piece_per_word():
    words = [
        f"{a}{b}"
        for a in ("gar", "ble", "fro", "Pim")
        for b in ("den", "sky", "low", "kets", "ming")
    ]
    rng = np.random.default_rng(0)
    docs = [" ".join(rng.choice(words, 6)) + "." for _ in range(300)]
    tokenizer = train(docs, "bpe", 400)
    for doc in docs[:20]:
        pieces = [piece.removeprefix("▁") for piece in tokenizer.pieces(tokenizer.encode(doc))]
        assert pieces == [*doc[:-1].split(), "."]


def test_masks_and_documents_are_decoded_and_encoded(all_kinds):
    text = "The small [MASK] ran [MASK]. A [MASK][MASK] home"
    for kind in ("unigram", "bpe", "byte_bpe"):
        t = all_kinds[kind]
        ids = t.encode_masked(text)
        assert (ids == t.mask_id).sum() == 4
        assert t.decode(ids) == "The small [MASK] ran [MASK]. A [MASK] [MASK] home"
        # A mask replaces a word and the space before it.
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


def test_raw_text_writes_each_run_of_ends_once(all_kinds):
    """Wherever it is in the row; the documents between are those of `documents`."""
    for tokenizer in all_kinds.values():
        a, b = (tokenizer.encode(text).tolist() for text in ("the cat", "a dog"))
        end, mark = [tokenizer.eot_id], "<|endoftext|>"
        one, two = tokenizer.documents([*a, *end, *b])
        assert tokenizer.raw_text([*a, *end, *b]) == f"{one}{mark}{two}"
        assert tokenizer.raw_text([*a, *end, *end, *b, *end, *end]) == f"{one}{mark}{two}{mark}"
        assert tokenizer.raw_text([*end, *a]) == f"{mark}{one}"
        assert tokenizer.raw_text(a) == one and tokenizer.raw_text([]) == ""


def test_lowercase_applies_before_training_and_encoding():
    tokenizer = train(TEXT, "bpe", 350, lowercase=True)
    assert tokenizer.decode(tokenizer.encode("The FOX")) == "the fox"
    assert not any(
        c.isupper()
        for p in tokenizer.pieces(range(257, 340))
        for c in p
        if not p.startswith(("[", "<0"))
    )


def test_a_saved_tokenizer_loads_unchanged(all_kinds, tmp_path):
    for kind, t in all_kinds.items():
        t.save(tmp_path / kind, {"from": "tests"})
        loaded = tokenizers.load(tmp_path / kind)
        assert tokenizers.source(tmp_path / kind) == {"from": "tests"}
        assert vars(loaded).keys() == vars(t).keys()
        for name in ("kind", "lowercase", "vocab_size", "pad_id", "mask_id", "eot_id"):
            assert getattr(loaded, name) == getattr(t, name)
        np.testing.assert_array_equal(loaded.sampleable, t.sampleable)
        np.testing.assert_array_equal(loaded.encode(TEXT[1]), t.encode(TEXT[1]))
        assert {p.suffix for p in (tmp_path / kind).iterdir()} <= {".json", ".txt", ".model"}
    assert not list(tmp_path.glob("*tmp*"))


def test_bad_input_is_rejected_in_one_line(all_kinds, tmp_path):
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
        lambda: train(["a\udfff"], "bpe", 300),
        lambda: all_kinds["bpe"].decode([10**6]),
        lambda: all_kinds["bpe"].decode([-1]),
        lambda: all_kinds["bpe"].save(saved),
        lambda: tokenizers.load(tmp_path / "nowhere"),
        lambda: tokenizers.load(damaged),
        lambda: tokenizers.load(forged),
        lambda: train(TEXT, "wordpiece", 400, file="vocab.txt"),
        lambda: train(TEXT, "bpe", 100),
        lambda: train([], "bpe", 400),
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
def test_printable_text_controls_no_terminal_and_loses_nothing(text):
    """By Unicode's own categories: controls, surrogates and line separators are escaped, and all
    other characters stay."""
    shown = printable(text)
    assert all(
        c in "\n\t"
        or (
            unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp")
            and unicodedata.bidirectional(c) not in REORDERING
        )
        for c in shown
    )
    assert shown == "".join(printable(c) for c in text)
    assert all(printable(c) in (c, ascii(c)[1:-1]) for c in text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("\u202etxt", "\\u202etxt"),
        ("a\r\nb\tc", "a\\r\nb\tc"),
        ("caf\xe9 \u65e5\xa0\u200d", "caf\xe9 \u65e5\xa0\u200d"),
    ],
)
def test_printable_text_keeps_letters_spaces_and_joiners_of_any_script(text, shown):
    assert printable(text) == shown
