"""Text to tokens and back: the tokenizer, chat templates, and what callers give as a prompt."""
