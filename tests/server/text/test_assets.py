"""Text assets: decoding."""

from __future__ import annotations

from server.text.assets import TextAssets
from server.text.encoding import encode
from tests.tiny import make_tokenizer


def test_token_texts_join_to_the_text_and_decode_leaves_out_a_character_that_only_begins() -> None:
    text = TextAssets.of_tokenizer(make_tokenizer(320, bos=False))
    ids = encode(text.tokenizer, "fox 🎉!")
    texts = text.token_texts(ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == "fox 🎉!"
    assert text.decode(ids[:-2], is_whole=False) == "fox "
    assert "\ufffd" in text.decode(ids[:-2])
    assert "".join(text.token_texts(ids[:-2])) == text.decode(ids[:-2])
