"""Results of forked processes and of their parent: ``python -m tests.support.forked [EXPORTED]``.

Prints {name: [result of the parent, results of its children ...]} as JSON.  A child that waits for
ever is ended by a signal and has no result.
"""

import json
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from instseg import VideoPredictor
from instseg.errors import ProcessError
from instseg.export import ExportedPredictor
from instseg.ops.assemble_masks import assemble_masks
from tests.support.yolact_tiny import PHOTO, tiny_predictor

FORK = multiprocessing.get_context("fork")


def in_child(function: Callable[[], Any]) -> Any:
    """The result of ``function()`` in a forked process."""
    receiver, sender = FORK.Pipe(duplex=False)

    def run() -> None:
        signal.alarm(60)
        try:
            sender.send(function())
        except ProcessError as error:
            sender.send(str(error))

    child = FORK.Process(target=run)
    child.start()
    sender.close()
    child.join()
    try:
        return receiver.recv()
    except EOFError:
        return f"ended with {child.exitcode}"


def count(predictor: Any = None) -> int:
    return len((predictor or tiny_predictor("yolact"))(PHOTO)["instances"])


class Counts(Dataset[int]):
    """Predicts where data are loaded."""

    def __init__(self, predictor: Any) -> None:
        self.predictor = predictor

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return count(self.predictor)


def operator_result() -> int:
    torch.manual_seed(0)
    boxes = 300 * torch.rand(50, 4).sort().values
    masks = assemble_masks(torch.randn(64, 64, 8), torch.randn(50, 8), boxes, (300, 300))
    return int(masks.sum())


def on_one_thread(predictor: Any) -> int:
    torch.set_num_threads(1)
    return count(predictor)


def from_a_thread(predictor: Any) -> list[Any]:
    results: list[Any] = []

    def run() -> None:
        results.extend([count(predictor), in_child(lambda: count(predictor))])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results


def cases(file: Path | None) -> Iterator[tuple[str, list[Any]]]:
    p = tiny_predictor("yolact")
    of_children = in_child(lambda: count(p)), in_child(lambda: count(p))
    yield "a predictor of the parent", [count(p), *of_children, count(p)]
    yield "one made in the child", [count(), in_child(count)]
    video = VideoPredictor(p)
    yield "frames", [count(video), in_child(lambda: count(video))]
    yield "a child of a child", [count(p), in_child(lambda: in_child(lambda: count(p)))]
    yield "a thread", from_a_thread(p)
    yield "one thread", [count(p), in_child(lambda: on_one_thread(p))]
    yield "an operator", [operator_result(), in_child(operator_result)]
    loader = DataLoader(Counts(p), num_workers=2, multiprocessing_context=FORK)
    yield "a loader of data", [count(p), *(int(number) for number in loader)]
    if file is None:  # without the extra
        return
    exported = ExportedPredictor(file)
    made = in_child(lambda: count(ExportedPredictor(file)))
    yield "an exported one made in the child", [count(exported), made]
    yield "an exported one", [count(exported), in_child(lambda: count(exported))]


if __name__ == "__main__":
    torch.set_num_threads(4)
    torch.nn.functional.conv2d(torch.ones(4, 32, 64, 64), torch.ones(32, 32, 3, 3))
    print(json.dumps(dict(cases(Path(sys.argv[1]) if sys.argv[1:] else None))))
