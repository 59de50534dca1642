"""Verification: the acceptance policies and the rule that decides which draft tokens stand."""

from fly_trt.verification.policy import PRESETS, fly_policy
from fly_trt.verification.rule import Verdict, accept, count_loosened

__all__ = ["PRESETS", "Verdict", "accept", "count_loosened", "fly_policy"]
