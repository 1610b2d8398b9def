"""The names under which loggers get the values of layers."""

import re
from collections.abc import Sequence

_KEY_LENGTH = 100  # characters of a layer's name in a logged key: some loggers make file names of them


def log_keys(layer_names: Sequence[str], quantity: str = "rotation") -> list[str]:
    """Names under which loggers get one quantity of each layer, such as ``layer_rotation/007_block_conv1``.

    The zero-padded depth keeps them unique and makes alphabetical order depth order; every character that a logger
    could trip over (W&B splits names at dots, a slash opens a section) becomes an underscore.

    Args:
        layer_names: names in depth order.
        quantity: what is logged.

    Example::

        >>> log_keys(["stem.conv", "fc"])
        ['layer_rotation/000_stem_conv', 'layer_rotation/001_fc']

    """
    digits = max(3, len(str(len(layer_names) - 1)))
    return [
        f"layer_{quantity}/{depth:0{digits}d}_{re.sub('[^0-9A-Za-z_]+', '_', name)[:_KEY_LENGTH]}"
        for depth, name in enumerate(layer_names)
    ]
