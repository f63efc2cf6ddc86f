"""Show a training run's progress from its log, which any machine that sees the folder can read."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from udiff.system import FamilyRecipe
from udiff.training.log import read_metrics, select_losses


@contextmanager
def follow_run(folder: Path, recipe: FamilyRecipe) -> Iterator[None]:
    """Draw a bar on stderr while the body runs: steps, loss, images per second, time left."""
    stop = threading.Event()
    bar = Progress(
        TextColumn(f"train {recipe.family}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps, {task.fields[state]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = bar.add_task("train", total=recipe.train.num_steps, state="starting")

    def watch() -> None:
        while not stop.wait(1.0):
            update()

    def update() -> None:
        rows = read_metrics(folder)
        if rows:
            last = rows[-1]
            losses = [f"{name} {value:.4f}" for name, value in select_losses(last).items()]
            state = f"{', '.join(losses)}, {last['images_per_s']:.0f} images/s"
            bar.update(task, completed=last["step"], state=state)

    thread = threading.Thread(target=watch, daemon=True)
    with bar:
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            update()
