"""Histoscale: pretraining of pathology foundation models from whole slides, and honest proof of what they learned."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    __version__ = version("histoscale")
except PackageNotFoundError:  # PYTHONPATH=.ns, nothing installed
    __version__ = "0.1.0+source"

# In a checkout the subpackages are the root folders; built wheels carry them as real folders.
if Path(__file__).parent.parent.name == ".ns":
    __path__.append(str(Path(__file__).resolve().parents[2]))
