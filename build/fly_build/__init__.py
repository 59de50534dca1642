"""fly-build: from Hugging Face checkpoints to an engine directory. torch, transformers and onnx live here only."""
