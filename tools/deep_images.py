"""Copy a data set in COCO's format with images of 12 or 16 bits, as a microscope writes them.

``python tools/deep_images.py ANNOTATIONS.json IMAGES OUTPUT --bits 16`` writes ``OUTPUT/images/``,
16-bit TIFFs of the grey or colour images, and ``OUTPUT/ANNOTATIONS.json``.  Each image gets an
offset and a scale of its own, as exposure and black level vary, and normal noise.  The set is then
``coco:OUTPUT/ANNOTATIONS.json:OUTPUT/images``, to be used with ``INPUT.NORMALIZE percentile``.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import tifffile
from tqdm import tqdm

from instseg.data.images import read_pixels

NOISE = 0.25
"""Standard deviation, in steps of the 8-bit image."""


def deepen(
    pixels: np.ndarray, bits: int, generator: np.random.Generator, noise: float = NOISE
) -> np.ndarray:
    """(H, W, C) uint8 → uint16 with values below 2 ** ``bits``.

    Args:
        noise: standard deviation, in steps of the 8-bit image.
    """
    largest_value = 2**bits - 1
    offset = generator.uniform(0.02, 0.1) * largest_value
    step = generator.uniform(0.5, 0.85) * largest_value / 255
    values = pixels + generator.normal(0, noise, pixels.shape)
    result: np.ndarray = np.rint(offset + step * values).clip(0, largest_value).astype(np.uint16)
    return result


def write_set(json_file: Path, images: Path, output: Path, bits: int, noise: float) -> None:
    """Write the data set; the same random numbers in every call."""
    content = json.loads(json_file.read_text())
    generator = np.random.default_rng(0)
    for image in tqdm(content["images"], unit="image", disable=None):
        pixels = read_pixels(images / image["file_name"])[:, :, :3]
        image["file_name"] = str(Path(image["file_name"]).with_suffix(".tif"))
        path = output / "images" / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        deep = deepen(pixels, bits, generator, noise)
        grey = deep.shape[2] == 1
        tifffile.imwrite(
            path,
            deep[:, :, 0] if grey else deep,
            photometric="minisblack" if grey else "rgb",
            compression="zlib",
        )
    (output / json_file.name).write_text(json.dumps(content))


def main() -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("annotations", type=Path, help="a JSON file in COCO's format")
    parser.add_argument("images", type=Path, help="the folder of its images")
    parser.add_argument("output", type=Path, help="created if need be")
    parser.add_argument("--bits", type=int, default=16, help="default %(default)s")
    parser.add_argument("--noise", type=float, default=NOISE, help="default %(default)s")
    arguments = parser.parse_args()
    write_set(
        arguments.annotations, arguments.images, arguments.output, arguments.bits, arguments.noise
    )


if __name__ == "__main__":
    main()
