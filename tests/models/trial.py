"""One case from end to end: compress, reconstruct, serve alone and mixed, against transformers."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from compressor.artifact.inspection import check
from compressor.artifact.reader import read_artifact
from compressor.checkpoint.layout import read_layout
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.errors import BudgetError
from compressor.export.reconstruct import reconstruct
from tests.models.builder import NotBuilt, Pair, build, prompt_of
from tests.models.cases import Case
from tests.models.outcome import EXACT, FAULTS, Outcome, Row, described, outcome_of
from tests.models.truth import N_TOKENS, Answer, Oracle
from tests.server.helpers import CoreHarness, Recorded

# Shorter than every window and chunk, again, and longer than several.
PROMPTS = (prompt_of(13, seed=11), prompt_of(13, seed=12), prompt_of(129, seed=13))
# A tiny model of many vectors cannot be made as small as a real one.
RATIOS = (8.0, 4.0, 3.0, 2.5, 2.0, 1.5, 1.35, 1.2)
CODEC = Options(codec="blockdiag")


@dataclass
class Trial:
    """One case under way: what was made of it, and the row so far."""

    case: Case
    folder: Path
    options: Options = CODEC
    kernels: tuple[str, ...] = ("torch",)
    row: Row = field(init=False)
    paths: dict[str, Path] = field(default_factory=dict)  # of checkpoints, by served name

    def __post_init__(self) -> None:
        self.row = Row(self.case.name)

    def run(self) -> Row:
        try:
            pair = build(self.case, self.folder)
        except NotBuilt as error:
            return self.row.all_cells(Outcome("missing", str(error)))
        self.paths["base"] = pair.base
        (self.folder / "deltas").mkdir()
        self.row = replace(self.row, compress=self.compressed(pair))
        if self.row.compress == EXACT:
            self.row = replace(self.row, reconstruct=self.reconstructed(pair))
        self.served()
        return self.row

    def compressed(self, pair: Pair) -> Outcome:
        """Compress and verify both fine-tunes."""
        try:
            for i, tuned in enumerate(pair.finetunes):
                out = self.folder / "deltas" / f"v{i}"
                compress_within_budget(pair.base, tuned, out, self.options)
                check(out, pair.base)
        except Exception as error:
            return outcome_of(error)
        return EXACT

    def reconstructed(self, pair: Pair) -> Outcome:
        """Write both checkpoints again and hold them to base, terms and fine-tune."""
        try:
            for i, tuned in enumerate(pair.finetunes):
                delta, out = self.folder / "deltas" / f"v{i}", self.folder / f"again-{i}"
                reconstruct(pair.base, delta, out, dtype="float32")
                if (fault := stored_fault(pair.base, tuned, delta, out)) is not None:
                    return Outcome("wrong", fault)
                self.paths[f"v{i}"] = out
        except Exception as error:
            return outcome_of(error)
        return EXACT

    def served(self) -> None:
        """Serve base and variants; fill in their cells."""
        oracles: dict[str, Oracle] = {}
        for name, path in self.paths.items():
            fault = None
            try:
                oracles[name] = Oracle(path)
                if name != "base" and oracles[name].missing_keys:
                    fault = f"it lacks {oracles[name].missing_keys[0]}"
            except Exception as error:
                fault = f"transformers does not load it: {described(error)}"
            if fault is not None and name != "base":
                self.row = replace(self.row, reconstruct=Outcome("wrong", fault))
        truths, logged = Truths(oracles), LastError()
        logging.getLogger("server").addHandler(logged)
        try:
            for kernels in self.kernels:
                self._serve(kernels, truths)
                if self.row.base != EXACT or self.row.variant.state in FAULTS:
                    break
        finally:
            logging.getLogger("server").removeHandler(logged)
        self.row = replace(
            self.row,
            base=logged.explains(self.row.base),
            variant=logged.explains(self.row.variant),
        )
        notes = {note for oracle in oracles.values() for note in oracle.notes}
        self.row = replace(self.row, notes=tuple(sorted(notes)))

    def _serve(self, kernels: str, truths: Truths) -> None:
        try:
            engine = CoreHarness(
                self.paths["base"], self.folder / "deltas", kernels=kernels, self_check=True
            )
        except Exception as error:
            self.row = replace(self.row, base=outcome_of(error))
            return
        truths.limit(engine.max_model_len - N_TOKENS)
        try:
            base = served_alone(engine, "base", truths)
            variant = self.row.variant
            if "v0" in self.paths:
                variant = served_alone(engine, "v0", truths)
            if variant == EXACT:
                everything = [(name, i) for i in range(len(PROMPTS)) for name in self.paths]
                mixed = served_together(engine, everything, truths, "mixed")
                base = mixed["base"] if base == EXACT else base
                variant = mixed["v0"] if mixed["v0"] != EXACT else mixed["v1"]
            self.row = replace(self.row, base=base, variant=variant)
        finally:
            engine.close()


class LastError(logging.Handler):
    """The last exception that the engine logged: its clients are not told."""

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info is not None and record.exc_info[1] is not None:
            self.error = record.exc_info[1]

    def explains(self, outcome: Outcome) -> Outcome:
        """The outcome, with what is behind a crash in the engine."""
        if outcome.state != "crash" or self.error is None:
            return outcome
        return Outcome("crash", described(self.error))


class Truths:
    """Transformers' answers, asked for when first wanted; an answer it fails to give is None."""

    def __init__(self, oracles: dict[str, Oracle]) -> None:
        self._oracles = oracles
        self._known: dict[tuple[str, int], Answer | None] = {}
        self.prompts = PROMPTS

    def limit(self, length: int) -> None:
        """Cut prompts that are longer than the engine says it takes."""
        self.prompts = tuple(prompt[-length:] for prompt in PROMPTS)

    def of(self, name: str, prompt: int) -> Answer | None:
        key = (name, prompt)
        if key not in self._known:
            try:
                self._known[key] = self._oracles[name].answer(self.prompts[prompt])
            except Exception:
                self._known[key] = None
        return self._known[key]


