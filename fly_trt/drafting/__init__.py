"""Drafting: where draft tokens come from.

DRAFTERS is the table of the ways to draft, by the name that `method` has.
"""

from fly_trt.drafting.base import Drafter, DrafterKind, DraftParts, DraftRow, DraftSettings, FreeDrafter
from fly_trt.drafting.model import Lookup, ModelDrafter, draft_model, multi_level
from fly_trt.drafting.ngram import NgramDrafter, ngram

DRAFTERS: dict[str, DrafterKind] = {
    "multi_level": DrafterKind(multi_level, needs_draft_model=True, acceptance="fly"),
    "draft_model": DrafterKind(draft_model, needs_draft_model=True, acceptance="fly"),
    # Its drafts are copies rather than alternatives: a loosened one costs accuracy (181 instead of 240 right answers of
    # 240 on the demo pair).
    "ngram": DrafterKind(ngram, needs_draft_model=False, acceptance="exact"),
}

__all__ = [
    "DRAFTERS",
    "DraftParts",
    "DraftRow",
    "DraftSettings",
    "Drafter",
    "DrafterKind",
    "FreeDrafter",
    "Lookup",
    "ModelDrafter",
    "NgramDrafter",
]
