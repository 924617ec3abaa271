"""Names to variants: changed, deleted and replaced artifacts, and what a variant brings along."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.compress.pipeline import compress
from compressor.export.reconstruct import reconstruct
from server.errors import (
    DeltaBroken,
    DeltaUnusable,
    InvalidRequest,
    ModelNotFound,
)
from tests.compressor.artifacts import edit_config, seal
from tests.server.conftest import PAIR, Served
from tests.server.engine.test_core import assert_true_text
from tests.server.helpers import CoreHarness

PROMPT = "The quick brown fox"
MESSAGES = [{"role": "user", "content": "Say something."}]
Make = Callable[..., CoreHarness]


@pytest.fixture(scope="module")
def zoo(
    served: Callable[..., Served],
    tiny_llama_ft_vocab: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Served:
    """The llama pair and `vocab`: added tokens, its own template, generation config and EOS."""
    pair, folder = served("llama", PAIR), tmp_path_factory.mktemp("zoo")
    tuned = shutil.copytree(tiny_llama_ft_vocab, folder / "ft")
    generation = {"eos_token_id": [2, 321], "temperature": 0.6, "top_p": 0.9, "do_sample": True}
    (tuned / "generation_config.json").write_text(json.dumps(generation))
    deltas = shutil.copytree(pair.deltas, folder / "deltas")
    compress(pair.base, tuned, deltas / "vocab", PAIR["blockdiag"])
    merged = reconstruct(pair.base, deltas / "vocab", folder / "merged", dtype="float32")
    return replace(pair, deltas=deltas, checkpoints=pair.checkpoints | {"vocab": merged})


@pytest.fixture
def own(zoo: Served, tmp_path: Path) -> Served:
    """The zoo with a deltas directory that the test may change."""
    return replace(zoo, deltas=shutil.copytree(zoo.deltas, tmp_path / "deltas"))


def put(source: Path, target: Path) -> None:
    """Replace an artifact by another one."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


# -- names ---------------------------------------------------------------------------------------


def test_open_unknown_name_is_not_found_and_never_the_base(zoo: Served, harness: Make) -> None:
    catalog = harness(zoo).catalog
    for name in ("nobody", "", "base:nobody", "../deltas/vocab", "blockdiag/", "x" * 10_000):
        with pytest.raises(ModelNotFound) as caught:
            catalog.open(name)
        assert len(caught.value.message) < 300


def test_open_with_the_bases_prefix_is_the_same_variant(zoo: Served, harness: Make) -> None:
    catalog = harness(zoo).catalog
    assert catalog.open("base:impart") == catalog.open("impart")
    assert catalog.open("impart").fingerprint != catalog.open("blockdiag").fingerprint


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_open_damaged_artifact_is_refused_without_a_path(own: Served, harness: Make) -> None:
    flip_a_bit(own.deltas / "vocab" / "tokenizer.json")
    engine = harness(own)
    for _ in range(2):
        with pytest.raises(DeltaBroken) as caught:
            engine.catalog.open("vocab")
        assert "Corrupt" in caught.value.message
        assert str(own.deltas) not in caught.value.message
    shown = engine.catalog.open_error(engine.catalog.registry.get("vocab"))
    assert "Corrupt" in shown
    assert str(own.deltas) not in shown
    good = engine.submit("impart", PROMPT)
    engine.run(good)
    assert_true_text(own, good)


def test_open_does_not_touch_the_weights(own: Served, harness: Make) -> None:
    engine, later = harness(own), harness(own)
    want = engine.catalog.open("vocab")
    (own.deltas / "vocab" / "delta.safetensors").unlink()
    got = later.catalog.open("vocab")
    assert (got.key, got.vocab_size) == (want.key, want.vocab_size)
    assert engine.encode(got, "<extra_1> fox") == engine.encode(want, "<extra_1> fox")


@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink])
def test_damaged_weights_fail_their_requests_and_are_served_once_mended(
    own: Served, harness: Make, damage: Callable[[Path], None]
) -> None:
    weights = own.deltas / "vocab" / "delta.safetensors"
    whole = weights.read_bytes()
    engine = harness(own)
    damage(weights)
    for _ in range(2):
        bad = [engine.submit("vocab", PROMPT) for _ in range(2)]
        good = engine.submit("impart", PROMPT)
        engine.run(*bad, good)
        for one in bad:
            assert isinstance(one.error, DeltaBroken)
            assert (one.error.status, one.error.param) == (424, "model")
            assert one.error.retry_after_s is None
            assert one.error.message.startswith("`vocab` cannot be served: Corrupt: delta.safe")
            assert str(own.deltas) not in one.error.message
            assert one.output_ids == []
        assert_true_text(own, good)
        engine.assert_idle()
    weights.write_bytes(whole)  # the digest is the same: nothing needs to be scanned
    mended = engine.submit("vocab", PROMPT)
    engine.run(mended)
    assert mended.error is None
    assert mended.output_ids == own.truth("vocab", mended.request.prompt_ids)[:16]
    engine.assert_idle()


