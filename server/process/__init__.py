"""The server as a process: start and stop, the wire protocol's bounds, logs."""
