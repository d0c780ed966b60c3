"""The keys of instseg itself, which every paper may use; each says what it means."""

from detectron2.config import CfgNode

from instseg.data.synthetic import shapes

_OLD_METRICS = {
    "PROPOSALS": "proposals",
    "CONTEST_METRIC": "contest",
    "VOC_METRIC": "voc",
    "TRACK_METRIC": "tracks",
    "LEAF_METRIC": "leaves",
    "SEMANTIC_METRIC": "semantic",
}
"""Keys that ``TEST.METRICS`` replaced, and the names they have there."""


def rename_keys(cfg: CfgNode) -> None:
    """Have ``cfg`` refuse keys of earlier versions with what to write instead."""
    for key, name in _OLD_METRICS.items():
        cfg.register_renamed_key(f"TEST.{key}", "TEST.METRICS", f"name {name!r} in it")


def take_old_keys(loaded: CfgNode) -> None:
    """Write ``TEST.METRICS`` into the ``config.yaml`` of a run of an earlier version, in place.

    Such a file has all of the keys; one that somebody wrote has some of them, and is refused.
    """
    test = loaded.get("TEST")
    if isinstance(test, dict) and _OLD_METRICS.keys() <= test.keys() and "METRICS" not in test:
        names = [name for key, name in _OLD_METRICS.items() if test.pop(key)]
        test["METRICS"] = tuple(names if "proposals" in names else ("coco", *names))


def add_shared_config(cfg: CfgNode) -> None:
    """Give ``cfg`` these keys, with the values they have where a configuration says nothing."""
    # SHA-256 that the file MODEL.WEIGHTS must have; "" does not check.
    cfg.MODEL.WEIGHTS_SHA256 = ""
    # The classes of the model, [{"id": ..., "name": ...}, ...] in the order of their numbers, which
    # results get their category ids and names from where the weights tell none. Training writes it
    # into its config.yaml; [] is unknown.
    cfg.MODEL.CATEGORIES = []
    # Side in pixels of the pictures of the built-in shapes_* data sets.
    cfg.DATASETS.SHAPES_SIZE = shapes.DEFAULT_SIZE
    # Training pictures that each loader process may find missing or unreadable, and replace by the
    # last good one that it read, before it stops training; 0 stops at the first.
    cfg.DATALOADER.MAX_UNREADABLE = 0
    # "SGD" (momentum, as in Detectron2) or "AdamW" (SOLVER.WEIGHT_DECAY decoupled, betas 0.9,
    # 0.999).
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Number type under SOLVER.AMP.ENABLED: "float16" (with loss scaling, CUDA only) or "bfloat16".
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Batches of SOLVER.IMS_PER_BATCH pictures whose gradients make one step; 1 is off.
    cfg.SOLVER.ACCUMULATE_BATCHES = 1
    # Smallest and largest factor on the pixel values of a training picture; (1.0, 1.0) is off.
    cfg.INPUT.RANDOM_BRIGHTNESS = (1.0, 1.0)
    # What happens to training pictures: "detectron2" (INPUT.MIN_SIZE_TRAIN, INPUT.CROP) or "ssd"
    # (colours, expansion, crop, stretching to a square; see instseg/data/augmentations.py). Flips
    # follow INPUT.RANDOM_FLIP in both.
    cfg.INPUT.AUGMENTATION = "detectron2"
    # Samples that a project draws for training in place of whole pictures; "" is off.
    cfg.INPUT.SAMPLES = ""
    # Side in pixels of the square that "ssd" and models of one input size stretch pictures to.
    cfg.INPUT.SQUARE_SIZE = 0
    # Whether "ssd" changes brightness, contrast, saturation and hue.
    cfg.INPUT.SSD_COLORS = True
    # Whether "ssd" crops around an object.
    cfg.INPUT.SSD_CROP = True
    # Largest factor by which "ssd" expands the canvas around a picture; 1.0 is off.
    cfg.INPUT.SSD_EXPAND_RATIO = 4.0
    # Colour of the canvas, in the order of INPUT.FORMAT; none is MODEL.PIXEL_MEAN.
    cfg.INPUT.SSD_EXPAND_COLOR = []
    # Folder with a semantic map NAME.png for each picture NAME, labels 0 for background, class + 1,
    # 255 for neither; models that can use one get it as "sem_seg".  "" is none.
    cfg.INPUT.SEMANTIC_ROOT = ""
    # Give models the annotations of test pictures too: for stages that take the truth of the stage
    # before, never for results.
    cfg.INPUT.TRUTH_TEST = False
    # Train on videos: each frame comes with an earlier one of its clip, between these numbers of
    # frames before it (fewest, most), that the same augmentation changes; () is off. Needs "ssd".
    cfg.INPUT.VIDEO_REFERENCE = ()
    # Give the flow from each frame to that earlier one as well, where the data set knows it.
    cfg.INPUT.VIDEO_FLOW = False
    # Gigabytes that the masks of a picture may take in prediction, a byte per pixel and object: of
    # more objects than that, those with the highest scores are given. Not in evaluation.
    cfg.TEST.MASK_MEMORY = 4.0
    # Evaluate models whose video frames share work as on a stream: key frames in full, the frames
    # between them with their help. Otherwise every frame is computed in full.
    cfg.TEST.VIDEO = False
    # Frames from one key frame to the next then; 0 is the model's own.
    cfg.TEST.KEYFRAME_INTERVAL = 0
    # Passes over each clip, the key frames one frame later in each; metrics are their mean. The
    # authors of YolactEdge make 5 with an interval of 5, so that all frames weigh the same.
    cfg.TEST.KEYFRAME_PASSES = 1
    # What is measured, by the names of instseg/evaluation:
    #   "coco"       COCO's AP of boxes and masks;
    #   "proposals"  average recall (AR@n, AUC), for models that know no classes;
    #   "contest"    TP / (TP + FP + FN), the metric of the 2018 Data Science Bowl on nuclei;
    #   "leaves"     those of the leaf segmentation challenge (CVPPP): symmetric best Dice and
    #                difference in count; always on CVPPP data;
    #   "voc"        VOC's AP of masks at IoU 0.5 and 0.7; always on SBD and VOC data;
    #   "semantic"   mean IoU of the semantic map, for models that give one ("sem_seg");
    #   "tracks"     YouTube-VIS's AP of tracks, to which detections are linked; always on data in
    #                the layout of YouTube-VIS. Needs instseg[video].
    # Data of Cityscapes are always evaluated by the authors' code alone.
    cfg.TEST.METRICS = ("coco",)
    # Least score of a detection that becomes part of a track.
    cfg.TEST.TRACK_SCORE_THRESH = 0.05
    # Keep the weights with the best value of this metric under OUTPUT_DIR/best: "segm/AP",
    # "segm/AP-CLASS" or, with TEST.VAL_LOSS_PERIOD, "val/total_loss", whose best value is the
    # lowest. With several data sets it begins with the name that one has in DATASETS.TEST:
    # "NAME/segm/AP".
    cfg.TEST.BEST_METRIC = ""
    # Iterations between two measurements of the losses on DATASETS.TEST; 0 is off.
    cfg.TEST.VAL_LOSS_PERIOD = 0
    # Least score of a prediction that counts in "contest" and "leaves".
    cfg.TEST.CONTEST_SCORE_THRESH = 0.5
    # Precision in "voc": "11-point" (VOC 2007, what papers report) or "all-point" (VOC 2010).
    cfg.TEST.VOC_INTERPOLATION = "11-point"
