"""The keys of instseg that all papers share, and the rules for them and for Detectron2's keys."""

import re

from detectron2.config import CfgNode

from instseg.config.augmentation import add_augmentation_config
from instseg.config.classes import configured_categories
from instseg.config.rules import (
    COUNT,
    FRACTION,
    POSITIVE,
    Dependent,
    Rule,
    declare,
    is_number,
    is_whole,
    number,
    one_of,
    ordered,
    several,
    some_of,
    where,
    whole,
)
from instseg.data.intensity import CHANNELS, NORMALIZATIONS
from instseg.data.sampling import GROUPED
from instseg.data.synthetic import shapes
from instseg.data.synthetic.files import SIZES
from instseg.data.video_mapper import NUM_REFERENCES
from instseg.modeling.augmented import check_augmentation

_OLD_METRICS = {
    "PROPOSALS": "proposals",
    "CONTEST_METRIC": "contest",
    "VOC_METRIC": "voc",
    "TRACK_METRIC": "tracks",
    "LEAF_METRIC": "leaves",
    "SEMANTIC_METRIC": "semantic",
}
"""Keys that ``TEST.METRICS`` replaced → their names in it."""


def rename_keys(cfg: CfgNode) -> None:
    """Make ``cfg`` refuse keys of earlier versions and say what to write instead."""
    for key, name in _OLD_METRICS.items():
        cfg.register_renamed_key(f"TEST.{key}", "TEST.METRICS", f"name {name!r} in it")


def take_old_keys(loaded: CfgNode) -> None:
    """Convert the old keys in the ``config.yaml`` of an earlier version's run, in place.

    Such a file has all old keys.  A file that somebody wrote has only some, and is refused.
    """
    test = loaded.get("TEST")
    if isinstance(test, dict) and _OLD_METRICS.keys() <= test.keys() and "METRICS" not in test:
        names = [name for key, name in _OLD_METRICS.items() if test.pop(key)]
        test["METRICS"] = tuple(names if "proposals" in names else ("coco", *names))