def test_damaged_weights_replaced_by_another_artifact_are_served_after_rescan(
    own: Served, harness: Make
) -> None:
    flip_a_bit(own.deltas / "impart" / "delta.safetensors")
    engine = harness(own)
    bad = engine.submit("impart", PROMPT)
    engine.run(bad)
    assert isinstance(bad.error, DeltaBroken)
    put(own.deltas / "blockdiag", own.deltas / "impart")
    engine.catalog.rescan()
    good = engine.submit("impart", PROMPT)
    engine.run(good)
    assert good.output_ids == own.truth("blockdiag", good.request.prompt_ids)[:16]
    engine.assert_idle()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff\xfe"),
        ("generation_config.json", b"[1]"),
        ("generation_config.json", b"{"),
    ],
)
def test_open_unusable_text_files_are_refused_without_a_path(
    own: Served, harness: Make, file: str, content: bytes
) -> None:
    (own.deltas / "vocab" / file).write_bytes(content)
    seal(own.deltas / "vocab")
    with pytest.raises(DeltaBroken) as caught:
        harness(own).catalog.open("vocab")
    assert "/" not in caught.value.message


# -- changes on disk -----------------------------------------------------------------------------


def test_changed_artifact_is_a_new_digest_and_running_requests_keep_the_old(
    own: Served, harness: Make
) -> None:
    engine = harness(own)
    old = [engine.submit("blockdiag", PROMPT, max_tokens=18) for _ in range(3)]
    engine.until(lambda: all(r.request.n_output > 2 for r in old))
    put(own.deltas / "impart", own.deltas / "blockdiag")
    engine.catalog.rescan()
    new = [engine.submit("blockdiag", PROMPT, max_tokens=18) for _ in range(3)]
    engine.run(*old, *new)
    assert_true_text(own, *old)
    for one in new:
        assert one.request.variant.name == "blockdiag"
        assert one.request.variant.digest != old[0].request.variant.digest
        assert one.output_ids == own.truth("impart", one.request.prompt_ids)[:18]
    engine.assert_idle()


def test_deleted_after_load_keeps_serving_until_rescan(own: Served, harness: Make) -> None:
    engine = harness(own)
    running = engine.submit("impart", PROMPT)
    engine.until(lambda: running.request.n_output > 0)
    shutil.rmtree(own.deltas / "impart")
    more = engine.submit("impart", "x")
    engine.run(running, more)
    assert_true_text(own, running, more)
    engine.catalog.rescan()
    with pytest.raises(ModelNotFound):
        engine.catalog.open("impart")


def test_replaced_before_load_says_so_and_works_after_rescan(own: Served, harness: Make) -> None:
    engine = harness(own)
    put(own.deltas / "blockdiag", own.deltas / "impart")
    with pytest.raises(DeltaUnusable) as caught:
        engine.catalog.open("impart")
    assert "changed" in caught.value.message
    assert "rescan" in caught.value.message
    engine.catalog.rescan()
    assert engine.catalog.open("impart").digest == engine.catalog.open("blockdiag").digest


def test_replaced_between_open_and_reload_fails_clearly_and_never_mixes(
    own: Served, harness: Make
) -> None:
    engine = harness(own, max_resident_variants=1)
    engine.run(engine.submit("impart", "x"))
    engine.run(engine.submit("blockdiag", "x"))  # evicts it; its bytes must be read again
    put(own.deltas / "vocab", own.deltas / "impart")
    late = engine.submit("impart", PROMPT)
    engine.run(late)
    assert isinstance(late.error, DeltaUnusable)
    assert "changed" in late.error.message
    assert "rescan" in late.error.message
    engine.assert_idle()


def test_renamed_artifact_is_read_where_it_is_now(own: Served, harness: Make) -> None:
    engine = harness(own, max_resident_variants=1)
    engine.run(engine.submit("impart", "x"))
    engine.run(engine.submit("blockdiag", "x"))
    (own.deltas / "impart").rename(own.deltas / "new-name")
    engine.catalog.rescan()
    one = engine.submit("new-name", PROMPT)
    engine.run(one)
    assert one.error is None
    assert one.output_ids == own.truth("impart", one.request.prompt_ids)[:16]


def test_same_bytes_under_two_names_share_one_slot(own: Served, harness: Make) -> None:
    put(own.deltas / "impart", own.deltas / "twin")
    engine = harness(own)
    sent = [engine.submit(name, PROMPT) for name in ("impart", "twin")]
    engine.run(*sent)
    assert [r.request.variant.name for r in sent] == ["impart", "twin"]
    assert sent[0].output_ids == sent[1].output_ids
    assert len(engine.core.stats().resident) == 1


def test_damaged_copy_does_not_keep_its_twin_from_being_served(own: Served, harness: Make) -> None:
    for name in ("a-copy", "z-copy"):
        put(own.deltas / "impart", own.deltas / name)
    flip_a_bit(own.deltas / "a-copy" / "delta.safetensors")
    for name in ("impart", "a-copy"):
        engine = harness(own)
        one = engine.submit(name, PROMPT)
        engine.run(one)
        assert one.error is None
        assert one.output_ids == own.truth("impart", one.request.prompt_ids)[:16]


