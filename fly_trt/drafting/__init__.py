"""Drafting: where draft tokens come from, and where a draft ends.

DRAFTERS is the table of the ways to draft, by the name that `method` has; DRAFT_STOPS that of the rules that end the
draft of a model early.
"""

from fly_trt.drafting.alignment import ALIGNMENT_MODES, AlignmentDrafter, alignment
from fly_trt.drafting.base import (
    Draft,
    Drafter,
    DrafterKind,
    DraftParts,
    DraftRow,
    DraftSettings,
    FreeDrafter,
    MakeDrafter,
    ReadsOutputs,
    ReadsPrompts,
)
from fly_trt.drafting.hybrid import HybridDrafter, hybrid
from fly_trt.drafting.levels import INNER_ACCEPTANCE, Guesser, Level, Lookup
from fly_trt.drafting.model import ModelDrafter, chain, draft_model, multi_level
from fly_trt.drafting.ngram import NgramDrafter, ngram
from fly_trt.drafting.self_draft import self_draft
from fly_trt.drafting.stops import DRAFT_STOPS, NO_STOP, DraftStop
from fly_trt.drafting.suffix import SuffixDrafter, suffix

DRAFTERS: dict[str, DrafterKind] = {
    "multi_level": DrafterKind(
        multi_level,
        needs_draft_model=True,
        acceptance="fly",
        has_scores=True,
        search={"prompt_lookup_num_tokens": (3, 10)},
    ),
    "draft_model": DrafterKind(draft_model, needs_draft_model=True, acceptance="fly", has_scores=True),
    # The next three draft copies rather than alternatives: a loosened one costs accuracy (181 instead of 240 right
    # answers of 240 on the demo pair).
    "ngram": DrafterKind(
        ngram,
        needs_draft_model=False,
        acceptance="exact",
        has_copies=True,
        search={"prompt_lookup_min": (2,), "prompt_lookup_max": (8,)},
    ),
    "alignment": DrafterKind(
        alignment,
        needs_draft_model=False,
        acceptance="exact",
        has_copies=True,
        search={"alignment_mode": ("argmax",), "alignment_margin": (2.0, 8.0)},
    ),
    "suffix": DrafterKind(
        suffix,
        needs_draft_model=False,
        acceptance="exact",
        has_copies=True,
        search={"suffix_max_spec_factor": (1.0, 4.0)},
    ),
    "hybrid": DrafterKind(
        hybrid,
        needs_draft_model=True,
        acceptance="fly",
        has_scores=True,
        has_copies=True,
        search={"hybrid_min_match": (2, 5)},
    ),
    # What it does not share with the target is what was left out of it, so that its other tokens are mistakes rather
    # than alternatives.
    "self": DrafterKind(
        self_draft,
        needs_draft_model=False,
        acceptance="exact",
        has_scores=True,
        needs_self_draft=True,
        draft_stop="confidence",
    ),
    "chain": DrafterKind(
        chain,
        needs_draft_model=True,
        acceptance="fly",
        has_scores=True,
        needs_inner_draft=True,
        search={"inner_num_tokens": (2, 6), "inner_acceptance": ("fly",)},
    ),
}

__all__ = [
    "ALIGNMENT_MODES",
    "DRAFTERS",
    "DRAFT_STOPS",
    "INNER_ACCEPTANCE",
    "NO_STOP",
    "AlignmentDrafter",
    "Draft",
    "DraftParts",
    "DraftRow",
    "DraftSettings",
    "DraftStop",
    "Drafter",
    "DrafterKind",
    "FreeDrafter",
    "Guesser",
    "HybridDrafter",
    "Level",
    "Lookup",
    "MakeDrafter",
    "ModelDrafter",
    "NgramDrafter",
    "ReadsOutputs",
    "ReadsPrompts",
    "SuffixDrafter",
]
