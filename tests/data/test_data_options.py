"""The settings of the blocks `data` and `tokenizer`."""

import dataclasses

import pytest

from diladiff_jax.config import default_config
from diladiff_jax.data import DataOptions, TokenizerOptions, corpora
from diladiff_jax.options import OptionError


def test_the_options_of_the_default_config_are_the_defaults():
    config = default_config()
    assert DataOptions.of(config.data) == DataOptions()
    assert TokenizerOptions.of(config.tokenizer) == TokenizerOptions()


def test_the_options_are_all_settings_of_their_config_blocks():
    config = default_config()
    for block, options in ((config.data, DataOptions), (config.tokenizer, TokenizerOptions)):
        assert {field.name for field in dataclasses.fields(options)} == set(block)


@pytest.mark.parametrize(
    "settings",
    [
        dict(validation_fraction=0.0, validation_files="held.txt"),
        dict(validation_fraction=0.0, validation_last=3),
        dict(validation_fraction=0.9, validation_last=3, scorer_fraction=0.2),
        dict(corpus="stories", validation_fraction=0.0),
        dict(corpus="text_files", files="texts"),
    ],
)
def test_a_validation_fraction_of_zero_is_valid_if_other_settings_hold_documents_out(settings):
    corpora.check(DataOptions(**settings))


@pytest.mark.parametrize(
    "settings, name",
    [
        (dict(corpus=""), "corpus"),
        (dict(corpus="text_files"), "files"),
        (dict(length=1), "length"),
        (dict(length=2**17 + 1), "length"),
        (dict(packing="loose"), "packing"),
        (dict(documents=0), "documents"),
        (dict(corpus="stories", validation_documents=0), "validation_documents"),
        (dict(scorer_documents=-1), "scorer_documents"),
        (dict(max_documents=-1), "max_documents"),
        (dict(validation_last=-1), "validation_last"),
        (dict(validation_last=5, validation_files="held.txt"), "validation_last"),
        (dict(validation_fraction=0.0), "validation_fraction"),
        (dict(validation_fraction=1.0), "validation_fraction"),
        (dict(validation_fraction=0.6, scorer_fraction=0.4), "scorer_fraction"),
    ],
)
def test_invalid_data_settings_are_rejected_by_name(settings, name):
    with pytest.raises(OptionError, match=f"^{name}: got .*, expected ") as error:
        corpora.check(DataOptions(**settings))
    assert error.value.name == name


@pytest.mark.parametrize(
    "settings, name",
    [
        (dict(kind="words"), "kind"),
        (dict(kind="wordpiece"), "file"),
        (dict(vocab_size=0), "vocab_size"),
        (dict(vocab_size=2**20 + 1), "vocab_size"),
        (dict(whole_words=-1), "whole_words"),
    ],
)
def test_invalid_tokenizer_settings_are_rejected_by_name(settings, name):
    with pytest.raises(OptionError, match=f"^{name}: got ") as error:
        TokenizerOptions(**settings)
    assert error.value.name == name


def test_a_corpus_names_the_setting_that_holds_out_text_for_the_scorer():
    assert corpora.corpus_of("stories").scorer_setting == "scorer_documents"
    assert corpora.corpus_of("pydocs").scorer_setting == "scorer_fraction"
