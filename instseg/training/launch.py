"""Start of ``train_net.py``: its arguments, the first checks, its processes."""

import argparse
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from urllib.parse import urlparse

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from instseg.categories import Categories
from instseg.checkpoint import Checkpointer
from instseg.config.classes import with_categories
from instseg.config.nodes import check_device, find_config, load_cfg
from instseg.console import Parser
from instseg.errors import ConfigError, OutputError
from instseg.files import atomic_write, lock_folder
from instseg.processes import end_with
from instseg.training.interruption import signals_forwarded


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments plus ``--allow-partial``."""
    stock = default_argument_parser()
    parser = Parser(
        parents=[stock],
        add_help=False,
        epilog=stock.epilog,
        formatter_class=stock.formatter_class,
    )
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="go on with MODEL.WEIGHTS that fit less than half of the model, or with --eval-only "
        "not all of it",
    )
    return parser


def setup(args: argparse.Namespace) -> CfgNode:
    """Read and check the configuration, set up logging and seeds; returns the frozen configuration.

    Raises:
        ConfigError, OutputError: anything that would stop the run later, with what to change.
    """
    cfg = _read_config(args)
    args.config_file = find_config(args.config_file)
    cfg.freeze()
    check_device(cfg)
    _check_output_dir(cfg.OUTPUT_DIR)
    if comm.is_main_process():
        lock_folder(cfg.OUTPUT_DIR)
    _check_weights(cfg, args)
    default_setup(cfg, args)
    # Detectron2 configures only its loggers; without this our messages would vanish.
    logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="instseg")
    for handler in logger.handlers:
        if getattr(handler, "stream", None) is sys.stdout:
            handler.setLevel(logging.INFO)  # tracebacks of user errors go to log.txt alone
    logger.info(f"MODEL.DEVICE is {cfg.MODEL.DEVICE}")
    return cfg


def write_config(cfg: CfgNode, categories: Categories | None) -> None:
    """Rewrite ``config.yaml`` with the categories, which come from the data or the weights."""
    if comm.is_main_process():
        text = with_categories(cfg, categories).dump()
        path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
        atomic_write(path, lambda file: file.write(text.encode()))


def _read_config(args: argparse.Namespace) -> CfgNode:
    if not args.config_file:
        raise ConfigError("no configuration; pass --config-file FILE")
    return load_cfg(args.config_file, args.opts)


def launch(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Run ``main(args)`` here, in ``--num-gpus`` processes, or as one rank of ``torchrun``.

    Raises:
        ConfigError: more processes than this machine can run, or a port that is taken.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _run_as_rank(main, args)
        return
    _check_processes(args)
    several = args.num_gpus * args.num_machines > 1
    with signals_forwarded() if several else nullcontext():
        detectron2_launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )


def _run_as_rank(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    end_with(os.getppid())  # a torchrun that is killed does not end its processes
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpu = _read_config(args).MODEL.DEVICE.startswith("cuda")
    if on_gpu and local_size > torch.cuda.device_count():
        raise ConfigError(
            f"torchrun starts {local_size} processes, this machine has "
            f"{torch.cuda.device_count()} GPUs; pass a lower --nproc-per-node or MODEL.DEVICE cpu"
        )
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        comm.create_local_process_group(local_size)
        main(args)
    finally:
        torch.distributed.destroy_process_group()


def _check_processes(args: argparse.Namespace) -> None:
    gpus = torch.cuda.device_count()
    if args.num_gpus < 1 or args.num_gpus > max(gpus, 1):
        raise ConfigError(
            f"--num-gpus {args.num_gpus}: this machine has {gpus} GPUs; pass at most --num-gpus "
            f"{max(gpus, 1)} (1 also trains on a CPU; start several CPU processes with torchrun)"
        )
    if not 0 <= args.machine_rank < args.num_machines:
        raise ConfigError(
            f"--machine-rank {args.machine_rank} must be below --num-machines {args.num_machines}"
        )
    if args.num_gpus * args.num_machines == 1:
        return
    is_automatic = args.dist_url == "auto" and args.num_machines == 1
    if not is_automatic and not args.dist_url.startswith(("tcp://", "file://", "env://")):
        raise ConfigError(
            f"--dist-url is {args.dist_url}; expected tcp://HOST:PORT, or auto on one machine"
        )
    if args.machine_rank == 0:
        check_port(args.dist_url)


def check_port(url: str) -> None:
    """Raise a ConfigError if the port of ``tcp://HOST:PORT`` is taken on this machine."""
    try:
        port = urlparse(url).port
    except ValueError as error:
        raise ConfigError(f"--dist-url {url}: {error}; expected tcp://HOST:PORT") from None
    if not url.startswith("tcp://") or not port:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"--dist-url {url}: port {port} is busy ({error.strerror}); is another training "
                "running? Pass --dist-url auto or another port"
            ) from None


def _check_output_dir(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".writable-") as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except (OSError, ValueError) as error:  # a name with a null character is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"OUTPUT_DIR {path} cannot be written: {reason}; choose another OUTPUT_DIR"
        ) from None


def _check_weights(cfg: CfgNode, args: argparse.Namespace) -> None:
    on_this_disk = Checkpointer(torch.nn.Identity(), cfg.OUTPUT_DIR).has_checkpoint()
    has_checkpoint = comm.all_gather(on_this_disk)[0]  # rank 0 decides: others may not see its disk
    if args.resume and not has_checkpoint:
        raise ConfigError(
            f"--resume: there is no checkpoint in OUTPUT_DIR {cfg.OUTPUT_DIR}; leave --resume out "
            "to start"
        )
    if args.eval_only and not cfg.DATASETS.TEST:
        raise ConfigError("--eval-only: DATASETS.TEST is empty, there is nothing to evaluate on")
    if args.eval_only and not args.resume and not cfg.MODEL.WEIGHTS:
        raise ConfigError(
            "--eval-only would evaluate random weights; pass MODEL.WEIGHTS FILE, or --resume for "
            "the last checkpoint in OUTPUT_DIR"
        )
