"""The decoder, its table of families, and the reading of Hugging Face folders."""

from hpckv.model.config import ModelConfig, ModelSettings, RopeScaling
from hpckv.model.families import KNOWN_ARCHITECTURES, read_config

__all__ = ["KNOWN_ARCHITECTURES", "ModelConfig", "ModelSettings", "RopeScaling", "read_config"]
