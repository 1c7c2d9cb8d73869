"""Writes docs/settings.md, the reference of every setting, from the options dataclasses.

    python tools/settings_page.py

A test fails if the page is out of date.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "settings.md"
sys.path.insert(0, str(ROOT))

INTRODUCTION = """\
# Settings

```bash
python launch/train.py --config=configs/tiny.py --workdir=W --stage=mdlm --config.mdlm.batch=64
```

Every setting of an experiment, with its default and its valid values. The defaults are the paper's
published setting. An experiment file in `configs/` changes what differs, and
`--config.BLOCK.SETTING=VALUE` on a command line overrides both. A workdir keeps its settings in
`config.json`. `tools/settings_page.py` generates this page from the options dataclasses.
"""


def page() -> str:
    """The text of the page."""
    return "\n".join([INTRODUCTION, *_sections()])


def _sections() -> Iterator[str]:
    from diladiff_jax import config, stages
    from diladiff_jax.sampling import ORDERS

    for name, parts in config.blocks().items():
        yield f"## {f'`{name}`' if name else 'Top level'}\n"
        if name in stages.STAGES:
            yield f"Stage {name}: {stages.STAGES[name].title}.\n"
        for part in parts:
            summary = (type(part).__doc__ or "").strip().splitlines()[0]
            fields = dataclasses.fields(part)
            if fields:
                yield f"{summary}\n"
                yield "| setting | default | valid | meaning |\n|---|---|---|---|"
                yield from (_row(field, getattr(part, field.name)) for field in fields)
                yield ""
        if name == "sampling":
            yield "| unmasking order | what it is |\n|---|---|"
            yield from (f"| `{order}` | {each.help} |" for order, each in ORDERS.items())
            yield ""


def _row(field: dataclasses.Field, default: object) -> str:
    rule = field.metadata["rule"]
    valid = rule.valid if rule is not None else ""
    shown = '""' if default == "" else str(default)
    cells = (f"`{field.name}`", f"`{shown}`", valid, field.metadata["help"])
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
