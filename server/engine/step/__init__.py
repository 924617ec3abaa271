"""One engine step: batch, forward pass, sampling, what it gives."""
