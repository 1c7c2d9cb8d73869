"""A report, and a browser to look at it."""

import shutil

import pytest
from report_inputs import make_found, make_results, make_samples

from diladiff_jax.evaluation import report

_NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, driven by playwright; the test is skipped without either of them."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip("no Chromium found (on Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as evaluate.py writes it."""
    folder = tmp_path_factory.mktemp("report")
    results = make_results()
    found = make_found(results)
    report.write(results, folder)
    assert report.write_page(results, found, make_samples(), folder) == folder / "report.html"
    return folder
