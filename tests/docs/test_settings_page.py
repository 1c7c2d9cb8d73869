"""docs/settings.md is the page that the options classes generate."""

import importlib.util

from docs.pages import ROOT


def test_the_page_of_settings_is_up_to_date():
    spec = importlib.util.spec_from_file_location(
        "settings_page", ROOT / "tools" / "settings_page.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs" / "settings.md").read_text()
    assert written == module.page(), "run `python tools/settings_page.py` to update the page"
