"""The OpenAI API over the runtime: what `fly-serve` runs."""
