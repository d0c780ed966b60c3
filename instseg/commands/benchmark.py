"""``instseg benchmark``: speed and memory against a named peer."""

import argparse

from instseg.commands.arguments import (
    add_allow_partial,
    add_config_arguments,
    add_model_arguments,
    path,
)


def add_models_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``, and the function that runs it."""
    parser.description = (
        "Compares instseg's Predictor with Detectron2's stock DefaultPredictor on the same network "
        "and images.  Ratios are peer / ours: above 1, instseg is ahead.  "
        "--config-file and --model may be repeated."
    )
    add = parser.add_argument
    add_config_arguments(parser, action="append")
    add("--input", nargs="+", default=[], metavar="FILE", help="images; default synthetic ones")
    add("--test-set", action="store_true", help="the first eight images of DATASETS.TEST instead")
    add(
        "--variant",
        action="append",
        metavar="NAME",
        help="eager (the default), folded (batch normalisation folded, channels last), bf16 "
        "(folded, in bfloat16), compiled (folded and run through torch.compile), onnx (exported), "
        "int8 (exported in 8 bits, calibrated on the images), openvino, openvino_bf16 or "
        "openvino_int8 (the same files in OpenVINO); may be repeated, one row for each",
    )
    add(
        "--peak",
        action="store_true",
        help="also measure the fastest convolution in each number type, and which share of it each "
        "network reaches, on the CPU",
    )
    add(
        "--authors",
        metavar="NAME=FOLDER",
        help="also compare with the authors' code of a paper in a checkout, with random weights "
        "on the CPU (needs MODEL.WEIGHTS '' and MODEL.DEVICE cpu)",
    )
    add("--repeats", type=int, default=6, metavar="N", help="passes (default %(default)s)")
    add("--json", type=path, metavar="FILE", help="write the rows as a JSON list")
    add_allow_partial(parser)
    add("overrides", nargs="*", metavar="KEY VALUE", help="configuration overrides, last")
    parser.set_defaults(run=models)


def add_ops_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``, and the function that runs it."""
    parser.description = (
        "Compares each compiled operator with a composition of common operators that computes the "
        "same, on the same input.  Ratios are peer / ours: above 1, instseg is ahead.  floor_ms "
        "is the time to move the bytes of input and output."
    )
    add = parser.add_argument
    add("--device", default="cpu", metavar="DEVICE", help="cpu or cuda (default %(default)s)")
    add("--repeats", type=int, default=5, metavar="N", help="calls (default %(default)s)")
    add("--op", action="append", metavar="NAME", help="only this row; may be repeated")
    add("--json", type=path, metavar="FILE", help="write the rows as a JSON list")
    parser.set_defaults(run=ops)


def add_tiles_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of the command and what it runs."""
    parser.description = (
        "Compares instseg's prediction by tiles with the slicing of other packages, with the same "
        "model on the same image: time, peak memory and F1 at IoU 0.5.  Ratios are peer / ours: "
        "above 1 is ahead."
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add("--input", required=True, metavar="FILE", help="image, such as one of tools/mosaic.py")
    add("--truth", required=True, metavar="FILE", help="its ground truth in COCO's format")
    add("--tile", type=int, default=1024, metavar="N", help="pixels (default %(default)s)")
    add("--overlap", type=int, default=128, metavar="N", help="pixels (default %(default)s)")
    add("--confidence", type=float, default=0.5, metavar="SCORE", help="default %(default)s")
    add(
        "--peer",
        action="append",
        metavar="NAME",
        help="sahi, supervision (InferenceSlicer with compact masks) or supervision-dense, whose "
        "masks take the size of the image each; may be repeated (default: the first two)",
    )
    add("--json", type=path, metavar="FILE", help="write the rows as a JSON list")
    parser.set_defaults(run=tiles)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``, and the function that runs it."""
    parser.description = (
        "Compares steps of instseg's trainer with those of Detectron2's stock DefaultTrainer on "
        "the same network and images, where that can train it.  Ratios are peer / ours: above 1, "
        "instseg is ahead."
    )
    add = parser.add_argument
    add(
        "--config-file",
        action="append",
        default=[],
        metavar="FILE",
        help="may be repeated (default: the example of each system)",
    )
    add("--iterations", type=int, default=20, metavar="N", help="steps (default %(default)s)")
    add("--json", type=path, metavar="FILE", help="write the rows as a JSON list")
    add("overrides", nargs="*", metavar="KEY VALUE", help="configuration overrides, last")
    parser.set_defaults(run=train)


def models(arguments: argparse.Namespace) -> int:
    """``instseg benchmark models``."""
    from instseg.benchmark import benchmark_models as run
    from instseg.benchmark import report

    rows = run(
        arguments.config_file,
        arguments.input,
        arguments.overrides,
        arguments.repeats,
        arguments.variant or ["eager"],
        allow_partial=arguments.allow_partial,
        test_set=arguments.test_set,
        peak=arguments.peak,
        authors=arguments.authors,
    )
    print(report(rows, arguments.json))
    return 0


def ops(arguments: argparse.Namespace) -> int:
    """``instseg benchmark ops``."""
    from instseg.benchmark import benchmark_ops as run
    from instseg.benchmark import report

    rows = run(arguments.device, arguments.repeats, arguments.op)
    print(report(rows, arguments.json))
    return 0


def tiles(arguments: argparse.Namespace) -> int:
    """``instseg benchmark tiles``."""
    from instseg.benchmark import benchmark_tiles as run
    from instseg.benchmark import report

    weights = []
    if arguments.weights:  # not those that the checksum of the configuration belongs to
        weights = ["MODEL.WEIGHTS", arguments.weights, "MODEL.WEIGHTS_SHA256", ""]
    rows = run(
        arguments.config_file,
        arguments.input,
        arguments.truth,
        tile=arguments.tile,
        overlap=arguments.overlap,
        confidence=arguments.confidence,
        peers=arguments.peer or ["sahi", "supervision"],
        overrides=[*weights, *arguments.overrides],
        allow_partial=arguments.allow_partial,
    )
    print(report(rows, arguments.json))
    return 0


def train(arguments: argparse.Namespace) -> int:
    """``instseg benchmark train``."""
    from instseg.benchmark import benchmark_train as run
    from instseg.benchmark import report

    rows = run(arguments.config_file, arguments.overrides, arguments.iterations)
    print(report(rows, arguments.json))
    return 0
