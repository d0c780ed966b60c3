"""Kill a small training again and again, also while it saves; ``--resume`` must always go on.

    python tools/chaos.py --rounds 20 --seed 7

Each round trains with ``train_net.py`` (``--resume`` from the second on) in its own process and
kills it, every other time while it saves a checkpoint.  Afterwards every checkpoint must be
readable, the one to resume from must not be older than before, and the next training must start
right behind it.  The last training runs to its end.  The same seed gives the same delays; the
machine decides what they hit.
"""

import argparse
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from instseg.checkpoint import Checkpointer, read_weights
from instseg.data.synthetic import shapes
from instseg.files import TEMPORARY
from instseg.processes import end_with, end_with_make
from instseg.training.launch import argument_parser, launch

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "mask_rcnn" / "mask_rcnn_shapes.yaml"
# Few channels and small images: only the saving is tested.
TRAINING = [
    *("MODEL.DEVICE", "cpu", "SEED", "1", "DATASETS.TEST", "()", "SOLVER.IMS_PER_BATCH", "1"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "16", "MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "64", "INPUT.MIN_SIZE_TRAIN", "(64,)"),
    *("DATALOADER.NUM_WORKERS", "1", "SOLVER.CHECKPOINT_PERIOD", "2"),
]
MANY = 10**6


class Chaos:
    """A folder in which trainings are killed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.run = folder / "run"
        json = shapes.export("shapes_val", folder, limit=6)
        self.data = f"coco:{json}:{folder / 'shapes_val'}"
        self.output = folder / "output.txt"
        self.dice = random.Random(seed)
        self.last = -1
        """Iteration of the checkpoint to resume from, -1 before there is one."""
        self.leftovers: set[Path] = set()
        """Half-written checkpoints that kills have left; the next save removes them."""

    def round(self, while_saving: bool) -> str:
        """Train, kill and check; returns what happened."""
        self.leftovers = set(self.unfinished())
        child = self.start(MANY)
        if while_saving:
            for _ in range(self.dice.randint(1, 3)):
                self.wait(child, self.is_saving)
                self.wait(child, lambda: not self.is_saving())
            self.wait(child, self.is_saving)
            time.sleep(self.dice.uniform(0, 0.05))
        else:
            time.sleep(self.dice.uniform(0, 8))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        moment = "while saving" if self.is_saving() else "elsewhere"
        began = self.beginning()
        self.check(began)
        start = "did not begin yet" if began is None else f"began at {began}"
        return f"{start}, killed {moment}; to go on from: {self.last}"

    def finish(self) -> None:
        """Train to the end."""
        iterations = self.last + 4
        child = self.start(iterations)
        _, status = os.waitpid(child, 0)
        expect(status == 0, f"the last training ended with status {status}")
        self.check(self.beginning())
        final = read_weights(self.run / "model_final.pth")["iteration"]
        expect(final == iterations - 1, f"the last training ended at iteration {final}")

    def start(self, iterations: int) -> int:
        """Train in another process; returns its id."""
        # A fork, because importing everything again takes longer than the training.
        parent = os.getpid()
        child = os.fork()
        if child:
            return child
        end_with(parent)
        status = 1
        try:
            log = os.open(self.output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            train_net = runpy.run_path(str(ROOT / "train_net.py"))
            resume = ["--resume"] if self.last >= 0 else []
            words = ["--config-file", str(CONFIG), *resume, *TRAINING]
            words += ["DATASETS.TRAIN", f"('{self.data}',)", "OUTPUT_DIR", str(self.run)]
            words += ["SOLVER.MAX_ITER", str(iterations)]
            launch(train_net["main"], argument_parser().parse_args(words))
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def wait(self, child: int, condition: Callable[[], bool]) -> None:
        """Return when ``condition`` holds; ``child`` must live until then."""
        while not condition():
            expect(os.waitpid(child, os.WNOHANG)[0] == 0, f"a training ended:\n{self.tail()}")
            time.sleep(0.001)

    def is_saving(self) -> bool:
        """Whether the training saves just now, or was killed while it did."""
        return not self.leftovers.issuperset(self.unfinished())

    def unfinished(self) -> Iterator[Path]:
        """Checkpoints that are half written."""
        return self.run.glob(f".*.pth.*{TEMPORARY}")

    def beginning(self) -> int | None:
        """The first iteration of the last training, None if it was killed before."""
        line = re.search(r"Starting training from iteration (\d+)", self.tail(MANY))
        return int(line[1]) if line else None

    def check(self, began: int | None) -> None:
        """Check that training can go on from its files; ``began`` is its first iteration."""
        expect(began in (None, self.last + 1), f"training from {began} after {self.last}")
        for file in self.run.glob("*.pth"):
            read_weights(file)
        file = Checkpointer(nn.Identity(), str(self.run)).get_checkpoint_file()
        iteration = int(read_weights(file)["iteration"]) if file else -1
        expect(iteration >= self.last, f"{file} is of {iteration}, there was {self.last} before")
        self.last = iteration
        newest = sorted(self.run.glob("*.pth"), key=lambda path: path.stat().st_mtime)
        for old in newest[:-3]:
            if str(old) != file:
                old.unlink()

    def tail(self, length: int = 2000) -> str:
        """The end of what the last training printed."""
        return self.output.read_text()[-length:] if self.output.exists() else ""


def expect(condition: bool, otherwise: str) -> None:
    """Stop with a message unless ``condition``."""
    if not condition:
        sys.exit(f"FAILED: {otherwise}")


def main() -> None:
    """Run the rounds that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(MANY))
    args = parser.parse_args()
    end_with_make()
    print(f"seed {args.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"in {folder}, which is removed in the end unless something fails", flush=True)
    torch.set_num_threads(1)  # a fork would wait for ever for threads of its parent
    start = time.monotonic()
    chaos = Chaos(folder, args.seed)
    saving = 0
    for number in range(args.rounds):
        outcome = chaos.round(while_saving=number % 2 == 0)
        saving += "while saving" in outcome
        print(f"{time.monotonic() - start:5.0f} s  round {number + 1}: {outcome}", flush=True)
    chaos.finish()
    shutil.rmtree(folder)
    print(
        f"{args.rounds} kills, {saving} of them while saving; training went on every time and "
        f"reached its end ({time.monotonic() - start:.0f} s)"
    )


if __name__ == "__main__":
    main()
