"""Whatever goes wrong with a definition is one sentence with a cause."""

from __future__ import annotations

import logging

import pytest

from server.errors import ConfigError
from server.model.refusal import MAX_ERROR_CHARS, refused


def test_unexpected_exception_becomes_a_sentence_and_is_logged_with_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    text = "line one\n  line two " + "x" * 2000
    with pytest.raises(ConfigError) as raised, refused("OddModel", "a pass"):
        raise TypeError(text)
    message = raised.value.message
    assert message.startswith("OddModel cannot be served: a pass failed with TypeError: line one ")
    assert message.endswith("(impart reconstruct) and serve them with vLLM or transformers")
    assert "\n" not in message
    assert len(message) < MAX_ERROR_CHARS + 200
    assert isinstance(raised.value.__cause__, TypeError)
    assert [record.exc_info is not None for record in caplog.records] == [True]


def test_refusal_that_says_what_is_wrong_stays_as_it_is() -> None:
    with pytest.raises(ConfigError, match=r"^just this$"), refused("OddModel", "a pass"):
        raise ConfigError("just this")


def test_exception_without_words_has_its_name() -> None:
    with pytest.raises(ConfigError, match=r"failed with KeyError; make"), refused("M", "a pass"):
        raise KeyError
