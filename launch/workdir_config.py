"""The experiment of a workdir as a config file.

`cli` loads it when no --config is given, so that `--config.KEY=VALUE` works there too.
"""

from ml_collections import ConfigDict


def get_config(workdir: str) -> ConfigDict:
    """Returns the config of a workdir or bundle."""
    from diladiff_jax.storage import config_file

    return config_file.load(workdir)