def add_shared_config(cfg: CfgNode) -> None:
    """Add the shared keys to ``cfg``, with their defaults."""
    # SHA-256 that the file MODEL.WEIGHTS must have; "" does not check, so that a file of hf:// or
    # https:// is refused.
    cfg.MODEL.WEIGHTS_SHA256 = ""
    # The classes of the model, [{"id": ..., "name": ...}, ...] in the order of their numbers.
    # Results get their category ids and names from here if the weights have none. Training writes
    # it into its config.yaml; [] is unknown.
    cfg.MODEL.CATEGORIES = []
    # Side in pixels of the images of the built-in shapes_* data sets.
    cfg.DATASETS.SHAPES_SIZE = shapes.DEFAULT_SIZE
    # Training images that each loader process may find missing or unreadable, and replace by the
    # last good one that it read, before it stops training; 0 stops at the first.
    cfg.DATALOADER.MAX_UNREADABLE = 0
    # DATALOADER.SAMPLER_TRAIN GroupedTrainingSampler draws from n images with the same "group" in
    # their COCO entry, or else of the same size, in proportion to n to this power: 1 as often as
    # they occur, 0 from all groups alike; see instseg/data/sampling.py.
    cfg.DATALOADER.GROUP_POWER = 0.5
    # MiB of decoded training images that each loader process keeps in memory; 0 is off.
    cfg.DATALOADER.CACHE_MIB = 128
    # "SGD" (momentum, as in Detectron2) or "AdamW" (SOLVER.WEIGHT_DECAY decoupled, betas 0.9,
    # 0.999).
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Number type under SOLVER.AMP.ENABLED: "float16" (with loss scaling, CUDA only) or "bfloat16".
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Batches of SOLVER.IMS_PER_BATCH images whose gradients make one step; 1 is off.
    cfg.SOLVER.ACCUMULATE_BATCHES = 1
    # Order of the numbers of weights and feature maps in training: "channels_last", "contiguous"
    # (channels first) or "auto": "channels_last" on a CPU with AVX-512, else "contiguous". Weights
    # of any order go on in any other.
    cfg.SOLVER.MEMORY_FORMAT = "auto"
    cfg.SOLVER.EMA = CfgNode()
    # Evaluate and save an exponential moving average of the weights; see
    # instseg/training/averaging.py.
    cfg.SOLVER.EMA.ENABLED = False
    # Share of the average that stays at each step; lower in the first 9 / (1 - DECAY) steps.
    cfg.SOLVER.EMA.DECAY = 0.9998
    add_augmentation_config(cfg)
    # How pixels of any depth become 0 to 255: "none" (8 bits only), "percentile" (of each image and
    # channel) or "range" (the same in all images); see instseg/data/intensity.py.
    cfg.INPUT.NORMALIZE = "none"
    # What becomes 0 and 255: percentiles, or for "range" values of pixels, such as (100.0, 4000.0).
    cfg.INPUT.NORMALIZE_RANGE = (1.0, 99.8)
    # Channels of the file, counted from 0, that take the places of red, green and blue (one for
    # INPUT.FORMAT L); a channel may be repeated: (0, 0, 1). () takes grey or colours as they are.
    cfg.INPUT.CHANNELS = ()
    # What happens to training images: "detectron2" (INPUT.MIN_SIZE_TRAIN, INPUT.CROP) or "ssd"
    # (colours, expansion, crop, stretching to a square; see instseg/data/augmentations.py). Both
    # follow INPUT.RANDOM_FLIP and the keys of instseg/config/augmentation.py.
    cfg.INPUT.AUGMENTATION = "detectron2"
    # Samples that a project draws for training in place of whole images; "" is off.
    cfg.INPUT.SAMPLES = ""
    # Side in pixels of the square that "ssd" and models of one input size stretch images to.
    cfg.INPUT.SQUARE_SIZE = 0
    # Whether "ssd" changes brightness, contrast, saturation and hue.
    cfg.INPUT.SSD_COLORS = True
    # Whether "ssd" crops around an instance.
    cfg.INPUT.SSD_CROP = True
    # Largest factor by which "ssd" expands the canvas around an image; 1.0 is off.
    cfg.INPUT.SSD_EXPAND_RATIO = 4.0
    # Colour of the canvas, in the order of INPUT.FORMAT; none is MODEL.PIXEL_MEAN.
    cfg.INPUT.SSD_EXPAND_COLOR = []
    # Folder with a semantic map NAME.png for each image NAME, labels 0 for background, class + 1,
    # 255 for neither; models that can use one get it as "sem_seg".  "" is none.
    cfg.INPUT.SEMANTIC_ROOT = ""
    # Give models the annotations of test images too: for stages that use the ground truth in place
    # of the stage before them, never for results.
    cfg.INPUT.TRUTH_TEST = False
    # Train on videos: each frame comes with an earlier frame of its clip, this many frames before
    # it (fewest, most), and the same augmentation changes both; () is off. Needs "ssd".
    cfg.INPUT.VIDEO_REFERENCE = ()
    # Give the flow from each frame to that earlier one as well, where the data set knows it.
    cfg.INPUT.VIDEO_FLOW = False
    # Masks of predictions: "dense", a byte for each pixel of the image and instance, or "cropped",
    # instseg.masks.CroppedMasks. Commands always crop;
    # evaluation does if all its metrics can read cropped masks.
    cfg.TEST.MASKS = "dense"
    # Gigabytes that the dense masks of an image may take in prediction; instances with the lowest
    # scores are left out beyond it. Not used in evaluation.
    cfg.TEST.MASK_MEMORY = 4.0
    # Evaluate as on a stream: models that support it compute only key frames in full and reuse them
    # for the frames between. Otherwise every frame is computed in full.
    cfg.TEST.VIDEO = False
    # Frames from one key frame to the next under TEST.VIDEO; 0 is the model's own interval.
    cfg.TEST.KEYFRAME_INTERVAL = 0
    # Passes over each clip, the key frames one frame later in each; metrics are their mean. The
    # authors of YolactEdge make 5 with an interval of 5, so that all frames weigh the same.
    cfg.TEST.KEYFRAME_PASSES = 1
    # The metrics to measure, by their names in instseg/evaluation:
    #   "coco"       COCO's AP of boxes and masks;
    #   "proposals"  average recall (AR@n, AUC), for models that know no classes;
    #   "contest"    TP / (TP + FP + FN), the metric of the 2018 Data Science Bowl on nuclei;
    #   "leaves"     metrics of the leaf segmentation challenge (CVPPP): symmetric best Dice and
    #                difference in count; always on CVPPP data;
    #   "voc"        VOC's AP of masks at IoU 0.5 and 0.7; always on SBD and VOC data;
    #   "semantic"   mean IoU of the semantic map, for models that give one ("sem_seg");
    #   "tracks"     YouTube-VIS's AP of tracks, to which detections are linked; always on data in
    #                the layout of YouTube-VIS. Needs instseg[video].
    # Data of Cityscapes are always evaluated by the authors' code alone.
    cfg.TEST.METRICS = ("coco",)
    # Who computes "coco": "standard", Detectron2's evaluator with pycocotools, or "fast",
    # faster-coco-eval, which gives the same numbers in less time. Needs instseg[fast-eval].
    cfg.TEST.COCO_EVAL = "standard"
    # Least score of a detection that becomes part of a track.
    cfg.TEST.TRACK_SCORE_THRESH = 0.05
    # Keep the weights with the best value of this metric under OUTPUT_DIR/best: "segm/AP",
    # "segm/AP-CLASS" or, with TEST.VAL_LOSS_PERIOD, "val/total_loss", whose best value is the
    # lowest. With several data sets the name of one in DATASETS.TEST stands before it:
    # "NAME/segm/AP".
    cfg.TEST.BEST_METRIC = ""
    # Iterations between two measurements of the losses on DATASETS.TEST; 0 is off.
    cfg.TEST.VAL_LOSS_PERIOD = 0
    # Least score of a prediction that counts in "contest" and "leaves".
    cfg.TEST.CONTEST_SCORE_THRESH = 0.5
    # Precision in "voc": "11-point" (VOC 2007, what papers report) or "all-point" (VOC 2010).
    cfg.TEST.VOC_INTERPOLATION = "11-point"

    # Number type in which the network computes in prediction and evaluation: "float32",
    # "bfloat16", which is faster on processors with avx512_bf16 or AMX and on GPUs, or "auto":
    # "bfloat16" where it is faster and gives nearly the same, see
    # instseg/inference/auto_precision.py. What follows the network is float32.
    cfg.MODEL.DTYPE_TEST = "float32"

    cfg.MODEL.VGG = CfgNode()
    # Layers with weights, of which three are not part of the backbone: 11, 13, 16 or 19.
    cfg.MODEL.VGG.DEPTH = 16
    # Normalisation after each convolution, "" for none; "BN" is torchvision's vgg16_bn.
    cfg.MODEL.VGG.NORM = ""
    # Pixels per cell of conv5: 16, or 8 by the hole algorithm (pool4 with stride 1, conv5 dilated).
    cfg.MODEL.VGG.OUTPUT_STRIDE = 16
    # Stages whose outputs are used, conv1 ... conv5; the last one ends the network.
    cfg.MODEL.VGG.OUT_FEATURES = ["conv5"]

    cfg.MODEL.UNET = CfgNode()
    # Channels of each level of build_unet_backbone, the first with the size of the image, each
    # further one with half the size of the one before it.
    cfg.MODEL.UNET.CHANNELS = (32, 64, 128, 256, 256)
    # Normalisation after each convolution, "" for none.
    cfg.MODEL.UNET.NORM = "BN"


