"""Deltas that use every codec with every bit width, and the artifact that holds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from compressor.artifact.writer import ArtifactWriter
from compressor.codecs import DenseRows, Params, TensorDelta, Term, lowrank_from_factors
from compressor.encoders.codec import make_encoder
from compressor.encoders.rows import encode_largest_rows
from compressor.encoders.sources import TensorSource
from compressor.plan.settings import with_bytes
from tests.compressor.artifacts import CONFIG
from tests.compressor.codec_oracles import encode, random_matrix

SHAPE = (22, 18)
EVEN_SHAPE = (24, 16)  # whose codes fill bytes, so that they are stored in the order of kernels
QT_SHAPE = (64, 60)  # so that all three classes of components occur
TIED = (("lm_head.weight", "embed.weight"),)


def every_delta() -> list[TensorDelta]:
    """Every term alone, and parameters of every other kind: exact, grown, new, tied, transposed."""
    made = [_of_terms(f"term.{name}", terms) for name, terms in every_term()]
    head = make_encoder("blockdiag", bits=2, head_fraction=0.5)
    terms = encode(head, random_matrix(SHAPE), head.fit(SHAPE, 150))
    assert [term.codec for term in terms] == ["lowrank", "blockdiag"]
    made.append(_of_terms("several.terms", terms))
    made.append(TensorDelta("transposed", SHAPE, SHAPE, True, terms, None))
    m, n = SHAPE
    added = DenseRows(m, random_matrix((3, n), 3, 1.0).bfloat16())
    made.append(TensorDelta("embed.weight", (m + 3, n), SHAPE, False, terms, added))
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        vector = DenseRows(0, random_matrix((1, 5), 4, 1.0)[0].to(dtype))
        made.append(TensorDelta(f"norm.{dtype}", (5,), (5,), False, (), vector))
    made.append(TensorDelta("new.bias", (5,), (0,), False, (), vector))
    table = DenseRows(0, random_matrix((4, 6), 5, 1.0))
    made.append(TensorDelta("router.weight", (4, 6), (4, 6), False, (), table))
    middle = DenseRows(2, random_matrix((1, 6), 6, 1.0))
    made.append(TensorDelta("row.in.the.middle", (4, 6), (4, 6), False, (), middle))
    return made


def every_term() -> Iterator[tuple[str, tuple[Term, ...]]]:
    """Terms of each codec by a name that says its settings; blocks of unequal sizes too."""
    matrix = random_matrix(SHAPE)
    for bits in (2, 3, 4, 8, 16):
        for scale_bits in (8, 16) if bits != 16 else (16,):
            blocks = make_encoder("blockdiag", bits=bits, scale_bits=scale_bits)
            for n_blocks in (1, 2, 4, 18):
                params: Params = {"bits": bits, "n_blocks": n_blocks}
                yield f"blockdiag.{bits}.{scale_bits}.{n_blocks}", encode(blocks, matrix, params)
    factors = random_matrix((5, SHAPE[1])), random_matrix((5, SHAPE[0]), 1, 1.0)
    for bits in (2, 3, 4, 8, 16, 32):
        yield f"lowrank.{bits}", (lowrank_from_factors(*factors, bits),)
    for bits in (2, 3, 4, 8):
        yield f"rows.{bits}", (encode_largest_rows("rows", TensorSource(matrix), 5, bits),)
    yield from every_term_in_columns()
    sampled: Params = {"beta": 0.0, "C": 1.0, "block_rows": 8}
    yield "impart", encode(make_encoder("impart"), matrix, sampled | {"kept": 6})
    quantised = make_encoder("impart-qt")
    for payload in (130, 2200):
        params = sampled | {"payload": payload, "gptq": False}
        terms = encode(quantised, random_matrix(QT_SHAPE), params)
        yield f"impart-qt.{payload}", terms


def every_term_in_columns() -> Iterator[tuple[str, tuple[Term, ...]]]:
    """Terms whose codes are in the order of kernels, both factors of a low-rank one."""
    matrix = random_matrix(EVEN_SHAPE)
    factors = random_matrix((4, EVEN_SHAPE[1])), random_matrix((4, EVEN_SHAPE[0]), 1, 1.0)
    for bits in (2, 4, 8):
        blocks = make_encoder("blockdiag", bits=bits)
        for n_blocks in (1, 2, 4):
            params: Params = {"bits": bits, "n_blocks": n_blocks}
            yield f"blockdiag.columns.{bits}.{n_blocks}", encode(blocks, matrix, params)
        yield f"lowrank.columns.{bits}", (lowrank_from_factors(*factors, bits),)
        source = TensorSource(matrix)
        yield f"rows.columns.{bits}", (encode_largest_rows("rows", source, 5, bits),)


def write_every_codec(path: Path, *, coded: bool) -> str:
    """Write the artifact of `every_delta`, entropy coded or not, and return its digest."""
    config = replace(CONFIG, base=replace(CONFIG.base, tied=TIED))
    with ArtifactWriter(path, run_key="every codec") as writer:
        for delta in every_delta():
            writer.add(delta, 0.5)
        if coded:
            found = writer.write_tensors(
                group_of=lambda entry, is_exact: "exact rows" if is_exact else entry.name[:4],
                coded=True,
                always=True,
            )
            config = with_bytes(config, found)
        return writer.finish(config, {"chat_template.jinja": b"{{ messages }}"}, b"# card\n")


def _of_terms(name: str, terms: tuple[Term, ...]) -> TensorDelta:
    shape = terms[0].shape
    return TensorDelta(name, shape, shape, False, terms, None)
