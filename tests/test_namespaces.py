"""Monitor and optimizer in both of Lightning's namespaces, whichever of them and of this package is imported first.

Each case is a process of its own: an import cannot be taken back.
"""

import subprocess
import sys

import pytest

FIT = """
import torch
{imports}
L = {namespace}

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
    def training_step(self, batch, index):
        return self.layer(batch).square().mean()
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=2)
    def configure_optimizers(self):
        return pl_layer_rotation.layca_optimizers(self, lr=0.05, schedule="cosine")

quiet = dict(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
quiet |= dict(enable_model_summary=False)

def with_trainer():
    trainer = L.Trainer(callbacks=[pl_layer_rotation.LayerRotationMonitor(every_n_steps=1, report=False)], **quiet)
    trainer.fit(Net())
    return trainer

def with_cli():
    monitor = "--trainer.callbacks"
    options = [f"{{monitor}}+=pl_layer_rotation.LayerRotationMonitor", f"{{monitor}}.every_n_steps=1"]
    args = ["fit", *options, f"{{monitor}}.report=false"]
    return L.cli.LightningCLI(Net, args=args, save_config_callback=None, trainer_defaults=quiet).trainer

callbacks = {fit}().callbacks
(monitor,) = [c for c in callbacks if isinstance(c, pl_layer_rotation.LayerRotationMonitor)]
print(monitor.history.steps, [round(v, 5) for v in monitor.history.values("angular_update")[:, 0].tolist()])
"""
# atan(0.05 · (1 + cos(π k / 4)) / 2) for k = 0 … 3
CURVE = "[1, 2, 3, 4] [0.04996, 0.04265, 0.02499, 0.00732]"


ORDERS = [
    ("pytorch_lightning", "pl_layer_rotation"),
    ("pl_layer_rotation", "pytorch_lightning"),
    ("lightning.pytorch", "pl_layer_rotation"),
    ("pl_layer_rotation", "lightning.pytorch"),
]


def run(modules: tuple[str, str], fit: str, *, monitor_at_once: bool) -> subprocess.CompletedProcess[str]:
    """A fit of four steps in a new process, which imports these modules first, and the monitor there or at its use."""
    (namespace,) = {*modules} - {"pl_layer_rotation"}
    imports = "\n".join(f"import {name}" for name in (*modules, f"{namespace}.cli"))
    if monitor_at_once:
        imports = imports.replace("import pl_layer_rotation", "from pl_layer_rotation import LayerRotationMonitor")
        imports += "\nimport pl_layer_rotation"
    code = FIT.format(imports=imports, namespace=namespace, fit=fit)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=110, check=False)


@pytest.mark.parametrize("modules", ORDERS, ids=" before ".join)
def test_a_trainer_takes_monitor_and_optimizer(modules: tuple[str, str]) -> None:
    done = run(modules, "with_trainer", monitor_at_once=True)
    assert done.stdout.splitlines()[-1:] == [CURVE], done.stderr


@pytest.mark.parametrize("modules", ORDERS, ids=" before ".join)
def test_a_cli_takes_monitor_and_optimizer(modules: tuple[str, str]) -> None:
    done = run(modules, "with_cli", monitor_at_once=False)
    assert done.stdout.splitlines()[-1:] == [CURVE], done.stderr


def test_the_cli_of_the_other_namespace_refuses_a_monitor_that_was_imported_before_it() -> None:
    done = run(ORDERS[3], "with_cli", monitor_at_once=True)
    assert done.returncode == 2
    assert "Import path does not correspond to a subclass of Callback" in done.stderr
