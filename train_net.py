#!/usr/bin/env python
"""Train or evaluate any system of instseg.

    train_net.py --config-file configs/mask_rcnn/mask_rcnn_shapes.yaml SOLVER.MAX_ITER 100
    OUTPUT_DIR output/try

Several GPUs: ``--num-gpus N``; several processes on any device: ``torchrun --nproc-per-node N
train_net.py …``.

Exit status: 0 done, 1 a defect (with a traceback), 2 a user's mistake (one line on stderr), 143 or
130 stopped by SIGTERM or Ctrl-C: a training first finishes its iteration and saves a checkpoint,
from which ``--resume`` goes on.
"""

import argparse
import logging
import sys

from detectron2.evaluation import verify_results
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from instseg.checkpoint import Checkpointer
from instseg.config.classes import check_classes, class_count, model_categories
from instseg.data.dataset import load_all
from instseg.errors import InstsegError, TrainingError, one_line
from instseg.training.hooks import check_expected_results
from instseg.training.launch import argument_parser, launch, setup, write_config
from instseg.training.trainer import Trainer


def run(args: argparse.Namespace) -> None:
    """Train or evaluate as ``args`` say."""
    cfg = setup(args)
    if args.eval_only:
        datasets = load_all(cfg.DATASETS.TEST)
        check_classes(cfg, datasets)
        model = Trainer.build_model(cfg)
        checkpointer = Checkpointer(
            model,
            cfg.OUTPUT_DIR,
            sha256=cfg.MODEL.WEIGHTS_SHA256,
            allow_partial=args.allow_partial,
            inference=True,
            classes=class_count(cfg),
            reads_once=True,
        )
        checkpoint = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        write_config(cfg, model_categories(cfg, checkpoint))
        check_expected_results(cfg, model, datasets)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return
    trainer = Trainer(cfg, allow_partial=args.allow_partial)
    write_config(cfg, trainer.checkpointer.categories)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def main(args: argparse.Namespace) -> None:
    """Call ``run``; a user's mistake gives one line on stderr and exit status 2."""
    try:
        run(args)
    except InstsegError as error:
        # All ranks stop with the same TrainingError; one of them reports it.
        if comm.is_main_process() or not isinstance(error, TrainingError):
            report(error)
        sys.exit(2)


def report(error: InstsegError) -> None:
    """Print ``error`` as one line on stderr."""
    logging.getLogger("instseg").debug("user error", exc_info=error)
    print(f"error: {one_line(error)}", file=sys.stderr)


if __name__ == "__main__":
    try:
        arguments = argument_parser().parse_args()
        launch(main, arguments)
    except InstsegError as error:
        report(error)
        sys.exit(2)
    except ProcessExitedException as error:
        # The code of a process that a signal ended is minus the number of the signal.
        sys.exit(error.exit_code if error.exit_code >= 0 else 128 - error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
