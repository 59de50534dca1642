"""Structured output: grammars that an output must follow, compiled once and followed token by token."""

from fly_trt.grammar.compiler import CompiledGrammar, GrammarCompiler
from fly_trt.grammar.masks import TokenMasks
from fly_trt.grammar.matcher import GrammarMatcher
from fly_trt.grammar.structured_outputs import StructuredOutputs

__all__ = ["CompiledGrammar", "GrammarCompiler", "GrammarMatcher", "StructuredOutputs", "TokenMasks"]
