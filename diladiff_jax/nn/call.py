"""Calls of Flax modules as plain functions of their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn


def apply(module: nn.Module, params: Mapping[str, Any], *args: Any, **options: Any) -> Any:
    """`module.apply` with parameters as the only variables.

    The result is typed `Any`, since Flax's own type depends on the option `mutable`.
    """
    return module.apply({"params": params}, *args, **options)
