"""The fastest setting of an engine directory that keeps the target's quality on a user's prompts, for `fly-tune`."""
