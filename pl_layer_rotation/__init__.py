"""See, control and understand layer rotation (arXiv 1806.01603) in PyTorch Lightning.

Which module answers which question:

- which tensors are layers? ``layer_selection``
- how far has a layer turned? ``metric``
- how does it look over a training? ``monitor`` (the callback), ``history`` (the curves), ``report`` (page, W&B)
- how do I set how far it turns? ``layca`` (the optimizer), ``configure`` (what ``configure_optimizers`` returns)
"""

from pl_layer_rotation.configure import layca_optimizers
from pl_layer_rotation.history import RotationHistory
from pl_layer_rotation.layca import Layca
from pl_layer_rotation.layer_selection import select_layers
from pl_layer_rotation.learning_rate import rotation_lr
from pl_layer_rotation.metric import LayerRotation, layer_rotation
from pl_layer_rotation.monitor import LayerRotationMonitor
from pl_layer_rotation.param_groups import layca_param_groups

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
