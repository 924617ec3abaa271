"""Between text and token ids: tokenizers, templates, streams of text, and the text workers."""
