"""See, control and understand layer rotation (arXiv 1806.01603) in PyTorch Lightning.

Which module answers which question:

- which tensors are layers? ``layer_selection``
- how far has a layer turned? ``metric``
- how does it look over a training? ``monitor`` (the callback), ``history`` (the curves), ``report`` (page, W&B)
- how do I set how far it turns? ``layca`` (the optimizer), ``configure`` (what ``configure_optimizers`` returns)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Layca",
    "LayerRotation",
    "LayerRotationMonitor",
    "RotationHistory",
    "layca_optimizers",
    "layca_param_groups",
    "layer_rotation",
    "rotation_lr",
    "select_layers",
]

if TYPE_CHECKING:
    from pl_layer_rotation.configure import layca_optimizers
    from pl_layer_rotation.history import RotationHistory
    from pl_layer_rotation.layca import Layca
    from pl_layer_rotation.layer_selection import select_layers
    from pl_layer_rotation.learning_rate import rotation_lr
    from pl_layer_rotation.metric import LayerRotation, layer_rotation
    from pl_layer_rotation.monitor import LayerRotationMonitor
    from pl_layer_rotation.param_groups import layca_param_groups
else:  # Type checkers would take any name for one of ours.
    # Torch and Lightning take seconds to import, for which the help of the command line need not wait.
    _HOMES = {
        "Layca": "layca",
        "LayerRotation": "metric",
        "LayerRotationMonitor": "monitor",
        "RotationHistory": "history",
        "layca_optimizers": "configure",
        "layca_param_groups": "param_groups",
        "layer_rotation": "metric",
        "rotation_lr": "learning_rate",
        "select_layers": "layer_selection",
    }

    def __getattr__(name: str) -> Any:
        """Import a public name at its first use."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
