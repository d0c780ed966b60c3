"""Find the classes of data sets."""

import logging

from detectron2.data import MetadataCatalog

from instseg.categories import Categories
from instseg.data.readers.json_files import file_of, read_json
from instseg.errors import DatasetError

logger = logging.getLogger(__name__)


def known_categories(name: object) -> Categories | None:
    """The classes of a data set, known without its images.

    Args:
        name: of the data set; it need not exist.
    Returns:
        the classes in its metadata, else in its annotation file; None if neither has any.
    """
    # MetadataCatalog.get() would add an entry for a name it does not know.
    if not isinstance(name, str) or name not in MetadataCatalog:
        return None
    metadata = MetadataCatalog.get(name)
    file = metadata.get("json_file")
    if metadata.get("thing_classes") or not file:
        return Categories.of_metadata(metadata)
    try:
        content = read_json(file, file_of(name, file))
        return Categories.of_coco(content["categories"], by_id=True)
    except (DatasetError, ValueError, LookupError, TypeError) as error:
        logger.debug("the classes of %s are not known: %s", name, error)
        return None
