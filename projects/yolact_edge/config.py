"""Configuration keys of YolactEdge; defaults are the authors' for video."""

from detectron2.config import CfgNode

from instseg.config.rules import COUNT, Rule, declare, one_of, several


def add_yolact_edge_config(cfg: CfgNode) -> None:
    """Add what YolactEdge has beyond ``MODEL.YOLACT``, and its MobileNetV2."""
    cfg.MODEL.YOLACT_EDGE = CfgNode()
    node = cfg.MODEL.YOLACT_EDGE
    # Modules to train: "image" (all but those for frames between key frames), "flow" (the flow
    # network alone, on known flow) or "joint" (both together), in this order (section III-C).
    node.STAGE = "joint"
    # Keep the backbone and the lateral layers as the stage "image" left them during "joint"; off
    # trains all of the network at once, for small data sets.
    node.FREEZE = True
    # Frames from one key frame to the next (section III-B).
    node.KEYFRAME_INTERVAL = 5
    # Levels taken over from the key frame, the coarsest ones: ["p5"], ["p4", "p5"] or
    # ["p3", "p4", "p5"]; the others are computed (section III-B, table IV).
    node.WARPED = ["p4", "p5"]
    # Channels of the first stage of the flow network, doubled by each of the two others ...
    node.FLOW_CHANNELS = 64
    # ... and those of the layers inside each stage, in multiples of that (figure 4).
    node.FLOW_LAYERS = [[1], [2], [4]]
    # Correct the levels taken over by a layer that sees the frame itself (authors' code).
    node.REFINE = True
    # Weight of the distance between levels taken over and computed (authors' code); 0.0 is off.
    node.WARP_WEIGHT = 1.0
    # Weight of the end-point error of the flow, in the stage "flow".
    node.FLOW_WEIGHT = 1.0

    cfg.MODEL.MOBILENET = CfgNode()
    # Factor on the channels of MobileNetV2 (its section 4).
    cfg.MODEL.MOBILENET.WIDTH = 1.0
    # Normalisation after every convolution; "FrozenBN" for batches of few images.
    cfg.MODEL.MOBILENET.NORM = "BN"


_LEVELS = ("p3", "p4", "p5")

declare(
    "MODEL.YOLACT_EDGE",
    {
        "STAGE": one_of("image", "flow", "joint"),
        "KEYFRAME_INTERVAL": COUNT,
        "WARPED": Rule(
            lambda x: len(x) > 0 and tuple(x) == _LEVELS[-len(x) :],
            "the coarsest levels: ['p5'], ['p4', 'p5'] or ['p3', 'p4', 'p5']",
        ),
        "FLOW_LAYERS": several(several(COUNT, "", 0), "3 lists, for P3, P4, P5", 3, 3),
    },
)
