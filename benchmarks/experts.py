"""What deltas of experts cost a decode step: a small random Qwen3-MoE, its base and its variants.

    python -m benchmarks.experts --rows 8

Counts the process's CPU time, which other processes on the machine disturb less than a clock. The
weights are random, so rows choose experts about evenly: as many (expert, variant) pairs as rows can
make, which is the worst case.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from compressor.artifact.reader import read_artifact
from compressor.artifact.writer import ArtifactWriter
from compressor.compress.options import NO_CODER, Options
from compressor.compress.pipeline import compress
from server.engine.build import EngineParts, build_engine
from server.engine.lifecycle import Events
from server.engine.request import Request
from server.engine.types import SamplingParams
from server.settings import Settings

PROMPT, SETTLE, STEPS, ROUNDS = 16, 5, 30, 3
RATIO = 32


def make_models(folder: Path, tokenizer: Path, n_variants: int, args: argparse.Namespace) -> None:
    """A base and compressed variants of it: `all-N` change everything, `dense-N` no expert and no
    router.
    """
    config = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=args.hidden // 8,
        intermediate_size=2 * args.hidden,
        moe_intermediate_size=args.hidden // 2,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        vocab_size=len(AutoTokenizer.from_pretrained(tokenizer)),
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    _save(model, folder / "base", tokenizer)
    for i in range(n_variants):
        model.load_state_dict(start)
        _change(model, seed=i)
        _save(model, folder / "tuned", tokenizer)
        options = Options(codec="blockdiag", ratio=RATIO, entropy=NO_CODER)
        compress(folder / "base", folder / "tuned", folder / "deltas" / f"all-{i}", options)
        _without_experts(folder / "deltas" / f"all-{i}", folder / "deltas" / f"dense-{i}")


def _change(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value += 0.02 * value.std() * torch.randn(value.shape, generator=generator)


def _without_experts(delta: Path, out: Path) -> None:
    artifact = read_artifact(delta)
    with ArtifactWriter(out, run_key="dense") as writer:
        for tensor in artifact.tensors:
            if ".mlp." not in tensor.name:
                writer.add(tensor)
        writer.finish(artifact.config, artifact.aux)


def _save(model: PreTrainedModel, path: Path, tokenizer: Path) -> None:
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path)


def make_core(folder: Path) -> EngineParts:
    def deliver(events: Events) -> None:
        for request, event in events:
            request.deliver(event)

    settings = Settings(
        base=folder / "base",
        deltas=folder / "deltas",
        served_base_name="base",
        device="cpu",
        dtype="float32",
        compile_kernels="wait",
        kv_cache_bytes=64 << 20,
    )
    return build_engine(settings, deliver)


def step_ms(parts: EngineParts, names: Sequence[str]) -> list[float]:
    """CPU milliseconds of each of `STEPS` steps that decode a row of each of these."""
    requests = []
    for i, name in enumerate(names):
        requests.append(
            Request(
                request_id=f"{name}-{i}-{time.monotonic_ns()}",
                variant=parts.catalog.open(name),
                prompt_ids=[(7 * i + j) % 200 + 20 for j in range(PROMPT)],
                params=SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True),
                deliver=lambda event: None,
            )
        )
        parts.core.submit(requests[-1])
    while min(r.n_output for r in requests) < SETTLE:
        parts.core.turn()
    times = []
    for _ in range(STEPS):
        before = time.process_time()
        parts.core.turn()
        times.append(1e3 * (time.process_time() - before))
    for request in requests:
        parts.core.abort(request)
    while parts.core.n_open:
        parts.core.turn()
    return times


def mixes(n_rows: int) -> Iterator[tuple[str, list[str]]]:
    """What the rows of a step are."""
    yield "base", ["base"] * n_rows
    yield "one variant, no experts changed", ["dense-0"] * n_rows
    yield "one variant", ["all-0"] * n_rows
    yield "a variant each, no experts changed", [f"dense-{i}" for i in range(n_rows)]
    yield "a variant each", [f"all-{i}" for i in range(n_rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokenizer", type=Path, required=True, help="any model directory")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        make_models(Path(name), args.tokenizer, args.rows, args)
        parts = make_core(Path(name))
        found: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for mix, names in mixes(args.rows):
                found.setdefault(mix, []).append(statistics.median(step_ms(parts, names)))
        parts.core.loader.close()
        parts.core.reconstructor.close()
        parts.text.close()
    base = statistics.median(found["base"])
    for mix, values in found.items():
        middle = statistics.median(values)
        span = f"{min(values):.1f} to {max(values):.1f}"
        print(f"{mix:36} {middle:7.1f} ms ({span}), {middle / base:.2f}")


if __name__ == "__main__":
    main()
