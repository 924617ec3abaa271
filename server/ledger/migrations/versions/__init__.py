"""One module for each version, `vNNNN_what.py`; none is ever changed once it was released."""
