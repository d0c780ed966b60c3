"""The keys for augmentations that all papers share, and their rules."""

from detectron2.config import CfgNode

from instseg.config.rules import FRACTION, POSITIVE, Rule, declare, number, one_of, ordered


def add_augmentation_config(cfg: CfgNode) -> None:
    """Add the keys to ``cfg.INPUT``, with their defaults, which leave images as they are."""
    # Smallest and largest factor on the pixel values of a training image; (1.0, 1.0) is off.
    cfg.INPUT.RANDOM_BRIGHTNESS = (1.0, 1.0)
    # The same for the contrast, a factor on the difference of pixels to the mean of their image,
    # and for gamma, the exponent on pixel values of 0 to 1.
    cfg.INPUT.RANDOM_CONTRAST = (1.0, 1.0)
    cfg.INPUT.RANDOM_GAMMA = (1.0, 1.0)
    # Smallest and largest standard deviation of a Gaussian filter on a training image, in pixels of
    # the network's input, and of noise, in values of 0 to 255; (0.0, 0.0) is off.
    cfg.INPUT.RANDOM_BLUR = (0.0, 0.0)
    cfg.INPUT.RANDOM_NOISE = (0.0, 0.0)
    # Give each training image one of the eight symmetries of the square, for images without a
    # preferred direction.
    cfg.INPUT.RANDOM_DIHEDRAL = False
    # Smallest and largest angle in degrees by which the content of a training image is turned,
    # counter-clockwise, before INPUT.CROP; pixels that become empty get the image's median.
    # (0.0, 0.0) is off.
    cfg.INPUT.RANDOM_ROTATION = (0.0, 0.0)
    # Smallest and largest factor by which the content is enlarged before INPUT.CROP; the size of
    # the crop is that in the unchanged image. (1.0, 1.0) is off.
    cfg.INPUT.RANDOM_SCALE = (1.0, 1.0)
    # Probability that INPUT.CROP takes in the centre of an instance, where the image has one.
    cfg.INPUT.CROP.AROUND_INSTANCES = 0.0


def _rotation(cfg: CfgNode) -> Rule | None:
    if cfg.MODEL.MASK_ON:
        return None
    return Rule(lambda x: tuple(x) == (0, 0), "(0.0, 0.0) without masks (MODEL.MASK_ON False)")


def _scale(cfg: CfgNode) -> Rule | None:
    if not cfg.INPUT.SAMPLES:
        return None
    expected = f"(1.0, 1.0), as INPUT.SAMPLES {cfg.INPUT.SAMPLES} draws scales by itself"
    return Rule(lambda x: tuple(x) == (1, 1), expected)


def _dihedral(cfg: CfgNode) -> Rule | None:
    if not cfg.MODEL.KEYPOINT_ON:
        return None
    return one_of(False, reason=" with keypoints (MODEL.KEYPOINT_ON), whose sides it mixes up")


def _around(cfg: CfgNode) -> Rule | None:
    if cfg.INPUT.SAMPLES or cfg.INPUT.AUGMENTATION == "ssd":
        return one_of(0, reason=", as INPUT.AUGMENTATION ssd and INPUT.SAMPLES use no INPUT.CROP")
    if not cfg.INPUT.CROP.ENABLED:
        return one_of(0, reason=" without crops (INPUT.CROP.ENABLED False)")
    return None


_NOT_NEGATIVE = number(0)

declare(
    "INPUT",
    {
        "RANDOM_BRIGHTNESS": ordered(_NOT_NEGATIVE, "(smallest, largest) factor"),
        "RANDOM_CONTRAST": ordered(_NOT_NEGATIVE, "(smallest, largest) factor"),
        "RANDOM_GAMMA": ordered(POSITIVE, "(smallest, largest) exponent, above 0"),
        "RANDOM_BLUR": ordered(_NOT_NEGATIVE, "(smallest, largest) pixels"),
        "RANDOM_NOISE": ordered(_NOT_NEGATIVE, "(smallest, largest) standard deviation"),
        "RANDOM_DIHEDRAL": _dihedral,
        "RANDOM_ROTATION": (
            ordered(number(-360, 360), "(smallest, largest) angle from -360 to 360 degrees"),
            _rotation,
        ),
        "RANDOM_SCALE": (ordered(POSITIVE, "(smallest, largest) factor, above 0"), _scale),
        "CROP.AROUND_INSTANCES": (FRACTION, _around),
    },
)
