"""One round: the step of a worker and of the server, message formats, validation."""
