"""What a client asks for: from a parsed body to prompts with SamplingParams."""