def compress_within_budget(base: Path, tuned: Path, out: Path, options: Options) -> None:
    """Compress at the highest ratio that the model can be made so small for."""
    for ratio in RATIOS:
        try:
            compress(base, tuned, out, replace(options, ratio=ratio))
        except BudgetError:
            if ratio == RATIOS[-1]:
                raise
        else:
            return


def stored_fault(base: Path, tuned: Path, delta: Path, out: Path) -> str | None:
    """What is wrong with a reconstructed checkpoint: a matrix that is not base plus terms, or a
    vector that is not the fine-tune's.
    """
    before, wanted, made = (parameters_of(path) for path in (base, tuned, out))
    if made.keys() != wanted.keys():
        return f"{min(made.keys() ^ wanted.keys())} is in one checkpoint alone"
    changes = {tensor.name: tensor for tensor in read_artifact(delta).tensors if tensor.terms}
    for name, value in made.items():
        expected = wanted[name]
        if name in changes:
            change = torch.stack([term.to_dense() for term in changes[name].terms]).sum(0)
            change = change.T if changes[name].transposed else change
            rows = before[name] + change.reshape(before[name].shape)
            expected = torch.cat([rows, wanted[name][len(rows) :]])
        if value.shape != expected.shape:
            return f"{name} has shape {list(value.shape)}, not {list(expected.shape)}"
        gap = float((value.double() - expected.double()).abs().max()) if value.numel() else 0.0
        if not gap <= 1e-6:
            return f"{name} is off by {gap:.2g}"
    return None


def parameters_of(path: Path) -> dict[str, torch.Tensor]:
    """Every parameter of a checkpoint; of a tensor that holds experts, each one's matrix."""
    stored = load_folder(path)
    values = {}
    for name, key in read_layout(path).keys(stored, path.name).items():
        whole, _, index = key.partition("[")
        values[name] = stored[whole][int(index[:-1])] if index else stored[whole]
    return values


def load_folder(path: Path) -> dict[str, torch.Tensor]:
    return {
        name: value
        for file in sorted(path.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def served_alone(engine: CoreHarness, name: str, truths: Truths) -> Outcome:
    """One model by itself: a prompt alone, then the two others together."""
    for prompts in ([0], [1, 2]):
        found = served_together(engine, [(name, i) for i in prompts], truths, "alone")[name]
        if found != EXACT:
            return found
    return EXACT


def served_together(
    engine: CoreHarness, asked: list[tuple[str, int]], truths: Truths, how: str
) -> dict[str, Outcome]:
    """Models and prompts at once; the first outcome of every model that is not exact."""
    found = {name: EXACT for name, _ in asked}
    try:
        answers = {(name, i): submit(engine, name, truths.prompts[i], how) for name, i in asked}
        engine.run(*answers.values())
    except Exception as error:
        return dict.fromkeys(found, outcome_of(error))
    for (name, i), recorded in answers.items():
        if found[name] == EXACT:
            truth = truths.of(name, i) if recorded.error is None else None
            found[name] = compared(recorded, truth, f"{name} {how}, prompt {i}")
    return found


def submit(engine: CoreHarness, name: str, prompt: list[int], salt: str) -> Recorded:
    settings: dict[str, Any] = {"max_tokens": N_TOKENS, "ignore_eos": True, "logprobs": 0}
    return engine.submit(name, prompt, cache_salt=salt, **settings)


def compared(recorded: Recorded, truth: Answer | None, where: str) -> Outcome:
    """Hold what a request received to the truth."""
    if recorded.error is not None:
        return outcome_of(recorded.error)
    if truth is None:
        return Outcome("wrong", "it is served, and transformers cannot run it")
    logprobs = tuple(entry.logprob or 0.0 for chunk in recorded.chunks for entry in chunk.logprobs)
    found = Answer(tuple(recorded.output_ids), logprobs)
    difference = truth.difference(found)
    return EXACT if difference is None else Outcome("wrong", f"{where}: {difference}")
