"""Drafting: where draft tokens come from."""

from fly_trt.drafting.base import Drafter, DraftRow
from fly_trt.drafting.model import Lookup, ModelDrafter
from fly_trt.drafting.ngram import NgramDrafter

__all__ = ["DraftRow", "Drafter", "Lookup", "ModelDrafter", "NgramDrafter"]
