"""Configuration keys of DeepMask; defaults are those of the released network (ResNet-50)."""

from detectron2.config import CfgNode

from instseg.config.rules import (
    FRACTION,
    Rule,
    declare,
    number,
    one_of,
    several,
    some_of,
    where,
    whole,
)


def add_deepmask_config(cfg: CfgNode) -> None:
    """Add ``MODEL.DEEPMASK``; the trunk of the first paper is ``MODEL.VGG``.

    "Pixels" are those of a resized patch or image, as the network sees it.
    """
    cfg.MODEL.DEEPMASK = CfgNode()
    # Side in pixels of the window that gets a mask, a multiple of the stride of IN_FEATURE (224 in
    # DeepMask, section 3; 160 in SharpMask, section 4).
    cfg.MODEL.DEEPMASK.PATCH_SIZE = 160
    # Pixels around the window that the trunk sees in training; their cells are cut off afterwards.
    cfg.MODEL.DEEPMASK.CONTEXT = 16
    # Longer side in pixels of the instance that fits the window best; 0 is PATCH_SIZE * 128 / 224,
    # rounded up (section 4: 128 of 224 pixels).
    cfg.MODEL.DEEPMASK.OBJECT_SIZE = 0
    # Side in pixels of the mask of a window (section 3).
    cfg.MODEL.DEEPMASK.MASK_SIZE = 56
    # Side of the mask in training; the predicted mask is enlarged to it.
    cfg.MODEL.DEEPMASK.TRAIN_MASK_SIZE = 112
    # Output of the backbone that the heads work on.
    cfg.MODEL.DEEPMASK.IN_FEATURE = "res4"
    # Channels of the 1x1 convolution after the trunk.
    cfg.MODEL.DEEPMASK.FEATURE_DIM = 128
    # Rank of the mask layer, the vector that stands for a window (section 3: 512).
    cfg.MODEL.DEEPMASK.EMBEDDING_DIM = 512
    # "shared": the vector gives the scores too, as released; "pooled": the trunk gives them, by a
    # pooling and a layer of EMBEDDING_DIM units of their own, as in the first paper.
    cfg.MODEL.DEEPMASK.SCORE_BRANCH = "shared"
    # Units of the last hidden layer of the score (section 3).
    cfg.MODEL.DEEPMASK.SCORE_DIM = 1024
    # Probability that a unit of the score's layers is dropped in training (section 3).
    cfg.MODEL.DEEPMASK.DROPOUT = 0.5
    # Lambda: weight of a patch's score against the mean over the pixels of a mask (section 3,
    # equation 1).
    cfg.MODEL.DEEPMASK.SCORE_WEIGHT = 1 / 32
    # Share of batches that train the score; the others train the mask.
    cfg.MODEL.DEEPMASK.SCORE_FRACTION = 0.5
    # Largest distance in pixels, along either axis, of a training window from its instance.
    cfg.MODEL.DEEPMASK.SHIFT = 16.0
    # Largest distance in octaves of an instance from OBJECT_SIZE.
    cfg.MODEL.DEEPMASK.SCALE_JITTER = 0.25
    # Scales at which an image is searched, in octaves: 2^-2.5 to 2^0.5 of its size.
    # INPUT.MAX_SIZE_TEST limits the longer side.
    cfg.MODEL.DEEPMASK.OCTAVES_TEST = (-2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5)
    # Probability above which a pixel belongs to the mask (section 5: 0.2 on COCO, 0.1 on PASCAL).
    cfg.MODEL.DEEPMASK.MASK_THRESH_TEST = 0.2


declare(
    "MODEL.DEEPMASK",
    {
        "OBJECT_SIZE": whole(0, expected="pixels, or 0 for the share of PATCH_SIZE"),
        "MASK_SIZE": whole(2),
        "TRAIN_MASK_SIZE": whole(2),
        "SCORE_BRANCH": one_of("shared", "pooled"),
        "SCORE_FRACTION": FRACTION,
        "SHIFT": number(0, expected="pixels, at least 0"),
        "SCALE_JITTER": number(0, expected="octaves, at least 0"),
        "OCTAVES_TEST": several(number(), "one number or more"),
        "MASK_THRESH_TEST": Rule(lambda x: 0 < x < 1, "a probability between 0 and 1"),
    },
)
_BACKBONE = "build_symmetric_resnet_backbone"
declare(
    "",
    {
        "TEST.DETECTIONS_PER_IMAGE": where(
            "MODEL.META_ARCHITECTURE", "DeepMask", whole(1, expected="at least 1, for DeepMask")
        ),
        "INPUT.RANDOM_FLIP": where(
            "INPUT.SAMPLES", "PatchSamples", one_of("none", "horizontal", reason=" for patches")
        ),
        "MODEL.RESNETS.DEPTH": where("MODEL.BACKBONE.NAME", _BACKBONE, one_of(18, 34, 50, 101)),
        "MODEL.RESNETS.OUT_FEATURES": where(
            "MODEL.BACKBONE.NAME", _BACKBONE, some_of("conv1", "res2", "res3", "res4")
        ),
    },
)
