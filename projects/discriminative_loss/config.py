"""Configuration keys of the discriminative loss; defaults are the paper's for Cityscapes."""

from detectron2.config import CfgNode

from instseg.config.rules import COUNT, POSITIVE, declare, number, one_of, whole


def add_discriminative_loss_config(cfg: CfgNode) -> None:
    """Add the keys of :class:`DiscriminativeLoss`; ``TEST.DETECTIONS_PER_IMAGE`` is used too."""
    cfg.MODEL.DISCRIMINATIVE_LOSS = CfgNode()
    node = cfg.MODEL.DISCRIMINATIVE_LOSS
    # Classes, without the background.
    node.NUM_CLASSES = 8

    # "backbone" (MODEL.BACKBONE and a decoder), "enet", or Wizaron's "reseg" or "hourglass".
    node.NETWORK = "backbone"
    # Dimension of the embedding: 8 on Cityscapes, 16 on CVPPP (section 4).
    node.EMBEDDING_DIM = 8
    # Channels of the decoder of "backbone", and its normalisation ("" is none).
    node.CHANNELS = 128
    node.NORM = "BN"
    # With "backbone": channels of a map of stride 2 made from the image itself, for sharp borders;
    # 0 keeps the finest stride of the backbone.
    node.DETAIL_CHANNELS = 0
    # Show coordinates to the convolutions of "reseg" and "hourglass".
    node.COORDINATES = False
    # Pixels per unit of the position that is added to the first two dimensions of a pixel's
    # embedding; 0 is off, as in the paper.  Positions tell like instances far apart from each
    # other, so the network need not.
    node.POSITION_SCALE = 0.0
    # Pixels per cell of the maps for losses and clustering; the network's maps are resized to it.
    node.OUTPUT_STRIDE = 1

    # Margins: pixels within DELTA_VAR of their instance's mean cost nothing, and neither do means
    # 2 DELTA_DIST apart (equations 1 and 2).
    node.DELTA_VAR = 0.5
    node.DELTA_DIST = 1.5
    # "L1" or "L2".
    node.NORM_TYPE = "L2"
    # Mean of the variance term: over the instances' means ("instance", equation 1) or over all
    # their pixels ("pixel", Wizaron's code; large instances weigh more).
    node.VARIANCE_MEAN = "instance"
    # Weights alpha, beta, gamma of variance, distance and regulariser (equation 4).
    node.VARIANCE_WEIGHT = 1.0
    node.DISTANCE_WEIGHT = 1.0
    node.REGULARISER_WEIGHT = 0.001
    # Weights of the semantic map's cross entropy and Dice loss, and of the squared error of the
    # number of instances, which "reseg" and "hourglass" predict.
    node.SEMANTIC_WEIGHT = 1.0
    node.DICE_WEIGHT = 0.0
    node.COUNT_WEIGHT = 1.0
    # Number of instances that those networks express as 1.
    node.MAX_COUNT = 20

    # "mean_shift" (section 3.4), or "k_means" with the number of instances that the network
    # predicts or an input gives as "num_instances".
    node.CLUSTERING = "mean_shift"
    # Radius of an instance in the embedding; 0 is DELTA_DIST, as in the companion paper's code.
    node.BANDWIDTH_TEST = 0.0
    # Instances of fewer pixels of the map are dropped (companion code: those of up to 10).
    node.MIN_PIXELS_TEST = 11
    # Give the semantic probabilities as "sem_seg" too; "semantic" in TEST.METRICS needs them.
    node.SEMANTIC_TEST = False


declare(
    "MODEL.DISCRIMINATIVE_LOSS",
    {
        "NUM_CLASSES": COUNT,
        "NETWORK": one_of("backbone", "enet", "reseg", "hourglass"),
        "EMBEDDING_DIM": whole(2),
        "POSITION_SCALE": number(0, expected="pixels per unit, or 0"),
        "OUTPUT_STRIDE": one_of(1, 2, 4, 8),
        "DELTA_VAR": number(0),
        "DELTA_DIST": POSITIVE,
        "NORM_TYPE": one_of("L1", "L2"),
        "VARIANCE_MEAN": one_of("instance", "pixel"),
        "MAX_COUNT": COUNT,
        "CLUSTERING": one_of("mean_shift", "k_means"),
        "BANDWIDTH_TEST": number(0),
        "MIN_PIXELS_TEST": COUNT,
    },
)
