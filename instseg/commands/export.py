"""``instseg export``: the network of a model as ONNX or torch.export."""

import argparse

from instseg.commands.arguments import add_classes_argument, add_model_arguments, path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``, and the function that runs it."""
    parser.description = (
        "Writes the network, from a batch of normalised square images to the outputs of the head; "
        "instseg.export.ExportedPredictor does the rest.  Prints the files written."
    )
    add_model_arguments(parser)
    add_classes_argument(parser)
    add = parser.add_argument
    add("--format", required=True, metavar="FORMAT", help="onnx or torch_export")
    add("--output", required=True, type=path, metavar="FILE", help="NAME.onnx or NAME.pt2")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """``instseg export``."""
    from instseg.config.classes import classes_option
    from instseg.config.nodes import load_cfg
    from instseg.export import export as run
    from instseg.inference.predictor import Predictor, require_weights

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
        classes=None if arguments.classes is None else classes_option(arguments.classes),
    )
    print(*run(predictor, arguments.format, arguments.output), sep="\n")
    return 0
