"""What speculation does for an engine directory: prompts, modes and loads in one run. `fly-bench` shows it."""
