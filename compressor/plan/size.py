"""The byte budget: what an artifact takes besides its terms, from bytes that were really written.

A sample of the tensors is encoded, coded and described as all will be; every kind of tensor (its
group and shape) has a share in it, for what coding leaves depends on the codec and its bits, hardly
on which layer. The same function then takes all of them, and nothing is estimated any more.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from compressor.artifact.assembly import GroupOf, TensorBytes, assemble, headers_bytes
from compressor.artifact.card import model_card
from compressor.artifact.config import DeltaConfig, TensorEntry, dump_config
from compressor.artifact.files import CONFIG, TENSORS, format_checksums
from compressor.artifact.staging import StagedTensor
from compressor.checkpoint.groups import exact_group_of, group_of
from compressor.checkpoint.pairing import TensorPair
from compressor.encoders.codec import Codec
from compressor.errors import BudgetError
from compressor.plan.budget import check_ratio

_LEAST_SHARE = 0.5  # what repeats more than this says more of the sample than of the rest

Kind = tuple[str, tuple[int, ...], bool]


@dataclass(frozen=True, slots=True)
class Overhead:
    """What bytes go to besides the terms as they are before coding.

    fixed_bytes  of everything but terms
    share        of the terms' bytes that coding leaves
    plain_bytes  `fixed_bytes` were nothing coded
    """

    fixed_bytes: float
    share: float
    plain_bytes: float

    def for_terms(self, target_bytes: float) -> float:
        """Bytes of terms, before coding, with which the artifact comes to `target_bytes`."""
        return (target_bytes - self.fixed_bytes) / self.share


def groups_by_entry(pairs: Iterable[TensorPair]) -> GroupOf:
    """The byte table's groups for the tensors of these parameters."""
    by_name = {pair.name: pair for pair in pairs}

    def group(entry: TensorEntry, is_exact: bool) -> str:
        pair = by_name[entry.name]
        return exact_group_of(pair) if is_exact else group_of(pair)

    return group


def before_encoding(
    pairs: Sequence[TensorPair], config: DeltaConfig, companions: Mapping[str, bytes]
) -> Overhead:
    """As much as is known of the overhead before anything is encoded: too little."""
    entries = [
        TensorEntry(pair.name, pair.shape, pair.base_shape, pair.transposed, (), pair.exact_start)
        for pair in pairs
    ]
    exact = sum(pair.exact_bytes for pair in pairs)
    known = exact + surroundings_bytes(config, entries, companions)
    return Overhead(known, 1.0, known)


def after_encoding(
    pairs: Sequence[TensorPair],
    codec: Codec,
    staged: Sequence[StagedTensor],
    written: TensorBytes,
    config: DeltaConfig,
    companions: Mapping[str, bytes],
) -> Overhead:
    """The overhead of `pairs`, as planned, by what some of them, or all, came to.

    staged   those that were encoded: at least one of each kind, and all that has exact rows only
    written  what ``delta.safetensors`` takes for them
    """
    tensors = _stand_ins(pairs, staged)
    groups = groups_by_entry(pairs)
    texts = surroundings_bytes(config, (tensor.entry for tensor in tensors), companions)
    exact = Counter[str]()
    for pair in pairs:
        exact[exact_group_of(pair)] += pair.exact_bytes
    left = sum(n_bytes * _left(written, group) for group, n_bytes in exact.items())
    plain_header = headers_bytes(tensors, groups, coded=False)
    header = headers_bytes(tensors, groups, coded=True) if written.is_coded else plain_header
    return Overhead(
        fixed_bytes=texts + header + left,
        share=_share_of_terms(pairs, codec, written),
        plain_bytes=texts + plain_header + exact.total(),
    )


def count(
    config: DeltaConfig, pairs: Iterable[TensorPair], staged: Sequence[StagedTensor]
) -> TensorBytes:
    """Count what delta.safetensors takes, without writing it."""
    return assemble(staged, groups_by_entry(pairs), None, coded=config.coding is not None)


def artifact_bytes(
    config: DeltaConfig,
    staged: Iterable[StagedTensor],
    written: TensorBytes,
    companions: Mapping[str, bytes],
) -> int:
    """Bytes of the whole artifact whose tensors were written, or counted, as `written` says."""
    entries = sorted((tensor.entry for tensor in staged), key=lambda entry: entry.name)
    return written.n_bytes + surroundings_bytes(config, entries, companions)


def surroundings_bytes(
    config: DeltaConfig, entries: Iterable[TensorEntry], companions: Mapping[str, bytes]
) -> int:
    """Bytes of every file but delta.safetensors: configuration, card, checksums, companions."""
    target = round(config.finetuned_bytes / (config.ratio_requested or 1.0))
    digest = hashlib.sha256().hexdigest()
    config = config.with_tensors(tuple(entries))
    return (
        len(dump_config(config))
        + len(model_card(config, target).encode())
        + len(format_checksums(dict.fromkeys((TENSORS, CONFIG, *companions), digest)))
        + sum(map(len, companions.values()))
    )


def check_size(config: DeltaConfig, max_bytes: int | None, n_bytes: int) -> None:
    """Refuse to publish what missed the ratio after all."""
    if max_bytes is not None and n_bytes > max_bytes:
        raise BudgetError(
            f"the artifact came out {n_bytes:,} bytes large; for at most {max_bytes:,} ask for a "
            f"ratio of {1.02 * config.finetuned_bytes / max_bytes:.3g}"
        )
    requested, possible = config.ratio_requested or 1.0, config.finetuned_bytes / n_bytes
    if config.coding is None or possible < requested:  # coding may leave less than can be spent
        check_ratio(requested, possible, "the metadata came out larger than planned")


def _stand_ins(pairs: Sequence[TensorPair], staged: Sequence[StagedTensor]) -> list[StagedTensor]:
    """Each pair's own staged tensor or, under its name, one of its kind."""
    own = {tensor.name: tensor for tensor in staged}
    of_kind: dict[Kind, list[StagedTensor]] = {}
    for pair in pairs:
        if pair.name in own:
            of_kind.setdefault(kind_of(pair), []).append(own[pair.name])
    found = []
    for number, pair in enumerate(pairs):
        tensor = own.get(pair.name)
        if tensor is None:
            alike = of_kind[kind_of(pair)]
            tensor = alike[number % len(alike)]
            tensor = replace(tensor, entry=replace(tensor.entry, name=pair.name))
        found.append(tensor)
    return found


def kind_of(pair: TensorPair) -> Kind:
    """What decides how well a tensor's terms are coded: the sample has some of every kind."""
    return group_of(pair), pair.shape, pair.is_encoded


def _share_of_terms(pairs: Sequence[TensorPair], codec: Codec, written: TensorBytes) -> float:
    raw = Counter[str]()
    for pair in pairs:
        if pair.params is not None:
            raw[group_of(pair)] += codec.size_bytes(pair.matrix_shape, pair.params)
    if not raw.total():
        return 1.0
    left = sum(n * _left(written, group) for group, n in raw.items())
    return min(max(_LEAST_SHARE, left / raw.total()), 1.0)


def _left(written: TensorBytes, group: str) -> float:
    """What coding left of a group; all of one that the sample does not have."""
    return written.stored[group] / written.raw[group] if group in written.raw else 1.0
