"""The ``instseg`` command: a thin function per subcommand, and the one place where errors end."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import instseg
from instseg.check_data import add_arguments as add_check_data
from instseg.console import Parser, console
from instseg.errors import ConfigError, InstsegError, OutputError, one_line


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
    # Read when OpenCV is loaded: its own messages would stand beside the one line per bad file.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    instseg.get_cfg  # noqa: B018 - resolved on first use


def predict(arguments: argparse.Namespace) -> int:
    """``instseg predict``."""
    from instseg.predict import PredictOptions
    from instseg.predict import predict as run

    return run(
        PredictOptions(
            config_file=arguments.config_file,
            inputs=arguments.input,
            output=arguments.output,
            weights=arguments.weights,
            confidence=arguments.confidence,
            overlay=not arguments.no_overlay,
            instance_masks=arguments.instance_masks,
            allow_partial=arguments.allow_partial,
            keyframe_interval=arguments.keyframe_interval,
            track=arguments.track,
            resume=arguments.resume,
            overrides=arguments.overrides,
        )
    )


def shapes_export(arguments: argparse.Namespace) -> int:
    """``instseg shapes export``."""
    from instseg.data.shapes import export

    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit is {arguments.limit}; expected at least 1")
    try:
        splits = arguments.split or ["shapes_train", "shapes_val"]
        paths = [export(split, arguments.directory, limit=arguments.limit) for split in splits]
    except OSError as error:
        raise OutputError(
            f"{arguments.directory} cannot be written: {error.strerror or error}"
        ) from error
    print(*paths, sep="\n")
    return 0


def convert(arguments: argparse.Namespace) -> int:
    """``instseg convert``."""
    from instseg.checkpoint.convert import Options, convert_file

    path, report = convert_file(
        arguments.format,
        arguments.input,
        arguments.output,
        Options(
            leave_out_classes=arguments.leave_out_classes, allow_partial=arguments.allow_partial
        ),
    )
    print(report)
    print(path)
    return 0


def proposals(arguments: argparse.Namespace) -> int:
    """``instseg proposals``."""
    from instseg.engine.propose import propose

    count = propose(
        arguments.config_file,
        arguments.weights,
        arguments.dataset,
        arguments.output,
        arguments.overrides,
        allow_partial=arguments.allow_partial,
    )
    print(f"{arguments.output}: proposals for {count} pictures")
    return 0


def export(arguments: argparse.Namespace) -> int:
    """``instseg export``."""
    from instseg.engine.predictor import Predictor
    from instseg.export import export as run

    # Traced on the CPU, where every operator of every format is known.
    overrides = ["MODEL.DEVICE", "cpu", *arguments.overrides]
    predictor = Predictor(
        arguments.config_file,
        arguments.weights,
        allow_partial=arguments.allow_partial,
        overrides=overrides,
    )
    print(*run(predictor, arguments.format, arguments.output), sep="\n")
    return 0


def nuclei_build(arguments: argparse.Namespace) -> int:
    """``instseg nuclei build``."""
    from instseg.data.nuclei import build

    try:
        counts = build(arguments.source, arguments.output, arguments.train, arguments.val)
    except OSError as error:
        raise OutputError(f"{arguments.output} cannot be written: {error}") from error
    print(f"{arguments.output}: {counts['train']} training, {counts['val']} validation pictures")
    return 0


def benchmark_models(arguments: argparse.Namespace) -> int:
    """``instseg benchmark models``."""
    from instseg.benchmark import benchmark_models as run
    from instseg.benchmark import report

    rows = run(
        arguments.config_file,
        arguments.input,
        arguments.overrides,
        arguments.repeats,
        arguments.variant or ["eager"],
    )
    print(report(rows, arguments.json))
    return 0


def benchmark_ops(arguments: argparse.Namespace) -> int:
    """``instseg benchmark ops``."""
    from instseg.benchmark import benchmark_ops as run
    from instseg.benchmark import report

    rows = run(arguments.device, arguments.repeats, arguments.op)
    print(report(rows, arguments.json))
    return 0


def _path(text: str) -> Path:
    """A path; Python takes an empty one, of a shell's variable that is not set, as ``.``."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found nothing")
    return Path(text)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="instseg", description="Instance segmentation on Detectron2.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_predict(commands.add_parser("predict", help="find objects in pictures and videos"))
    _add_proposals(
        commands.add_parser("proposals", help="write a model's boxes for another detector")
    )
    _add_convert(commands.add_parser("convert", help="make released weights usable here"))
    _add_export(commands.add_parser("export", help="write a network as ONNX or torch.export"))
    add_check_data(commands.add_parser("check-data", help="find what is wrong with data sets"))
    shapes = commands.add_parser("shapes", help="the built-in synthetic data set")
    shapes_commands = shapes.add_subparsers(metavar="COMMAND", required=True)
    _add_shapes_export(shapes_commands.add_parser("export", help="write it as COCO JSON and PNG"))
    nuclei = commands.add_parser("nuclei", help="the data set of cell nuclei")
    nuclei_commands = nuclei.add_subparsers(metavar="COMMAND", required=True)
    _add_nuclei_build(nuclei_commands.add_parser("build", help="build it from BBBC038v1"))
    benchmark = commands.add_parser("benchmark", help="speed and memory against a named peer")
    benchmark_commands = benchmark.add_subparsers(metavar="COMMAND", required=True)
    _add_benchmark_models(benchmark_commands.add_parser("models", help="whole predictions"))
    _add_benchmark_ops(benchmark_commands.add_parser("ops", help="compiled operators"))
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    """What every command takes that runs one model."""
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="YAML file, or its name in configs/")
    add("--weights", metavar="FILE", help="checkpoint, instead of MODEL.WEIGHTS")
    add(
        "--allow-partial",
        action="store_true",
        help="go on with weights that fit less than half of the model",
    )
    add("overrides", nargs="*", metavar="KEY VALUE", help="configuration overrides, last")


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes predictions.json for pictures (COCO results with RLE masks) and NAME.json for each "
        "video (the same by frame), an overlay per picture or video, and on request one PNG per "
        "object.  Exit status 1 if some input could not be used, or not completely."
    )
    _add_model(parser)
    add = parser.add_argument
    add(
        "--input",
        required=True,
        nargs="+",
        metavar="INPUT",
        help="pictures, videos, folders, or the number of a camera",
    )
    add("--output", required=True, type=_path, metavar="DIR", help="created if need be")
    add(
        "--confidence",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="objects with a lower score are left out (default %(default)s)",
    )
    add("--no-overlay", action="store_true", help="no overlay pictures and videos")
    add("--instance-masks", action="store_true", help="one black and white PNG per object")
    add(
        "--keyframe-interval",
        type=int,
        metavar="N",
        help="frames from one that a video model computes in full to the next (default: the "
        "configuration's)",
    )
    add("--track", action="store_true", help="number the objects of videos over time")
    add("--resume", action="store_true", help="go on with unfinished videos; redo pictures")
    parser.set_defaults(run=predict)


