"""The experiment of a workdir as a config file, so that `--config.KEY=VALUE` works where no --config is given."""

from ml_collections import ConfigDict


def get_config(workdir: str) -> ConfigDict:
    from diladiff_jax.storage import config_file

    return config_file.load(workdir)
