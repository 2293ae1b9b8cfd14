"""Core of the library: one round (worker step and server step), wire formats, input checks, CPU layouts."""