def _add_proposals(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes the boxes that a model without classes (deepmask, sharpmask, instance_fcn) finds "
        "in a data set, for DATASETS.PROPOSAL_FILES_TRAIN and _TEST of a detector with "
        "MODEL.LOAD_PROPOSALS."
    )
    _add_model(parser)
    add = parser.add_argument
    add("--dataset", required=True, metavar="NAME", help="a data set, or coco:PATH:IMAGE_ROOT")
    add("--output", required=True, type=_path, metavar="FILE", help="NAME.pkl")
    parser.set_defaults(run=proposals)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes the network from normalised square pictures, any number of them, to what the head "
        "gives; instseg.export.ExportedPredictor does the rest.  Prints the files written."
    )
    _add_model(parser)
    add = parser.add_argument
    add("--format", required=True, metavar="FORMAT", help="onnx or torch_export")
    add("--output", required=True, type=_path, metavar="FILE", help="NAME.onnx or NAME.pt2")
    parser.set_defaults(run=export)


def _add_shapes_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=_path, metavar="DIR")
    parser.add_argument(
        "--split",
        action="append",
        metavar="NAME",
        help="may be repeated (default shapes_train and shapes_val)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N pictures")
    parser.set_defaults(run=shapes_export)


def _add_nuclei_build(parser: argparse.ArgumentParser) -> None:
    parser.description = "Writes OUTPUT/images and OUTPUT/instances_{train,val}.json."
    parser.add_argument("source", type=_path, metavar="STAGE1_TRAIN", help="the unpacked download")
    parser.add_argument("output", type=_path, metavar="OUTPUT")
    for split, count in (("train", 400), ("val", 60)):
        text = "pictures (default %(default)s)"
        parser.add_argument(f"--{split}", type=int, default=count, metavar="N", help=text)
    parser.set_defaults(run=nuclei_build)


def _add_benchmark_models(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compares instseg's Predictor with Detectron2's stock DefaultPredictor on the same network "
        "and pictures.  Ratios are peer / ours: above 1 is ahead."
    )
    add = parser.add_argument
    add("--config-file", required=True, action="append", metavar="FILE", help="may be repeated")
    add("--input", nargs="+", default=[], metavar="FILE", help="pictures; default synthetic ones")
    add(
        "--variant",
        action="append",
        metavar="NAME",
        help="eager (the default), folded (batch normalisation folded, channels last) or compiled "
        "(that through torch.compile); may be repeated, a row each",
    )
    add("--repeats", type=int, default=6, metavar="N", help="passes (default %(default)s)")
    add("--json", type=_path, metavar="FILE", help="write the rows as a JSON list")
    add("overrides", nargs="*", metavar="KEY VALUE", help="configuration overrides, last")
    parser.set_defaults(run=benchmark_models)


def _add_benchmark_ops(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compares each compiled operator with its composition of common operators on the same "
        "input.  Ratios are peer / ours: above 1 is ahead.  floor_ms is what moving the bytes of "
        "input and output takes."
    )
    add = parser.add_argument
    add("--device", default="cpu", metavar="DEVICE", help="cpu or cuda (default %(default)s)")
    add("--repeats", type=int, default=5, metavar="N", help="calls (default %(default)s)")
    add("--op", action="append", metavar="NAME", help="this row alone; may be repeated")
    add("--json", type=_path, metavar="FILE", help="write the rows as a JSON list")
    parser.set_defaults(run=benchmark_ops)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes a checkpoint for MODEL.WEIGHTS and says what became of every tensor; runs no code."
    )
    add = parser.add_argument
    add(
        "format",
        metavar="FORMAT",
        help="whose weights: deepmask, discriminative_loss, fcis, maskscoring_rcnn, matterport, "
        "yolact or yolact_edge",
    )
    add("input", metavar="IN", help="the file as its authors released it")
    add("output", metavar="OUT", type=_path, help="NAME.safetensors (the default) or NAME.pth")
    add(
        "--leave-out-classes",
        action="store_true",
        help="without the layers whose size depends on the number of classes, to train on others",
    )
    add(
        "--allow-partial",
        action="store_true",
        help="accept a file that holds only some layers, such as a backbone",
    )
    parser.set_defaults(run=convert)


if __name__ == "__main__":
    sys.exit(main())
