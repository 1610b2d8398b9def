"""Run a study of the paper (arXiv 1806.01603), and set its numbers beside the paper's.

    uv run --no-dev --extra examples examples/paper/run.py --list
    uv run --no-dev --extra examples examples/paper/run.py mnist --download
    uv run --no-dev --extra examples examples/paper/run.py layca-rates --task C10-CNN1 --scale 0.02 --download
    uv run --no-dev --extra examples examples/paper/run.py table layca-rates

Without --scale a training has the paper's length: hours on a GPU. With --scale 0.02 it takes about a fiftieth of the
work, on a CPU too. Finished settings are skipped when a command is repeated, and one that was stopped goes on from its
last whole epoch. Results are JSON files in --output; `table` and `pictures` read them, `pictures` with matplotlib
(`uv run --with matplotlib …`). You should see of the MNIST study, which needs minutes on a CPU: all rates fit the
training set, the first layer ends at distances of 0.90, 0.60, 0.30 and 0.11, and below 0.60 the test accuracy falls.
"""

import argparse
import difflib
import logging
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from errors import InputError
from image_data import Images, load_images
from plans import Plan, make_plan
from results import StudyFolder, feature_images, write_json
from studies import STUDIES, Setting, settings_of
from tasks import TASKS
from training import recorded_rates, train

from pl_layer_rotation import select_layers


def main(arguments: list[str] | None = None) -> int | str:
    """Run what the command line says; a sentence for the user where it cannot be done."""
    options = parse(arguments)
    try:
        if options.list:
            print_list()
        elif options.words[:1] == ["table"]:
            from table import print_table

            print_table(*folders_to_show(options))
        elif options.words[:1] == ["pictures"]:
            from pictures import draw

            draw(*folders_to_show(options), options.output)
        else:
            (study,) = checked(options.words, STUDIES, "STUDY", 1)
            for task in checked(options.task, TASKS, "--task") or STUDIES[study].tasks:
                run_study(study, task, options)
    except InputError as error:
        return f"{error}"
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The studies of arXiv 1806.01603.")
    parser.add_argument("words", nargs="*", metavar="STUDY", help="a study; or `table STUDY`, `pictures STUDY`")
    parser.add_argument("--list", action="store_true", help="name every study and task")
    parser.add_argument("--task", nargs="+", default=[], help="one or more tasks; all of the study's without it")
    parser.add_argument("--settings", nargs="+", default=[], help="only these settings of the study")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the paper's work, 1 without it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder that holds the data sets")
    parser.add_argument("--download", action="store_true", help="get missing data into --data-dir")
    parser.add_argument("--output", type=Path, default=Path("paper"), help="folder of the results")
    parser.add_argument("--accelerator", default="auto")
    return parser.parse_args(arguments)


def checked(given: list[str], known: Iterable[str], argument: str, count: int | None = None) -> list[str]:
    """The names, if all of them are known.

    Raises:
        InputError: If one is not, or there are more or fewer than ``count``.

    """
    names = list(known)
    if count is not None and len(given) != count:
        raise InputError(f"`{argument}` must be {count} of {', '.join(names)}, got {given}. See --list.")
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
            hint = f"Did you mean {' or '.join(near)}?" if near else "See --list."
            raise InputError(f"`{argument}` must be one of {', '.join(names)}, got {name!r}. {hint}")
    return given


def run_study(study: str, task_name: str, options: argparse.Namespace) -> None:
    task = TASKS[task_name]
    checked([task_name], STUDIES[study].tasks, "--task")
    settings = settings_of(study, task_name)
    chosen = checked(options.settings, [setting.name for setting in settings], "--settings")
    images = load_images(task.dataset, options.data_dir, options.download)
    plans = [make_plan(task, setting, len(images.train), len(images.test), options.scale) for setting in settings]
    folder = StudyFolder(options.output / study / task_name, study, task_name)
    folder.claim(settings, plans, images.source)
    print(f"{study} on {task_name}: {', '.join(setting.name for setting in settings)}, results in {folder.path}")
    if options.scale == 1 and task.dataset != "MNIST" and not torch.accelerator.is_available():
        print("  no GPU here, on which a training of the paper's length takes hours: --scale 0.02 is a fiftieth")
    for seed in options.seeds:
        for setting, plan in zip(settings, plans, strict=True):
            if not chosen or setting.name in chosen:
                run_setting(folder, setting, plan, images, seed, options)


