"""The runtime: requests, their slots, and the loop that serves them."""
