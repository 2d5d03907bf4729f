"""Write the events of a run for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lares_fast._errors import require
from lares_fast.cli.console import Event


def listener(folder: Path) -> Callable[[], Callable[[Event], None]]:
    """Return a function that opens ``folder`` and returns a listener of events.

    Raises :class:`MissingExtraError` without TensorBoard.
    """
    require("tensorboard", "tb", "--tensorboard")
    module = require("torch.utils.tensorboard", "tb", "--tensorboard")

    def start() -> Callable[[Event], None]:
        writer = module.SummaryWriter(str(folder))

        def listen(event: Event) -> None:
            match event["event"]:
                case "step":
                    place = (event["epoch"] - 1) * event["steps"] + event["step"]
                    for name, value in event["means"].items():
                        writer.add_scalar(f"{event['phase']}/{name}", value, place)
                case "valid":
                    for name, value in event["metrics"].items():
                        writer.add_scalar(f"{event['phase']} valid/{name}", value, event["epoch"])
                    writer.flush()
                case "test":
                    for row in event["rows"]:
                        if row["phase"] == event["phase"]:
                            name = f"{row['phase']} test, history {row['history']}/ndcg@10"
                            writer.add_scalar(name, row["ndcg@10"], row["test_T"])
                    writer.flush()

        return listen

    return start
