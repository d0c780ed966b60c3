"""Configuration keys of YOLACT++; defaults are the authors' for ResNet-50."""

from detectron2.config import CfgNode

from instseg.config.rules import COUNT, Rule, declare, one_of, several, where, whole


def add_yolact_plus_config(cfg: CfgNode) -> None:
    """Add what YOLACT++ has beyond ``MODEL.YOLACT``."""
    cfg.MODEL.YOLACT_PLUS = CfgNode()
    node = cfg.MODEL.YOLACT_PLUS
    # Blocks at the end of res2..res5 whose 3x3 convolution is deformable (section 6.2) ...
    node.DEFORMABLE_BLOCKS = [0, 4, 6, 3]
    # ... and of these only every DEFORMABLE_INTERVAL-th, counted from the first block of the stage.
    node.DEFORMABLE_INTERVAL = 1
    # Channels of the 3x3 convolutions of stride 2 of the re-scoring network (section 6.1).
    node.MASKIOU_CHANNELS = [8, 16, 32, 64, 128]
    # Weight of its loss.
    node.MASKIOU_WEIGHT = 25.0
    # It trains on masks of more prototype pixels than this.
    node.MASKIOU_MIN_AREA = 25


def _maskiou_channels(cfg: CfgNode) -> Rule:
    size = cfg.INPUT.SQUARE_SIZE
    side, max_layers = 2 * -(-size // 8), 0
    while (side := (side - 1) // 2) >= 1:
        max_layers += 1
    return Rule(
        lambda x: len(x) <= max_layers,
        f"at most {max_layers} layers, as each halves the prototypes of INPUT.SQUARE_SIZE {size} "
        "without padding",
    )


declare(
    "MODEL.YOLACT_PLUS",
    {
        "DEFORMABLE_BLOCKS": several(whole(0), "a number for each of res2..res5", 4, 4),
        "DEFORMABLE_INTERVAL": COUNT,
        "MASKIOU_CHANNELS": where("MODEL.META_ARCHITECTURE", "YOLACTPlus", _maskiou_channels),
    },
)
_BACKBONE = "build_deformable_resnet_backbone"
declare(
    "MODEL.RESNETS",
    {
        "DEPTH": where(
            "MODEL.BACKBONE.NAME",
            _BACKBONE,
            one_of(50, 101, 152, reason=f", as {_BACKBONE} needs bottleneck blocks"),
        ),
        "RES5_DILATION": where(
            "MODEL.BACKBONE.NAME",
            _BACKBONE,
            one_of(1, reason=f", as {_BACKBONE} knows no dilation"),
        ),
    },
)
