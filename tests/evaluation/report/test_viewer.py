"""The viewer of the decoding: its tokens, and the page in a real browser."""

import io

import matplotlib.image
import numpy as np
import pytest
from report_inputs import STEPS, make_samples

from diladiff_jax.data import TokenizerOptions, tokenizers
from diladiff_jax.evaluation.report import samples


@pytest.fixture(scope="module", params=["unigram", "wordpiece"])
def tokenizer(request, tmp_path_factory):
    if request.param == "unigram":
        options = TokenizerOptions(kind="unigram", vocab_size=300)
        return tokenizers.train(["the red kite won at the mill. "] * 50, options)
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text(
        "\n".join(
            [
                "[PAD]",
                "[UNK]",
                "[CLS]",
                "[SEP]",
                "[MASK]",
                "the",
                "red",
                "ki",
                "##te",
                "##s",
                ".",
                ",",
            ]
        )
    )
    return tokenizers.from_vocabulary(path, "wordpiece")


def test_tokens_are_written_as_in_the_text(tokenizer):
    """Joined they are the decoded text; end-of-text is None and starts a new text."""
    text = (
        "the red kites, the kite."
        if tokenizer.kind == "wordpiece"
        else "the red kite, naïve 🦊 at the mill. " * 3
    )
    ids = tokenizer.encode(text)
    row = np.concatenate(
        [ids, [tokenizer.eot_id], tokenizer.encode("the red"), [tokenizer.eot_id] * 2]
    )
    written = samples.written_tokens(tokenizer, row)
    assert (
        len(written) == len(row)
        and [w is None for w in written] == (row == tokenizer.eot_id).tolist()
    )
    first = "".join(w for w in written[: len(ids)]).replace("\ufffd", "")
    assert first == tokenizer.decode(ids) and "".join(written[len(ids) + 1 : -2]) == "the red"


@pytest.fixture
def opened(folder, browser):
    """The report opened in a browser with a mouse, and what its console and requests report."""
    page, reports = browser.new_page(), []
    page.on("console", lambda message: reports.append(message.text))
    page.on("pageerror", lambda error: reports.append(str(error)))
    page.on("requestfailed", lambda request: reports.append(request.url))
    page.goto((folder / "report.html").as_uri())
    yield page, reports
    page.close()


def expect(page, sample, step):
    """Checks that after a step the tokens of `unmasked_at` are shown and the new ones marked."""
    shown = page.eval_on_selector_all(
        "#viewer-tokens .token",
        """all => all.map(e => [
            e.textContent, e.classList.contains("masked"), e.classList.contains("new")])""",
    )
    for (text, masked, new), token, when in zip(
        shown, sample["tokens"], sample["unmasked_at"], strict=True
    ):
        assert masked == (when >= step) and new == (when == step - 1 and step > 0)
        written = "\u220e" if token is None else token.replace("\n", "\u21b5").strip(" ")
        assert text == ("" if masked else written)
    assert page.text_content("#viewer-status").startswith(f"Step {step} of {STEPS}")
    assert page.input_value("#viewer-step") == str(step)


def test_buttons_keys_and_lists_step_through_the_decoding(opened):
    """With real clicks and keys. Nothing is requested from a network or reported in the console."""
    page, reports = opened
    shown = make_samples()
    first, second = shown[1]["samples"]  # the best model, last in the list, is shown first
    expect(page, first, 0)
    assert page.is_disabled("#viewer-previous")
    for step in range(1, STEPS + 1):
        page.click("#viewer-next")
        expect(page, first, step)
    assert page.is_disabled("#viewer-next")
    assert "A valid document." in page.text_content("#viewer-status")
    page.click("#viewer-previous")
    expect(page, first, STEPS - 1)
    page.click("#viewer-first")
    expect(page, first, 0)
    page.click("#viewer-last")
    expect(page, first, STEPS)
    page.press("#viewer-tokens", "ArrowLeft")
    page.press("#viewer-tokens", "ArrowLeft")
    expect(page, first, STEPS - 2)
    page.press("#viewer-tokens", "ArrowRight")
    expect(page, first, STEPS - 1)
    page.press("#viewer-step", "ArrowLeft")  # the slider takes its own keys: one step, not two
    expect(page, first, STEPS - 2)
    page.select_option("#viewer-sample", label="2")
    expect(page, second, 0)  # a given token is shown before the first step
    page.select_option("#viewer-model", label="MDLM")
    page.click("#viewer-play")
    page.get_by_text("Not valid: breaks name.").wait_for()
    expect(page, shown[0]["samples"][1], STEPS)
    assert page.title() == "DiLaDiff on stories"
    assert reports == []


def test_the_page_follows_the_color_scheme(opened):
    """What is shown is light on a light page and dark on a dark one, and never blank."""
    page, _ = opened
    page.evaluate("document.getElementById('decoding').scrollIntoView({behavior: 'instant'})")
    shots = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        shot = matplotlib.image.imread(io.BytesIO(page.screenshot()), format="png")[..., :3]
        assert shot.shape[0] > 300 and shot.shape[1] > 300 and shot.std() > 0.05
        shots[scheme] = shot
    assert shots["light"].mean() > 0.8 and shots["dark"].mean() < 0.3


def test_the_page_does_not_scroll_sideways_on_a_phone(folder, browser):
    """Wide tables scroll by themselves."""
    phone = browser.new_page(
        viewport={"width": 375, "height": 700}, device_scale_factor=2, is_mobile=True
    )
    phone.goto((folder / "report.html").as_uri())
    assert phone.evaluate("document.documentElement.scrollWidth") <= 375
    phone.close()
