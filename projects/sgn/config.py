"""Configuration keys of SGN; the README tells the paper's choices from ours."""

from detectron2.config import CfgNode

from instseg.config.rules import COUNT, declare, number, one_of, some_of, whole

STAGES = ("breakpoints", "lines", "merger")
SOURCES = {
    "SEMANTIC": ("own", "truth", "files"),
    "BREAKPOINTS_TEST": ("own", "truth"),
    "LINKS_TEST": ("own", "breakpoints", "truth"),
    "MERGES_TEST": ("own", "none", "truth"),
}
"""Where the result of each stage may come from, by the key under ``MODEL.SGN``."""


def add_sgn_config(cfg: CfgNode) -> None:
    """Add the keys of :class:`SGN`; ``TEST.DETECTIONS_PER_IMAGE`` is used too."""
    cfg.MODEL.SGN = CfgNode()
    node = cfg.MODEL.SGN
    # Classes, without the background.
    node.NUM_CLASSES = 8

    # Networks to train: "breakpoints" (with the semantic head), "lines", "merger"; the others keep
    # their weights.  Each learns on the results of those before it.
    node.STAGES = ["breakpoints", "lines", "merger"]
    # The semantic map: the network's "own", the "truth" of the annotations, or "files"
    # (INPUT.SEMANTIC_ROOT).
    node.SEMANTIC = "own"
    # Breakpoints, links and merges of each stage when predicting: the network's "own" or the
    # "truth"; links also from "breakpoints" without LineNet, merges also "none".  With any truth
    # INPUT.TRUTH_TEST has to be set.
    node.BREAKPOINTS_TEST = "own"
    node.LINKS_TEST = "own"
    node.MERGES_TEST = "own"

    # True: lines end where the class changes, so an instance has one class.  False: all foreground
    # is grouped, and an instance gets the mean class of its pixels.
    node.CLASS_AWARE = True

    # Channels of the decoder and its normalisation ("" is none).
    node.CHANNELS = 128
    node.NORM = ""
    # Channels of a map of stride 1 made from the image itself; 0 keeps the finest stride of the
    # backbone.
    node.DETAIL_CHANNELS = 0
    # Factor on the learning rate of the breakpoint network without its backbone.
    node.HEAD_LR_FACTOR = 1.0
    # Pixels per cell of the maps for lines; the network's maps are resized to it.
    node.OUTPUT_STRIDE = 1
    # Weights of the semantic map's cross entropy and Dice loss; short trainings need Dice.
    node.SEMANTIC_WEIGHT = 1.0
    node.DICE_WEIGHT = 0.0
    # Pixels by which breakpoints are wider than one, towards the inside of their instance.
    node.WIDENING = 1
    # A breakpoint needs more than this probability of START and END together.
    node.BREAKPOINT_THRESH_TEST = 0.5

    # Channels of LineNet.
    node.LINE_CHANNELS = 32
    # "rows" joins the lines of successive rows, "columns" those of successive columns.
    node.LINES = "rows"
    # Lines are joined if the mean link over their shared columns is above this.
    node.LINK_THRESH_TEST = 0.5

    # Least area of components that may be merged, in cells of the maps.
    node.MERGE_MIN_AREA = 50
    # Number of components that may be merged, the largest ones; bounds the cost of a noisy image.
    node.MERGE_MAX_COMPONENTS = 1000
    # Largest gap between their boxes, as a share of their longest side.
    node.MERGE_MAX_GAP = 0.5
    # Each component is compared with this many nearest ones.
    node.MERGE_PARTNERS = 10
    # Training pairs of MergerNet per batch, at most half of each kind.
    node.MERGE_PAIRS_TRAIN = 64
    # Components are merged above this probability.
    node.MERGE_THRESH_TEST = 0.5

    # Instances of fewer cells of the maps are dropped.
    node.MIN_AREA_TEST = 50
    # Give the semantic probabilities as "sem_seg" too; "semantic" in TEST.METRICS needs them.
    node.SEMANTIC_TEST = False


_PROBABILITY = number(0, 1, "a probability")

declare("MODEL.SGN", {key: one_of(*values) for key, values in SOURCES.items()})
declare(
    "MODEL.SGN",
    {
        "NUM_CLASSES": COUNT,
        "STAGES": some_of(*STAGES),
        "CHANNELS": COUNT,
        "DETAIL_CHANNELS": whole(0),
        "OUTPUT_STRIDE": one_of(1, 2, 4, 8),
        "WIDENING": whole(0),
        "BREAKPOINT_THRESH_TEST": _PROBABILITY,
        "LINE_CHANNELS": COUNT,
        "LINES": one_of("rows", "columns"),
        "LINK_THRESH_TEST": _PROBABILITY,
        "MERGE_MIN_AREA": whole(0),
        "MERGE_MAX_COMPONENTS": COUNT,
        "MERGE_MAX_GAP": number(0),
        "MERGE_PARTNERS": COUNT,
        "MERGE_PAIRS_TRAIN": whole(2, expected="at least 2, one of each kind"),
        "MERGE_THRESH_TEST": _PROBABILITY,
        "MIN_AREA_TEST": whole(0),
    },
)
