"""What a client gets: from outputs of the runtime to answers and streams."""
