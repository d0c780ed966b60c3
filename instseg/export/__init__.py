"""Networks as files that run without their Python code, and predictions from such files."""

from instseg.export.exporting import FORMATS, export
from instseg.export.int8 import Int8Report, calibration_images, to_int8
from instseg.export.predictor import ExportedPredictor

__all__ = ["FORMATS", "ExportedPredictor", "Int8Report", "calibration_images", "export", "to_int8"]
