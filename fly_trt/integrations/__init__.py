"""Other engines for LLMs with FLy in them: what reaches into a library that schedules requests by itself."""
