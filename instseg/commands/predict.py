"""``instseg predict``: instances in images and videos."""

import argparse

from instseg.commands.arguments import (
    add_classes_argument,
    add_format_argument,
    add_model_arguments,
    path,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``, and the function that runs it."""
    parser.description = (
        "Writes predictions.json for images (COCO results with RLE masks) with their classes and "
        "image ids in categories.json, NAME.json for each video (the same by frame), an overlay "
        "per image or video, and on request one PNG per instance.  --format writes the results of "
        "images for other programs.  Exit status 1 if some input "
        "could not be used completely."
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add_classes_argument(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        default=[],
        nargs="+",
        metavar="INPUT",
        help="images, videos, folders, numbered images such as frames_%%05d.png, http:// or "
        "rtsp:// addresses, or the number of a camera",
    )
    source.add_argument(
        "--images-of",
        metavar="NAME",
        help="the images of a data set, such as coco:PATH.json:FOLDER, with its image ids",
    )
    add(
        "--output",
        required=True,
        type=path,
        metavar="DIR",
        help="folder of the results, created if missing",
    )
    add(
        "--confidence",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="instances with a lower score are left out (default %(default)s)",
    )
    add(
        "--rank-by",
        default="class",
        metavar="SCORE",
        help="the score of an instance: class or, for models that score masks, mask (default "
        "%(default)s)",
    )
    add_format_argument(parser, "--format", default="coco")
    add("--polygons", action="store_true", help="masks as polygons, not RLE; holes are filled")
    add(
        "--pages",
        metavar="PAGES",
        help="of TIFF stacks: all, a number from 0 on, or A:B (A to B - 1); each is an image, and "
        "with --track a frame of one video",
    )
    add("--no-overlay", action="store_true", help="no overlay images and videos")
    add(
        "--labels",
        default="auto",
        metavar="WHICH",
        help="labels in overlays: auto, those that cover no other instance; all; none, also no "
        "counts (default %(default)s)",
    )
    add(
        "--fill",
        type=float,
        default=0.25,
        metavar="OPACITY",
        help="of the colour inside outlines in overlays, 0 to 1 (default %(default)s)",
    )
    add(
        "--dtype",
        metavar="TYPE",
        help="number type of the network: float32, bfloat16, faster on processors with "
        "avx512_bf16 or AMX, or auto, bfloat16 where it is faster and gives nearly the same "
        "(default: MODEL.DTYPE_TEST)",
    )
    add("--instance-masks", action="store_true", help="one black and white PNG per instance")
    add(
        "--keyframe-interval",
        type=int,
        metavar="N",
        help="a video model computes every N-th frame in full (default: the configuration's)",
    )
    _add_tracking(parser)
    add(
        "--fps",
        type=float,
        metavar="N",
        help="frames per second of images that form a video (default 25)",
    )
    add("--recursive", action="store_true", help="search the folders inside folders as well")
    add(
        "--resume",
        action="store_true",
        help="go on with unfinished videos and, with --tile, images; redo other images",
    )
    _add_tiles(parser)
    parser.set_defaults(run=run)


def _add_tiles(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tile",
        type=int,
        metavar="N",
        help="predict large images by tiles of N pixels a side, such as 1024; each tile is resized "
        "as an image, and TEST.DETECTIONS_PER_IMAGE is its limit",
    )
    parser.add_argument(
        "--overlap",
        type=int,
        metavar="N",
        help="pixels that neighbouring tiles share (default: the largest instance of the training "
        "and 16 pixels on both sides)",
    )


def _add_tracking(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--track",
        action="store_true",
        help="number the instances of videos over time; a folder of images is then a video",
    )
    add("--tracker", metavar="NAME", help="sort (default) or bytetrack")
    add(
        "--track-patience",
        type=int,
        metavar="N",
        help="frames for which an instance may be hidden (default 10)",
    )
    add(
        "--track-min-iou",
        type=float,
        metavar="IOU",
        help="least IoU with the predicted box of an instance (default: the tracker's)",
    )


def run(arguments: argparse.Namespace) -> int:
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
            labels=arguments.labels,
            fill=arguments.fill,
            instance_masks=arguments.instance_masks,
            allow_partial=arguments.allow_partial,
            dtype=arguments.dtype,
            keyframe_interval=arguments.keyframe_interval,
            track=arguments.track,
            tracker=arguments.tracker,
            track_patience=arguments.track_patience,
            track_min_iou=arguments.track_min_iou,
            fps=arguments.fps,
            recursive=arguments.recursive,
            resume=arguments.resume,
            tile=arguments.tile,
            overlap=arguments.overlap,
            images_of=arguments.images_of,
            classes=arguments.classes,
            rank_by=arguments.rank_by,
            polygons=arguments.polygons,
            format=arguments.format,
            pages=arguments.pages,
            overrides=arguments.overrides,
        )
    )
