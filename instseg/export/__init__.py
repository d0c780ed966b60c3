"""Networks as files that run without their Python code, and predictions from such files."""

from instseg.export.exporting import FORMATS, export
from instseg.export.predictor import ExportedPredictor

__all__ = ["FORMATS", "ExportedPredictor", "export"]
