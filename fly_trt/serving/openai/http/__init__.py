"""One exchange over HTTP and the process that serves: bodies, limits, errors, streams, signals. Knows no model."""
