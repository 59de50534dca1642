"""What runs a request: a process for the engines, a thread for their responses, results that hand them on."""