def run_setting(
    folder: StudyFolder, setting: Setting, plan: Plan, images: Images, seed: int, options: argparse.Namespace
) -> None:
    if folder.result(setting.name, seed).is_file():
        print(f"  {setting.name}, seed {seed}: already finished")
        return
    task, rates = TASKS[folder.task], None
    if setting.replays is not None:
        record = folder.rates(setting.replays, seed)
        if not record.is_file():
            raise InputError(
                f"`--settings` must name {setting.replays} too, or after it was run with seed {seed}, got "
                f"{setting.name}, which repeats its rotations. Run {setting.replays} first."
            )
        rates = torch.load(record, weights_only=True)
    command = " ".join(["examples/paper/run.py", *repeatable(folder, options)])
    finished = train(
        task, setting, plan, images, seed, folder.checkpoint(setting.name, seed), rates, options.accelerator
    )
    if setting.records:
        torch.save(recorded_rates(finished.history, plan.steps), folder.rates(setting.name, seed))
    if folder.study == "mnist":
        write_features(folder, setting, seed, finished.model.net.hidden.weight)
    folder.write(setting, plan, seed, finished, images.source, command)
    how = f"{finished.metrics['seconds']:.0f} s"
    if "resumed_after_epoch" in finished.metrics:
        how += f", resumed after epoch {finished.metrics['resumed_after_epoch']}"
    print(f"  {setting.name}, seed {seed}: test {100 * finished.metrics['test_acc']:.2f} % ({how})", flush=True)


def write_features(folder: StudyFolder, setting: Setting, seed: int, weight: torch.Tensor) -> None:
    torch.manual_seed(seed)
    initial = next(iter(select_layers(TASKS[folder.task].network()).values()))
    images = {"initial": feature_images(initial), "final": feature_images(weight)}
    write_json(folder.features(setting.name, seed), images)


def repeatable(folder: StudyFolder, options: argparse.Namespace) -> list[str]:
    """The command's words, without what is another on another machine."""
    words = [folder.study, "--task", folder.task, "--scale", f"{options.scale:g}"]
    return [*words, "--seeds", *map(str, options.seeds), "--accelerator", options.accelerator]


def folders_to_show(options: argparse.Namespace) -> tuple[str, list[StudyFolder]]:
    """A study's folders with results, of the tasks that were asked for.

    Raises:
        InputError: If there is none.

    """
    (study,) = checked(options.words[1:], STUDIES, "STUDY", 1)
    tasks = checked(options.task, STUDIES[study].tasks, "--task") or STUDIES[study].tasks
    folders = [StudyFolder(options.output / study / task, study, task) for task in tasks]
    found = [folder for folder in folders if (folder.path / "plan.json").is_file()]
    if not found:
        raise InputError(f"`--output` must hold results of {study}, got {options.output}. Run the study first.")
    return study, found


def print_list() -> None:
    print("studies")
    for name, study in STUDIES.items():
        print(f"  {name:12} {study.title}")
        print(f"  {'':12} tasks: {', '.join(study.tasks)}")
        print(f"  {'':12} settings on {study.tasks[0]}: {', '.join(s.name for s in settings_of(name, study.tasks[0]))}")
    print("\ntasks")
    for name, task in TASKS.items():
        with torch.device("meta"):
            net = task.network()
        size, layers = sum(p.numel() for p in net.parameters()), len(select_layers(net))
        print(f"  {name:13} {task.dataset:13} {size:>10,} parameters in {layers:3} layers, batch {task.batch_size}")


if __name__ == "__main__":
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    sys.exit(main())
