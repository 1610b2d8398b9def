"""What becomes of a reading outside of the history: scalars for loggers, aggregates for callbacks, the report."""

import math
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from pl_layer_rotation._lightning import final_facts, log_folder, wandb_loggers
from pl_layer_rotation._log_keys import log_keys
from pl_layer_rotation.history import RotationHistory

Reading = dict[str, list[float]]

_STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {"mean": torch.mean, "min": torch.min, "max": torch.max}
# Layers above which loggers get the aggregates only: W&B advises fewer than 10,000 distinct metrics in a project.
_MOST_LOGGED_LAYERS = 1000
_FILE, _PAGE = "layer_rotation.jsonl", "layer_rotation.html"
_PAGE_SHARE = 0.01  # of the training's time that renewing the page may take
_FIRST_PAGE = 60.0  # seconds of training before it: making the first takes a second


class Attempts:
    """Does what must not end a training; a failure is a warning, once for each kind."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def __call__(self, what: str, action: Callable[..., Any], *args: Any) -> None:
        """Do it, or say that it failed."""
        try:
            action(*args)
        except Exception as error:
            self.warn(f"{what} failed and is left out: {type(error).__name__}: {error}", once_for=what)

    def warn(self, message: str, once_for: str | None = None) -> None:
        """Warn on the first process, once for each message or kind."""
        if (once_for or message) not in self._warned:
            self._warned.add(once_for or message)
            rank_zero_warn(f"LayerRotationMonitor: {message}.", category=UserWarning)


class Output:
    """Where readings go.

    Args:
        log_quantities: quantities of each layer that loggers get.
        report: whether there is a table and a page at the end; ``"wandb"`` sends the page to W&B too.
        attempt: what guards the training.

    """

    def __init__(self, log_quantities: Sequence[str], report: bool | str, attempt: Attempts) -> None:
        self.log_quantities = tuple(log_quantities)
        self.report = report
        self.attempt = attempt
        self._saved: tuple[Path, int, list[str]] | None = None  # file, thinning and layers of what it holds
        self._saved_step = -1
        self._next_page = 0.0  # time before which the page is not renewed
        self._last = 0  # step of the last reading

    def prepare(self, trainer: "pl.Trainer", history: RotationHistory) -> None:
        """Start a file of its own for this fit, and tell W&B which metrics will come."""
        self._saved, self._next_page = None, time.monotonic() + _FIRST_PAGE
        self._last = history.steps[-1] if len(history) else 0
        self.attempt("the preparation of W&B", self._prepare_wandb, trainer, history)

    def log(self, trainer: "pl.Trainer", history: RotationHistory, step: int, reading: Reading, diverged: bool) -> None:
        """Send a reading to the loggers and its aggregates to ``callback_metrics``."""
        metrics = self.publish(trainer, reading, diverged)
        if len(history.layer_names) <= _MOST_LOGGED_LAYERS:
            for quantity in self.log_quantities:
                keys = _keys(tuple(history.layer_names), quantity)
                values = zip(keys, reading.get(quantity, ()), strict=False)
                metrics.update((key, value) for key, value in values if not math.isnan(value))
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                # Lightning numbers the step after which it logs from 0.
                self.attempt(f"logging to {type(logger).__name__}", logger.log_metrics, metrics, step - 1)
            if self.report and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
                self.attempt("writing the history", self._save, trainer, history)
            self.attempt("the charts for W&B", self._send_due_charts, trainer, history, self._last)
        self._last = step

    def publish(self, trainer: "pl.Trainer", reading: Reading, diverged: bool) -> dict[str, float]:
        """Aggregates over the layers, also into ``callback_metrics``; NaN there once weights are not finite."""
        metrics = {}
        for quantity, statistics in self._aggregates().items():
            values = torch.tensor(reading.get(quantity, []), dtype=torch.float64)
            values = values[~values.isnan()]
            if len(values):
                for name, statistic in statistics.items():
                    metrics[f"layer_{quantity}_stats/{name}"] = float(statistic(values))
        stale = [key for key in self._statistic_keys() if key in metrics or key in trainer.callback_metrics]
        published = dict.fromkeys(stale, math.nan) if diverged else metrics
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in published.items()})
        return metrics

    def refresh(self, trainer: "pl.Trainer", history: RotationHistory) -> None:
        """Renew the page while training goes on, as long as that takes little of its time."""
        wanted = self.report and len(history) and trainer.is_global_zero
        if wanted and not trainer.fast_dev_run and time.monotonic() >= self._next_page:  # type: ignore[attr-defined]
            start = time.monotonic()
            self.attempt("writing the page", self._write_page, history, log_folder(trainer) / _PAGE)
            end = time.monotonic()
            self._next_page = end + (end - start) / _PAGE_SHARE

    def finish(self, trainer: "pl.Trainer", history: RotationHistory) -> None:
        """Report at the end of a training, on the first process. No collective: it may be alone."""
        if not len(history) or not trainer.is_global_zero:
            return
        keys = self._statistic_keys()
        self.attempt("noting the final metrics", lambda: history.facts.update(final_facts(trainer, keys)))
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
            return
        if self.report:
            self.attempt("printing the table", self._print_report, trainer, history)
        self.attempt("the charts for W&B", self._send_charts, trainer, history)
        self.attempt("the results for W&B", self._send_results, trainer, history)

    def _save(self, trainer: "pl.Trainer", history: RotationHistory) -> None:
        """Keep the file up to date while training goes on: a run that is killed leaves its curves."""
        path = log_folder(trainer) / _FILE
        kept = (path, history.thinned_to, list(history.layer_names))
        appends = self._saved == kept and history.steps[-1] > self._saved_step
        # Until it succeeded: a failure may leave a cut row, after which none can be added.
        self._saved = None
        if appends:
            history.save_last_row(path)
        else:
            history.save(path)
        self._saved, self._saved_step = kept, history.steps[-1]

    def _statistic_keys(self) -> list[str]:
        return [f"layer_{quantity}_stats/{name}" for quantity, names in self._aggregates().items() for name in names]

    def _aggregates(self) -> dict[str, dict[str, Callable[[Tensor], Tensor]]]:
        """Statistics over the layers, by quantity; the median straightness says most about the learning rate."""
        logged = dict.fromkeys(self.log_quantities, _STATISTICS)
        return {**logged, "straightness": {**logged.get("straightness", {}), "median": torch.median}}

    def _print_report(self, trainer: "pl.Trainer", history: RotationHistory) -> None:
        from pl_layer_rotation.report.table import print_table

        print_table(history)
        folder = log_folder(trainer)
        self.attempt("writing the history", history.save, folder / _FILE)
        self.attempt("writing the page", self._write_page, history, folder / _PAGE)
        if (folder / _PAGE).is_file():
            print(f"Layer rotation: {folder / _PAGE}")
        if self.report == "wandb":
            self.attempt("the page for W&B", self._send_page, trainer, history, folder / _PAGE)

    def _write_page(self, history: RotationHistory, path: Path) -> None:
        from pl_layer_rotation.report.page import write_page

        write_page(path, {str(history.facts.get("optimizer", "run")): history})

    def _prepare_wandb(self, trainer: "pl.Trainer", history: RotationHistory) -> None:
        from pl_layer_rotation.report.wandb_sink import prepare_run

        keys = self._statistic_keys()
        if len(history.layer_names) <= _MOST_LOGGED_LAYERS:
            keys += [key for quantity in self.log_quantities for key in log_keys(history.layer_names, quantity)]
        for logger in wandb_loggers(trainer):
            prepare_run(logger.experiment, history, keys, prefix=logger._prefix)

    def _send_due_charts(self, trainer: "pl.Trainer", history: RotationHistory, before: int) -> None:
        from pl_layer_rotation.report.wandb_sink import charts_due

        if wandb_loggers(trainer) and charts_due(history, before):
            self._send_charts(trainer, history)

    def _send_charts(self, trainer: "pl.Trainer", history: RotationHistory) -> None:
        from pl_layer_rotation.report.wandb_sink import log_charts

        for logger in wandb_loggers(trainer):
            log_charts(logger.experiment, history, history.steps[-1] - 1, prefix=logger._prefix)

    def _send_page(self, trainer: "pl.Trainer", history: RotationHistory, path: Path) -> None:
        from pl_layer_rotation.report.wandb_sink import log_page

        for logger in wandb_loggers(trainer):
            log_page(logger.experiment, path, history.steps[-1] - 1, prefix=logger._prefix)

    def _send_results(self, trainer: "pl.Trainer", history: RotationHistory) -> None:
        from pl_layer_rotation.report.wandb_sink import log_results, viewing_hint

        for logger in wandb_loggers(trainer):
            log_results(logger.experiment, history, prefix=logger._prefix)
            hint = viewing_hint(logger.experiment)
            if hint and self.report:
                print(hint)


@lru_cache(maxsize=8)
def _keys(layer_names: tuple[str, ...], quantity: str) -> list[str]:
    """Kept: making them was a quarter of the time that logging a thousand layers takes."""
    return log_keys(layer_names, quantity)
