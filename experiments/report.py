"""One HTML page from result folders."""
