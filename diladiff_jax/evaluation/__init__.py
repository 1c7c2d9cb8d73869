"""Evaluation: the sweep, its measures, the paper's analyses, the report, and judging any texts."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diladiff_jax.evaluation import analyses, measures, report
    from diladiff_jax.evaluation.analyses.run import analyse, analyse_rows
    from diladiff_jax.evaluation.figures import check_analyses
    from diladiff_jax.evaluation.judging import Judge, check_scores
    from diladiff_jax.evaluation.results import check_results
    from diladiff_jax.evaluation.schema import NotFiniteError
    from diladiff_jax.evaluation.sweep import evaluate

# Loaded when first used, because measures of text alone need neither networks nor matplotlib.
_MODULES = {
    "Judge": "judging",
    "NotFiniteError": "schema",
    "analyse": "analyses.run",
    "analyse_rows": "analyses.run",
    "check_analyses": "figures",
    "check_results": "results",
    "check_scores": "judging",
    "evaluate": "sweep",
}
_PACKAGES = ("analyses", "measures", "report")

__all__ = [
    "Judge",
    "NotFiniteError",
    "analyse",
    "analyse_rows",
    "analyses",
    "check_analyses",
    "check_results",
    "check_scores",
    "evaluate",
    "measures",
    "report",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
