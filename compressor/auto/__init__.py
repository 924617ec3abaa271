"""The default method: settings for every tensor, found by measuring."""
