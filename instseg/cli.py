"""The ``instseg`` command: its subcommands, and the one place where errors end."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence

import instseg
from instseg.commands import (
    benchmark,
    check_data,
    compare,
    convert,
    evaluate,
    export,
    models,
    nuclei,
    predict,
    proposals,
    results,
    shapes,
    version,
)
from instseg.console import Parser, console
from instseg.errors import InstsegError, one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``instseg ARGUMENTS``.

    Returns:
        the exit status: 0 done, 1 done except for some inputs, 2 a mistake in arguments, files or
        configuration, 130 interrupted by Ctrl-C (``instseg predict``: or by SIGTERM).
    """
    try:
        with console(), warnings.catch_warnings():
            if not sys.warnoptions:  # `python -W` asks for them
                warnings.simplefilter("ignore")  # libraries address developers with them
            arguments = _parser().parse_args(argv)
            _load_requirements()
            status: int = arguments.run(arguments)
            sys.stdout.flush()
            return status
    except InstsegError as error:
        print("error:", one_line(error), file=sys.stderr)
        return 2
    except ImportError as error:
        # Raised without a name only by `instseg` itself, about a requirement that is not installed.
        if error.name is not None:
            raise
        print("error:", error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # `instseg ... | head` ended early; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _load_requirements() -> None:
    """Raise an ImportError that says what to type if torch or Detectron2 is missing."""
    # Read when OpenCV is loaded: keeps its messages away from our one line per bad file.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    instseg.get_cfg  # noqa: B018 - resolved on first use


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="instseg", description="Instance segmentation on Detectron2.")
    parser.add_argument("--version", action=version.Version)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add = commands.add_parser
    predict.add_arguments(add("predict", help="find instances in images and videos"))
    results.add_arguments(add("results", help="write results in other formats"))
    evaluate.add_arguments(add("evaluate", help="compare results with the ground truth"))
    compare.add_arguments(add("compare", help="show trainings side by side"))
    models.add_arguments(add("models", help="list the shipped models"))
    proposals.add_arguments(add("proposals", help="write a model's boxes for another detector"))
    convert.add_arguments(add("convert", help="make released weights usable here"))
    export.add_arguments(add("export", help="write a network as ONNX or torch.export"))
    check_data.add_arguments(add("check-data", help="find what is wrong with data sets"))
    add_to = _group(add("shapes", help="the built-in synthetic data set"))
    shapes.add_export_arguments(add_to("export", help="write it as COCO JSON and PNG"))
    add_to = _group(add("nuclei", help="the data set of cell nuclei"))
    nuclei.add_build_arguments(add_to("build", help="build it from BBBC038v1"))
    add_to = _group(add("benchmark", help="speed and memory against a named peer"))
    benchmark.add_models_arguments(add_to("models", help="whole predictions"))
    benchmark.add_ops_arguments(add_to("ops", help="compiled operators"))
    benchmark.add_tiles_arguments(add_to("tiles", help="a large image by tiles"))
    benchmark.add_train_arguments(add_to("train", help="steps of a training"))
    return parser


def _group(parser: argparse.ArgumentParser) -> Callable[..., argparse.ArgumentParser]:
    """A function that adds commands below another one."""
    return parser.add_subparsers(metavar="COMMAND", required=True).add_parser


if __name__ == "__main__":
    sys.exit(main())
