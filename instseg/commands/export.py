"""``instseg export``: the network of a model as ONNX or torch.export."""

import argparse

from instseg.commands.arguments import add_classes_argument, add_model_arguments, path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``, and the function that runs it."""
    parser.description = (
        "Writes the network, from a batch of normalised square images to the outputs of the head; "
        "instseg.export.ExportedPredictor does the rest.  Prints the files written, and with "
        "--int8 what 8 bits change."
    )
    add_model_arguments(parser)
    add_classes_argument(parser)
    add = parser.add_argument
    add("--format", required=True, metavar="FORMAT", help="onnx or torch_export")
    add("--output", required=True, type=path, metavar="FILE", help="NAME.onnx or NAME.pt2")
    add(
        "--int8",
        action="store_true",
        help="compute with 8-bit whole numbers, with ranges by --calibrate; onnx only",
    )
    add(
        "--calibrate",
        metavar="SOURCE",
        help="folder of images, such as the network will see, or data set, such as "
        "coco:PATH.json:FOLDER; what 8 bits change is measured on every fifth of them",
    )
    add(
        "--calibration-images",
        type=int,
        default=100,
        metavar="N",
        help="number of images of the source that are used, evenly spread (default %(default)s)",
    )
    add(
        "--keep-float",
        action="append",
        default=[],
        metavar="PREFIX",
        help="parts of the network that stay in float32, such as head; may be repeated",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """``instseg export``."""
    from instseg.config.classes import classes_option
    from instseg.config.nodes import load_cfg
    from instseg.export import calibration_images, to_int8
    from instseg.export import export as run
    from instseg.inference.predictor import Predictor, require_weights

    files = _calibration_files(arguments)
    # Traced on the CPU, where every operator of every format is known.
    overrides = ["MODEL.DEVICE", "cpu", *arguments.overrides]
    cfg = load_cfg(arguments.config_file, overrides)
    if not arguments.allow_partial:
        require_weights(cfg, arguments.weights, "export (--allow-partial exports random ones)")
    predictor = Predictor(
        cfg,
        arguments.weights,
        allow_partial=arguments.allow_partial,
        overrides=overrides,
        dtype="float32",
        # Normalisation of its own would lose another 8 bits after each convolution.
        optimize=arguments.int8,
        classes=None if arguments.classes is None else classes_option(arguments.classes),
    )
    # Read before the network is traced, which takes its time.
    images = calibration_images(files, predictor) if arguments.int8 else []
    print(*run(predictor, arguments.format, arguments.output), sep="\n")
    if arguments.int8:
        print(to_int8(arguments.output, predictor, images, arguments.keep_float))
    return 0


def _calibration_files(arguments: argparse.Namespace) -> list[str]:
    """Files of ``--calibrate``; none without ``--int8``.

    Raises:
        ConfigError: options that do not go together, or no such folder or data set.
    """
    from pathlib import Path

    from instseg.data.build import register_dataset
    from instseg.data.dataset import load
    from instseg.data.suffixes import IMAGE_SUFFIXES
    from instseg.errors import ConfigError

    if not arguments.int8:
        if arguments.calibrate or arguments.keep_float:
            raise ConfigError("--calibrate and --keep-float go with --int8")
        return []
    if arguments.format != "onnx":
        raise ConfigError(f"--int8 goes with --format onnx, not with {arguments.format}")
    if not arguments.calibrate:
        raise ConfigError(
            "--int8 needs --calibrate: a folder of images such as the network will see, or a data "
            "set such as coco:PATH.json:FOLDER"
        )
    if arguments.calibration_images < 1:
        raise ConfigError(
            f"--calibration-images is {arguments.calibration_images}; expected at least 1"
        )
    folder = Path(arguments.calibrate)
    if folder.is_dir():
        files = sorted(str(x) for x in folder.iterdir() if x.suffix.lower() in IMAGE_SUFFIXES)
    else:
        register_dataset(arguments.calibrate)
        files = [str(record["file_name"]) for record in load(arguments.calibrate).records]
    step = max(len(files) / arguments.calibration_images, 1)
    return [files[int(i * step)] for i in range(min(arguments.calibration_images, len(files)))]
