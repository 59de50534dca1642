"""TensorRT-LLM with FLy: the acceptance rule in its PyTorch backend, and the engines of 1.2.

Some modules run in TensorRT-LLM's own processes (with torch), some in the process of fly-trt that drives it. Importing
this package loads neither library.
"""
