"""The same load on this server and on the best general tools, side by side."""