def _categories(cfg: CfgNode) -> None:
    configured_categories(cfg)


def _per_channel(cfg: CfgNode) -> Rule:
    channels = CHANNELS[cfg.INPUT.FORMAT]
    expected = f"{channels} numbers, as INPUT.FORMAT is {cfg.INPUT.FORMAT}"
    return Rule(lambda x: len(x) == channels, expected)


def _normalize_range(cfg: CfgNode) -> Rule:
    if cfg.INPUT.NORMALIZE == "range":
        part, expected = number(), "(value that becomes 0, larger value that becomes 255)"
    else:
        part, expected = number(0, 100), "(lower, higher) percentile from 0 to 100"
    ends = ordered(part, "")
    return Rule(lambda x: ends.fits(x) and x[0] < x[1], expected)


def _channels(cfg: CfgNode) -> Rule:
    count = CHANNELS[cfg.INPUT.FORMAT]
    numbers = several(whole(0), "", count, count)
    expected = f"() or {count} numbers of channels from 0 on, as INPUT.FORMAT is {cfg.INPUT.FORMAT}"
    return Rule(lambda x: len(x) == 0 or numbers.fits(x), expected)


def _sizes_to_train_on(cfg: CfgNode) -> Rule | None:
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING != "range":
        return None
    return ordered(_SIZE, "(smallest, largest) side, as INPUT.MIN_SIZE_TRAIN_SAMPLING is range")


def _crop_size(cfg: CfgNode) -> Rule | None:
    """The rule of ``INPUT.CROP.SIZE`` for this ``INPUT.CROP.TYPE``; None without crops."""
    if not cfg.INPUT.CROP.ENABLED:
        return None
    kind = cfg.INPUT.CROP.TYPE
    if kind.startswith("relative"):
        part = Rule(lambda x: is_number(x) and 0 < x <= 1, "")
        expected = "[height, width], each above 0 and at most 1 of the image's"
    else:
        part = COUNT
        expected = "two whole numbers of pixels"
        if kind == "absolute_range":
            expected += ", in ascending order"
    expected += f", as INPUT.CROP.TYPE is {kind}"
    return ordered(part, expected) if kind == "absolute_range" else several(part, expected, 2, 2)


