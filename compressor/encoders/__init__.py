"""Encoders: a matrix becomes terms of `compressor.codecs`. The server never loads them."""
