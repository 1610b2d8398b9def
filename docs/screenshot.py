"""Make every picture of the docs: train on scikit-learn's digits, write the pages, photograph them.

uv run --extra examples docs/screenshot.py

Takes a few minutes. The quickstart's page is made by the quickstart; the other three show a small network, one of 300
layers, and one that is broken on purpose: a frozen layer, one that starts at zero, and a side branch that diverges.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytorch_lightning as pl
import torch
from playwright.sync_api import Browser, sync_playwright
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_layer_rotation import LayerRotationMonitor, RotationHistory, layca_optimizers
from pl_layer_rotation.report.page import write_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.py"


class Classifier(pl.LightningModule):
    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)


class Small(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.conv3, self.fc1, self.fc2 = nn.Conv2d(32, 64, 3, padding=1), nn.Linear(64, 64), nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        maps = self.conv2(self.conv1(images.view(-1, 1, 8, 8)).relu()).relu()
        return self.fc1(self.conv3(nn.functional.max_pool2d(maps, 2)).relu().mean((2, 3))).relu()

    def forward(self, images: Tensor) -> Tensor:
        return self.fc2(self.features(images))

    def configure_optimizers(self):
        return layca_optimizers(self, lr=3**-4, base=torch.optim.AdamW, schedule="cosine")


class Deep(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 32)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(298))
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        signal = self.stem(images)
        for block in self.blocks:
            signal = signal + 0.1 * block(nn.functional.layer_norm(signal, (32,)).relu())
        return self.head(signal)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Broken(Small):
    def __init__(self) -> None:
        super().__init__()
        self.conv2.requires_grad_(False)
        self.side = nn.Linear(64, 1)
        nn.init.zeros_(self.fc2.weight)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        features = self.features(images)
        # Least squares at a rate above what they are stable at: the branch overflows, and nothing else depends on it.
        side = self.side(features.detach()).squeeze(1)
        return nn.functional.cross_entropy(self.fc2(features), labels) + (side - labels).square().mean()

    def configure_optimizers(self):
        side = list(self.side.parameters())
        others = [p for name, p in self.named_parameters() if not name.startswith("side")]
        return torch.optim.SGD([{"params": others, "momentum": 0.9}, {"params": side, "lr": 4.0}], lr=0.3)


def fit(module: type[pl.LightningModule], epochs: int) -> RotationHistory:
    pl.seed_everything(1, verbose=False)
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    loader = DataLoader(TensorDataset(images, torch.tensor(data.target)), batch_size=64, shuffle=True)
    monitor = LayerRotationMonitor(every_n_steps=5, report=False)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module(), loader)
    return monitor.history


def pages(folder: Path) -> Iterator[tuple[str, int]]:
    """Write each page; its name, and how many pixels of it to show."""
    subprocess.run([sys.executable, str(QUICKSTART), "--output", str(folder / "runs")], check=True)
    shutil.copy(folder / "runs" / "layer_rotation.html", folder / "quickstart.html")
    yield "quickstart", 900
    runs = {
        "page-small": ("Layca over AdamW, 5 layers", Small, 15, 2000),
        "page-300-layers": ("AdamW, 300 layers", Deep, 11, 1600),
        "page-broken": ("A broken network", Broken, 15, 1700),
    }
    for name, (title, module, epochs, height) in runs.items():
        write_page(folder / f"{name}.html", {title: fit(module, epochs)})
        yield name, height


def photograph(browser: Browser, page: Path, picture: Path, height: int) -> None:
    view = browser.new_page(viewport={"width": 1240, "height": height})
    view.goto(page.as_uri())
    view.wait_for_function("[...document.querySelectorAll('.plot')].every((plot) => plot._fullLayout)", timeout=120_000)
    view.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    view.screenshot(path=picture)
    view.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="The pictures of the docs.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of the pictures")
    parser.add_argument("--pages", type=Path, help="keep the pages in this folder")
    arguments = parser.parse_args()
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise SystemExit(f"needs one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        folder = (arguments.pages or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        for name, height in pages(folder):
            photograph(browser, folder / f"{name}.html", arguments.output / f"{name}.png", height)
        browser.close()


if __name__ == "__main__":
    main()
