"""Servers that fly-trt runs in, one package each."""
