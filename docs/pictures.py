"""Make the curves of the docs: draw the recorded runs in `docs/results`, as every user's page draws them.

    uv run --extra examples docs/pictures.py            # from the committed histories; needs Chromium
    uv run --extra examples docs/pictures.py --train    # train the runs first, a few minutes

One network on scikit-learn's digits, trained four times: AdamW at a good learning rate, at a hundredth of it, with one
layer that the optimizer does not know, and Layca.
"""

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytorch_lightning as pl
import torch
from playwright.sync_api import Page, sync_playwright
from plotly.offline import get_plotlyjs

from pl_layer_rotation import LayerRotationMonitor, RotationHistory, layca_optimizers

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
sys.path.append(str(DOCS.parent / "examples"))

RUNS = ("healthy", "slow", "forgotten", "layca")
# Quantity, and the runs on the left and on the right.
PICTURES = {
    "rotation": ("healthy", "forgotten"),
    "angular_update": ("healthy", "layca"),
    "norm_ratio": ("healthy", "layca"),
    "straightness": ("healthy", "slow"),
}
# Short enough for a small picture.
AXES = {
    "rotation": "cosine distance",
    "angular_update": "radians a step",
    "norm_ratio": "norm / norm at the start",
    "straightness": "straightness",
}
WIDTH, HEIGHT = 560, 360
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def pictures() -> dict[str, tuple[str, str]]:
    """File name → quantity and run."""
    return {
        f"{quantity.replace('_', '-')}-{run}.svg": (quantity, run)
        for quantity, runs in PICTURES.items()
        for run in runs
    }


def train(run: str) -> RotationHistory:
    from quickstart import Digits, digits

    class Net(Digits):
        def configure_optimizers(self) -> Any:
            if run == "layca":
                return layca_optimizers(self, lr=3**-3, base="AdamW", schedule="cosine")
            if run == "forgotten":
                chosen = [p for name, p in self.named_parameters() if not name.startswith("conv2")]
            else:
                chosen = list(self.parameters())
            optimizer = torch.optim.AdamW(chosen, lr=3e-5 if run == "slow" else 3e-3)
            steps = int(self.trainer.estimated_stepping_batches)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    pl.seed_everything(1, verbose=False)
    monitor = LayerRotationMonitor(every_n_steps=5, report=False)
    trainer = pl.Trainer(
        max_epochs=20,
        accelerator="cpu",
        logger=False,
        callbacks=[monitor],
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Net(run), *digits())
    return monitor.history


def picture(history: RotationHistory, quantity: str) -> go.Figure:
    figure = history.figure(quantity)
    # Readable at the width of a phone too.
    figure.update_layout(width=WIDTH, height=HEIGHT, font_size=15, yaxis_title=AXES[quantity], paper_bgcolor="white")
    return figure.update_annotations(font_size=13)


def fingerprint(figure: go.Figure) -> str:
    """What a picture carries, so that a test can tell whether it shows the committed curves."""
    lines = [[list(line.x or ()), list(line.y or ())] for line in figure.data]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16]


def as_svg(view: Page, figure: go.Figure) -> str:
    draw = "async ([figure, size]) => await Plotly.toImage(figure, {format: 'svg', imageDataOnly: true, ...size})"
    svg = view.evaluate(draw, [figure.to_plotly_json(), {"width": WIDTH, "height": HEIGHT}])
    return f"{svg}\n<!-- curves: {fingerprint(figure)} -->\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="The curves of the docs.")
    parser.add_argument("--train", action="store_true", help="train the runs anew")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder of the pictures")
    arguments = parser.parse_args()
    if arguments.train:
        for run in RUNS:
            print(run)
            train(run).save(RESULTS / f"{run}.jsonl")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise SystemExit(f"needs one of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        view = browser.new_page()
        view.add_script_tag(content=get_plotlyjs())
        for name, (quantity, run) in pictures().items():
            figure = picture(RotationHistory.load(RESULTS / f"{run}.jsonl"), quantity)
            (arguments.output / name).write_text(as_svg(view, figure), encoding="utf-8")
        browser.close()


if __name__ == "__main__":
    main()