def _augmentation(cfg: CfgNode) -> Rule | None:
    if not cfg.INPUT.VIDEO_REFERENCE:
        return None
    return Rule(lambda x: x == "ssd", "ssd, which INPUT.VIDEO_REFERENCE needs")


def _with_ssd(rule: Rule) -> Dependent:
    return where("INPUT.AUGMENTATION", "ssd", rule)


def _base_lr(cfg: CfgNode) -> Rule | None:
    if cfg.SOLVER.LR_SCHEDULER_NAME != "WarmupCosineLR":
        return None
    least = cfg.SOLVER.BASE_LR_END
    expected = f"above 0 and at least SOLVER.BASE_LR_END {least:g} for WarmupCosineLR"
    return Rule(lambda x: x > 0 and x >= least, expected)


def _momentum(cfg: CfgNode) -> Rule | None:
    return Rule(lambda x: x > 0, "above 0 with SOLVER.NESTEROV") if cfg.SOLVER.NESTEROV else None


_CROPPED = ", as INPUT.AUGMENTATION ssd crops masks as images"
_KEYPOINTS = ", as MODEL.KEYPOINT_ON asks for metrics of keypoints"
_PLAIN_STATISTICS = one_of(False, reason=", as SOLVER.EMA.ENABLED averages them with the weights")
_NAMES = Rule(lambda x: all(isinstance(name, str) for name in x), "names of data sets")
_NOT_NEGATIVE = number(0)
_SIZE = whole(0)
_BOX_LOSS = one_of("smooth_l1", "giou", "diou", "ciou")
_DISTANCES = ordered(
    whole(1, NUM_REFERENCES), f"(fewest, most) frames between 1 and {NUM_REFERENCES}"
)

