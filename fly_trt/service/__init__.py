"""An engine directory at work: how it is served, what is admitted, and the engine thread behind it."""
