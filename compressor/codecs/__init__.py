"""Codecs: how one tensor's delta is encoded."""
