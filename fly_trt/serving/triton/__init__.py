"""Triton Inference Server: what a model repository holds, and the model that the server runs."""
