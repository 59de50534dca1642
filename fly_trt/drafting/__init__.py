"""Drafting: where draft tokens come from."""

from fly_trt.drafting.base import Drafter
from fly_trt.drafting.model import Lookup, ModelDrafter
from fly_trt.drafting.ngram import NgramDrafter

__all__ = ["Drafter", "Lookup", "ModelDrafter", "NgramDrafter"]