declare(
    "",
    {
        "MODEL.DEVICE": Rule(
            lambda x: isinstance(x, str) and re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", x) is not None,
            "cpu, cuda or cuda:NUMBER",
        ),
        "MODEL.DTYPE_TEST": one_of("float32", "bfloat16", "auto"),
        "MODEL.MASK_ON": _with_ssd(one_of(True, reason=_CROPPED)),
        "MODEL.PIXEL_MEAN": (several(number(), "a list of numbers, one per channel"), _per_channel),
        "MODEL.PIXEL_STD": (
            several(POSITIVE, "a list of numbers above 0, one per channel"),
            _per_channel,
        ),
        "MODEL.RESNETS.DEPTH": one_of(18, 34, 50, 101, 152),
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": COUNT,
        "MODEL.RPN.POSITIVE_FRACTION": FRACTION,
        "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": COUNT,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": COUNT,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": COUNT,
        "MODEL.RPN.POST_NMS_TOPK_TEST": COUNT,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": COUNT,
        "MODEL.ROI_HEADS.POSITIVE_FRACTION": FRACTION,
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": COUNT,
        "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": COUNT,
        "INPUT.FORMAT": one_of(*CHANNELS),
        "INPUT.NORMALIZE": one_of(*NORMALIZATIONS),
        "INPUT.NORMALIZE_RANGE": _normalize_range,
        "INPUT.CHANNELS": _channels,
        "INPUT.MASK_FORMAT": (
            one_of("polygon", "bitmask"),
            _with_ssd(one_of("bitmask", reason=_CROPPED)),
        ),
        "INPUT.RANDOM_FLIP": one_of("horizontal", "vertical", "none"),
        # A side of 0 leaves images as they are.
        "INPUT.MIN_SIZE_TRAIN": (
            several(_SIZE, "one or more sides in pixels, such as (640, 800)"),
            _sizes_to_train_on,
        ),
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
        "INPUT.MAX_SIZE_TRAIN": COUNT,
        "INPUT.MIN_SIZE_TEST": _SIZE,
        "INPUT.MAX_SIZE_TEST": COUNT,
        "INPUT.CROP.TYPE": one_of("relative", "relative_range", "absolute", "absolute_range"),
        "INPUT.CROP.SIZE": _crop_size,
        "DATASETS.TRAIN": _NAMES,
        "DATASETS.TEST": _NAMES,
        "DATASETS.SHAPES_SIZE": whole(SIZES[0], SIZES[-1], f"{SIZES[0]} to {SIZES[-1]} pixels"),
        "DATALOADER.NUM_WORKERS": whole(0),
        # Detectron2's other samplers need keys that it does not define.
        "DATALOADER.SAMPLER_TRAIN": one_of(
            "TrainingSampler", "RepeatFactorTrainingSampler", GROUPED
        ),
        "DATALOADER.GROUP_POWER": FRACTION,
        "DATALOADER.REPEAT_THRESHOLD": FRACTION,
        "SOLVER.IMS_PER_BATCH": COUNT,
        "SOLVER.MAX_ITER": COUNT,
        "SOLVER.CHECKPOINT_PERIOD": COUNT,
        "SOLVER.BASE_LR": (_NOT_NEGATIVE, _base_lr),
        "SOLVER.BASE_LR_END": _NOT_NEGATIVE,
        "SOLVER.LR_SCHEDULER_NAME": one_of(
            "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"
        ),
        "SOLVER.STEPS": Rule(
            lambda x: several(COUNT, "", 0).fits(x) and list(x) == sorted(set(x)),
            "iterations in ascending order, such as (6000, 8000)",
        ),
        "SOLVER.GAMMA": POSITIVE,
        "SOLVER.NUM_DECAYS": COUNT,
        "SOLVER.WARMUP_METHOD": one_of("linear", "constant"),
        "SOLVER.WARMUP_ITERS": whole(0),
        "SOLVER.WARMUP_FACTOR": _NOT_NEGATIVE,
        "SOLVER.MOMENTUM": (_NOT_NEGATIVE, _momentum),
        "SOLVER.WEIGHT_DECAY": _NOT_NEGATIVE,
        "SOLVER.BIAS_LR_FACTOR": _NOT_NEGATIVE,
        "SOLVER.REFERENCE_WORLD_SIZE": whole(0),
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of("value", "norm"),
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": POSITIVE,
        "TEST.DETECTIONS_PER_IMAGE": whole(0),
        "TEST.MASKS": one_of("dense", "cropped"),
        "TEST.COCO_EVAL": (
            one_of("standard", "fast"),
            where("MODEL.KEYPOINT_ON", True, one_of("standard", reason=_KEYPOINTS)),
        ),
        "TEST.PRECISE_BN.ENABLED": where("SOLVER.EMA.ENABLED", True, _PLAIN_STATISTICS),
        "TEST.PRECISE_BN.NUM_ITER": COUNT,
        "TEST.AUG.ENABLED": check_augmentation,
        "TEST.AUG.MIN_SIZES": several(COUNT, "one or more sides in pixels, such as (400, 800)"),
        "TEST.AUG.MAX_SIZE": COUNT,
        # Each process adds its number to the seed; NumPy takes 32 bits.
        "SEED": Rule(lambda x: is_whole(x) and x < 2**31, f"a whole number below {2**31}"),
        "MODEL.CATEGORIES": _categories,
        "MODEL.BACKBONE.FREEZE_AT": (
            where("MODEL.BACKBONE.NAME", "build_vgg_backbone", whole(0, 5, "0 to 5")),
            where("MODEL.BACKBONE.NAME", "build_unet_backbone", one_of(0)),
        ),
        "MODEL.VGG.DEPTH": one_of(11, 13, 16, 19),
        "MODEL.VGG.OUTPUT_STRIDE": one_of(8, 16),
        "MODEL.UNET.CHANNELS": several(COUNT, "channels of one or more levels, such as (32, 64)"),
        "MODEL.VGG.OUT_FEATURES": some_of("conv1", "conv2", "conv3", "conv4", "conv5"),
        "DATALOADER.CACHE_MIB": number(0),
        "INPUT.AUGMENTATION": (one_of("detectron2", "ssd"), _augmentation),
        "INPUT.SQUARE_SIZE": _with_ssd(
            whole(
                1,
                expected="a side in pixels, e.g. 550, as INPUT.AUGMENTATION ssd stretches images "
                "to a square",
            )
        ),
        "INPUT.VIDEO_REFERENCE": Rule(
            lambda x: not x or _DISTANCES.fits(x), f"{_DISTANCES.expected}, or () for none"
        ),
        "SOLVER.OPTIMIZER": one_of("SGD", "AdamW"),
        "SOLVER.AMP.DTYPE": one_of("float16", "bfloat16"),
        "SOLVER.ACCUMULATE_BATCHES": COUNT,
        "SOLVER.EMA.DECAY": Rule(lambda x: FRACTION.fits(x) and x < 1, "from 0 to below 1"),
        "SOLVER.MEMORY_FORMAT": one_of("auto", "channels_last", "contiguous"),
        "TEST.MASK_MEMORY": Rule(POSITIVE.fits, "gigabytes, more than 0"),
        "TEST.KEYFRAME_INTERVAL": whole(0, expected="at least 1, 0 for auto"),
        "TEST.VOC_INTERPOLATION": one_of("11-point", "all-point"),
    },
)