# -- what a variant brings along -----------------------------------------------------------------


def test_variant_uses_its_own_tokenizer_template_and_generation_config(
    zoo: Served, harness: Make
) -> None:
    engine = harness(zoo)
    base, vocab, plain = (engine.catalog.open(name) for name in ("base", "vocab", "impart"))
    tuned = AutoTokenizer.from_pretrained(zoo.checkpoints["vocab"])
    text = "<extra_1> fox"
    assert engine.encode(vocab, text) == tuned.encode(text)
    assert 321 in engine.encode(vocab, text)
    plainly = engine.encode(plain, text)
    assert engine.encode(base, text) == plainly != engine.encode(vocab, text)
    rendered = engine.render(vocab, MESSAGES, add_generation_prompt=False)
    assert vocab.text.decode(rendered) == "[user] Say something.\n"
    assert "<|im_start|>" in base.text.decode(engine.render(base, MESSAGES))
    assert vocab.text.eos_token_ids == {2, 321}
    assert vocab.defaults == {"temperature": 0.6, "top_p": 0.9}
    assert (base.vocab_size, plain.vocab_size, vocab.vocab_size) == (320, 320, 323)
    assert plain.text.eos_token_ids == base.text.eos_token_ids == {2}


def test_files_the_fine_tune_dropped_are_not_taken_from_the_base(
    zoo: Served, harness: Make, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    tuned = shutil.copytree(tiny_llama_ft, tmp_path / "ft")
    (tuned / "chat_template.jinja").unlink()
    (tuned / "generation_config.json").unlink()
    config = json.loads((tuned / "config.json").read_bytes())
    (tuned / "config.json").write_text(json.dumps(config | {"eos_token_id": 4}))
    compress(zoo.base, tuned, tmp_path / "deltas" / "bare", PAIR["blockdiag"])
    engine = harness(replace(zoo, deltas=tmp_path / "deltas"))
    bare = engine.catalog.open("bare")
    assert bare.text.eos_token_ids == {4}
    with pytest.raises(InvalidRequest, match="no chat template"):
        engine.render(bare, MESSAGES)


def test_template_that_raises_is_the_clients_error(own: Served, harness: Make) -> None:
    template = own.deltas / "vocab" / "chat_template.jinja"
    template.write_text("{{ raise_exception('roles must alternate') }}")
    seal(own.deltas / "vocab")
    engine = harness(own)
    vocab = engine.catalog.open("vocab")
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        engine.render(vocab, MESSAGES)


@pytest.mark.parametrize("mode", ["apply", "reconstruct"])
def test_added_tokens_are_for_their_variant_only(zoo: Served, harness: Make, mode: str) -> None:
    """One batch's logits are as wide as its widest variant; the others must not see the rest."""
    engine = harness(zoo, mode=mode)
    # Hot enough for every id to be drawn.
    hot = {"temperature": 50.0, "max_tokens": 100, "ignore_eos": True, "logprobs": 5}
    prompt = engine.encode(engine.catalog.open("vocab"), "<extra_0> fox<extra_2>")
    sent = [engine.submit("vocab", prompt, seed=i, **hot) for i in range(8)]
    others = [engine.submit(name, PROMPT, seed=i, **hot) for i in range(2) for name in PAIR]
    others += [engine.submit("base", PROMPT, seed=i, **hot) for i in range(2)]
    exact = engine.submit("vocab", prompt, ignore_eos=True)
    engine.run(*sent, *others, exact)
    assert any(token >= 320 for one in sent for token in one.output_ids)
    for one in others:
        assert max(one.output_ids) < 320
        tops = [t.token_id for d in one.chunks for p in d.logprobs for t in p.top]
        assert max(tops) < 320
    model = AutoModelForCausalLM.from_pretrained(zoo.checkpoints["vocab"], dtype=torch.float32)
    want = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=16, eos_token_id=None
    )
    assert exact.output_ids == want[0, len(prompt) :].tolist()


def test_variant_that_no_server_takes_is_listed_so_and_is_424_at_once(
    own: Served, harness: Make
) -> None:
    """Rows of the output layer alone: tokens that could be chosen but not read."""

    def only_the_head_grew(record: dict[str, Any]) -> None:
        for entry in record["tensors"]:
            if entry["name"] == "model.embed_tokens.weight":
                entry["shape"] = entry.pop("base_shape")
                entry.pop("exact")

    edit_config(own.deltas / "vocab", only_the_head_grew)
    core = harness(own)
    (listed,) = [delta for delta in core.catalog.registry.all() if delta.name == "vocab"]
    assert listed.error is not None
    assert "could be chosen but not read" in listed.error
    with pytest.raises(DeltaBroken, match=r"vocab.*lm_head\.weight: it has rows for tokens"):
        core.catalog.open("vocab")
