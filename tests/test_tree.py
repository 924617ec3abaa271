"""The tests mirror the tree: every module has a test file of its name in the same folder.

``compressor/plan/budget.py`` is tested by ``tests/compressor/plan/test_budget.py``, and by
``test_budget_*.py`` beside it where one file is not enough. What has none is in `ELSEWHERE`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("compressor", "server")

# Module -> the test files that cover it, or why there are none.
ELSEWHERE = {
    "server.engine.names": "tests/server/api/test_registration.py",
    "server.fleet.adapters": "tests/server/api/test_lora.py",
    "server.fleet.folder": "tests/server/fleet/test_fetch.py",
    "server.fleet.names": "tests/server/api/test_registration.py",
    "server.fleet.registrar": "tests/server/api/test_registration.py",
    "compressor.__main__": "tests/compressor/cli/test_app.py",
    "compressor.artifact.entropy": "tests/compressor/artifact/test_coded_file.py",
    "compressor.artifact.inspection": "tests/compressor/cli/test_app.py",
    "compressor.artifact.json_fields": "tests/compressor/artifact/test_reader_attacks.py",
    "compressor.artifact.tensor_file": "tests/compressor/artifact/test_coded_file.py",
    "compressor.auto.bench": "tests/compressor/auto/test_search.py",
    "compressor.auto.goal": "tests/compressor/auto/test_search.py",
    "compressor.auto.kept": "tests/compressor/auto/test_tune.py",
    "compressor.auto.texts": "tests/compressor/auto/test_search.py",
    "compressor.checkpoint.companions": "tests/compressor/compress/test_pipeline.py",
    "compressor.checkpoint.difference": "tests/compressor/checkpoint/test_pairing.py",
    "compressor.checkpoint.folded": "tests/compressor/checkpoint/test_original.py",
    "compressor.checkpoint.folder": (
        "tests/compressor/checkpoint/test_files.py, tests/server/process/test_inputs.py"
    ),
    "compressor.checkpoint.groups": "tests/compressor/compress/test_pipeline.py",
    "compressor.checkpoint.headers": "tests/compressor/checkpoint/test_files.py",
    "compressor.checkpoint.quantised.forms": (
        "tests/compressor/checkpoint/quantised/test_values.py"
    ),
    "compressor.checkpoint.quantised.integers": (
        "tests/compressor/checkpoint/quantised/test_index.py"
    ),
    "compressor.checkpoint.quantised.parts": "tests/compressor/checkpoint/quantised/test_index.py",
    "compressor.checkpoint.quantised.scaled": "tests/compressor/checkpoint/quantised/test_index.py",
    "compressor.cli": "tests/compressor/cli/test_app.py",
    "compressor.cli.certify": "tests/compressor/cli/test_app.py",
    "compressor.cli.check": "tests/server/test_check.py",
    "compressor.cli.compress": "tests/compressor/cli/test_app.py",
    "compressor.cli.eval": "tests/compressor/measure/test_evaluation.py",
    "compressor.cli.export": "tests/compressor/peft/test_export.py",
    "compressor.cli.hub": "tests/compressor/export/test_publish.py",
    "compressor.cli.import_adapter": "tests/compressor/peft/test_importer.py",
    "compressor.cli.inspect": "tests/compressor/cli/test_app.py",
    "compressor.cli.merge": "tests/compressor/merge/test_merge.py",
    "compressor.cli.plan": "tests/server/test_plan.py",
    "compressor.cli.reconstruct": "tests/compressor/cli/test_app.py",
    "compressor.cli.report": "tests/compressor/report/test_html.py",
    "compressor.cli.sign": "tests/compressor/artifact/test_signature.py",
    "compressor.codecs": "tests/compressor/encoders/test_codec.py",
    "compressor.codecs.block_factors": "tests/compressor/codecs/test_impart.py",
    "compressor.codecs.impart_qt_sampling": "tests/compressor/codecs/test_impart_qt.py",
    "compressor.codecs.impart_sampling": "tests/compressor/codecs/test_impart.py",
    "compressor.codecs.partition": "tests/compressor/codecs/test_blockdiag.py",
    "compressor.codecs.quantize_groups": "tests/compressor/codecs/test_impart_qt.py",
    "compressor.codecs.siblings": "tests/compressor/plan/test_budget.py",
    "compressor.codecs.term": "tests/compressor/encoders/test_codec.py",
    "compressor.compress.describe": "tests/compressor/compress/test_pipeline.py",
    "compressor.compress.options": "tests/compressor/compress/test_pipeline.py",
    "compressor.encoders.blockdiag": "tests/compressor/codecs/test_blockdiag.py",
    "compressor.encoders.impart": "tests/compressor/codecs/test_impart.py",
    "compressor.encoders.impart_qt": "tests/compressor/codecs/test_impart_qt.py",
    "compressor.encoders.lowrank": "tests/compressor/codecs/test_lowrank.py",
    "compressor.encoders.rows": "tests/compressor/codecs/test_rows.py",
    "compressor.encoders.single": "tests/compressor/encoders/test_codec.py",
    "compressor.encoders.sources": "tests/compressor/encoders/test_svd.py",
    "compressor.errors": "no code beside the classes; every test that expects an error raises them",
    "compressor.export.mergekit": "tests/compressor/peft/test_export.py",
    "compressor.measure.comparison": "tests/compressor/measure/test_evaluation.py",
    "compressor.measure.swapped_model": "tests/compressor/measure/test_evaluation.py",
    "compressor.measure.texts": "tests/compressor/measure/test_moments.py",
    "compressor.merge.vectors": "tests/compressor/merge/test_merge.py",
    "compressor.peft.config": "tests/compressor/peft/test_adapter.py",
    "compressor.peft.values": "tests/compressor/peft/test_factors.py",
    "compressor.peft.parts": "tests/compressor/peft/test_adapter.py",
    "compressor.peft.rescaled": "tests/compressor/peft/test_importer.py",
    "compressor.printable": "tests/compressor/artifact/test_reader_fuzz.py",
    "compressor.report.data": "tests/compressor/report/test_html.py",
    "compressor.report.plots": "tests/compressor/report/test_html.py",
    "server.api.chat": "tests/server/api/test_openai_client.py",
    "server.api.completions": "tests/server/api/test_openai_client.py",
    "server.api.context": (
        "tests/server/api/test_generation.py, tests/server/api/test_openai_client_limits.py"
    ),
    "server.api.fanout": "tests/server/api/test_generation.py",
    "server.api.fields": "tests/server/api/test_hostile.py",
    "server.api.middleware": "tests/server/api/test_hostile.py",
    "server.api.models": (
        "tests/server/api/test_openai_client.py, "
        "tests/server/api/test_openai_client_real_engine.py, "
        "tests/server/api/test_hostile_folder.py"
    ),
    "server.api.prompts": "tests/server/api/test_hostile.py",
    "server.api.query": "tests/server/api/test_usage.py, tests/server/api/test_keeping.py",
    "server.api.reply": "tests/server/api/test_chunks.py",
    "server.api.schemas": "tests/server/api/test_hostile.py",
    "server.api.sse": "tests/server/api/test_generation.py",
    "server.deltas.footprint": "tests/server/test_plan.py",
    "server.deltas.loads": "tests/server/engine/test_core_variants.py",
    "server.deltas.reader": "tests/server/engine/test_core_variants.py",
    "server.deltas.parameter": "tests/server/engine/test_core_variants.py",
    "server.deltas.pools.base": "tests/server/deltas/pools/test_geometry.py",
    "server.deltas.pools.blockdiag": "tests/server/deltas/pools/test_geometry.py",
    "server.deltas.pools.dense": "tests/server/deltas/pools/test_geometry.py",
    "server.deltas.pools.impart": "tests/server/deltas/pools/test_geometry.py",
    "server.deltas.pools.rows": "tests/server/deltas/pools/test_geometry.py",
    "server.deltas.residency": "tests/server/engine/step/test_static_step_parity.py",
    "server.engine.accounting": "tests/server/engine/test_core.py",
    "server.engine.check.steps": "tests/server/engine/check/test_selfcheck.py",
    "server.engine.events": "tests/server/api/test_delta_events.py",
    "server.engine.life_types": "tests/server/api/test_delta_life.py",
    "server.engine.lifecycle": "tests/server/engine/test_core.py",
    "server.engine.observer": "tests/server/engine/test_core.py",
    "server.engine.request": "tests/server/engine/test_core.py",
    "server.engine.schedule.fcfs": "tests/server/engine/schedule/test_fair.py",
    "server.engine.schedule.queue": "tests/server/engine/schedule/test_fair.py",
    "server.engine.schedule.scheduled": "tests/server/engine/test_core_prefill.py",
    "server.engine.schedule.scheduler": "tests/server/engine/test_core_prefill.py",
    "server.engine.step.batch": "tests/server/engine/test_core_prefill.py",
    "server.engine.step.postprocess": "tests/server/engine/step/test_sampler.py",
    "server.engine.step.runner": "tests/server/engine/step/test_static_step_parity.py",
    "server.engine.step.static_buffers": "tests/server/engine/step/test_static_step.py",
    "server.engine.token_words": "tests/server/engine/test_output.py",
    "server.engine.types": "records; tests/server/api/test_openai_client.py",
    "server.engine.variant": "tests/server/engine/test_core_variants.py",
    "server.errors": "tests/server/api/test_generation.py",
    "server.ledger.audited": "tests/server/api/test_usage.py",
    "server.ledger.migrations.env": "tests/server/ledger/test_database.py",
    "server.ledger.migrations.versions.v0001_first_tables": (
        "tests/server/ledger/test_database.py, tests/server/ledger/test_database_postgres.py"
    ),
    "server.ledger.queries": "tests/server/ledger/test_ledger.py",
    "server.ledger.tables": "tests/server/ledger/test_database.py",
    "server.ledger.writes": "tests/server/ledger/test_ledger.py",
    "server.metrics.buckets": "tests/server/metrics/test_series.py",
    "server.metrics.gauges": "tests/server/metrics/test_series.py",
    "server.metrics.ledger": "tests/server/api/test_usage.py",
    "server.metrics.models": "tests/server/metrics/test_series.py",
    "server.metrics.timer": "tests/server/metrics/test_tenants.py",
    "server.model.context": "a record without code",
    "server.model.embedding": "tests/server/model/test_base.py",
    "server.model.fused_mlp": "tests/server/model/test_base.py",
    "server.model.install": "tests/server/model/test_base.py",
    "server.model.linear": "tests/server/model/test_base.py",
    "server.model.norm": "tests/server/model/test_fused_layer.py",
    "server.model.own_values": "tests/server/model/test_by_slot.py",
    "server.ops.attention": "tests/server/ops/test_attend.py",
    "server.ops.choose": "tests/server/ops/cpu/test_parallel.py",
    "server.ops.cpu.attention": "tests/server/ops/cpu/test_kernels.py",
    "server.ops.cpu.blockdiag": "tests/server/ops/test_blockdiag.py",
    "server.ops.cpu.blockdiag_rows": "tests/server/ops/test_blockdiag.py",
    "server.ops.cpu.check_child": (
        "tests/server/ops/cpu/test_check.py, tests/server/ops/cpu/test_kinds.py"
    ),
    "server.ops.cpu.codegen.bf16_pairs": "tests/server/ops/cpu/test_linear.py",
    "server.ops.cpu.codegen.bfloat": "tests/server/ops/cpu/test_linear.py",
    "server.ops.cpu.codegen.intrinsics": "tests/server/ops/cpu/test_parallel.py",
    "server.ops.cpu.codegen.online_softmax": "tests/server/ops/cpu/test_prefill.py",
    "server.ops.cpu.codegen.add_piece": "tests/server/ops/cpu/test_panel_terms.py",
    "server.ops.cpu.codegen.piece_product": "tests/server/ops/cpu/test_panel_terms.py",
    "server.ops.cpu.codegen.vectors": "tests/server/ops/cpu/test_kernels.py",
    "server.ops.cpu.codegen.widened_product": "tests/server/ops/cpu/test_widened.py",
    "server.ops.cpu.compile": "tests/server/ops/cpu/test_parallel.py",
    "server.ops.cpu.joined": "tests/server/ops/cpu/test_panel_terms.py",
    "server.ops.cpu.norm": "tests/server/ops/cpu/test_kernels.py",
    "server.ops.cpu.pieces": "tests/server/ops/cpu/test_panel_terms.py",
    "server.ops.cpu.rope": "tests/server/ops/cpu/test_kernels.py",
    "server.ops.factors": "tests/server/deltas/pools/test_geometry.py",
    "server.ops.kernels": "tests/server/ops/triton/test_kernels.py",
    "server.ops.joined": "tests/server/ops/cpu/test_panel_terms.py",
    "server.ops.linear": "tests/server/ops/cpu/test_linear.py",
    "server.ops.lowrank": "tests/server/ops/triton/test_packed_lowrank.py",
    "server.ops.norm": "tests/server/ops/cpu/test_kernels.py",
    "server.ops.packed": "tests/server/ops/test_blockdiag.py",
    "server.ops.quantize": "tests/server/model/test_base_quant.py",
    "server.ops.static_row_mapping": "tests/server/deltas/pools/test_geometry.py",
    "server.ops.torch_terms": "tests/server/ops/cpu/test_panel_terms.py",
    "server.ops.cpu.term_table": "tests/server/ops/cpu/test_panel_terms.py",
    "server.ops.triton.compat": "tests/server/ops/triton/test_compile.py",
    "server.ops.triton.prefill": "tests/server/ops/triton/test_attention.py",
    "server.ops.triton.segments": "tests/server/ops/triton/test_blockdiag.py",
    "server.ops.selfcheck": "tests/server/ops/triton/test_kernels.py",
    "server.process.logs": "tests/server/process/test_run.py",
    "server.api.reload": "tests/server/api/test_tenants.py",
    "server.process.otel": "tests/server/process/test_tracing.py",
    "server.api.names": "tests/server/api/test_aliases.py",
    "server.engine.schedule.no_shares": "tests/server/engine/schedule/test_priority.py",
    "server.tenants.principal": "tests/server/api/test_generation.py",
    "server.text.byte_run": "tests/server/text/test_text_stream.py",
    "server.text.workers.child": "tests/server/text/workers/test_worker.py",
    "server.text.workers.child_loop": "tests/server/text/workers/test_worker.py",
    "server.text.workers.tasks": "tests/server/text/workers/test_pool.py",
}


def has_code(file: Path) -> bool:
    """Whether there is more to the file than constants."""
    plain = (ast.Expr, ast.Assign, ast.ImportFrom)
    return not all(isinstance(node, plain) for node in ast.parse(file.read_text()).body)


def modules() -> list[str]:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    wanted = (file for file in files if file.name != "__init__.py" or has_code(file))
    names = (".".join(file.relative_to(ROOT).with_suffix("").parts) for file in wanted)
    return sorted(name.removesuffix(".__init__") for name in names)


def files_of_tests() -> list[str]:
    files = [file for package in PACKAGES for file in (ROOT / "tests" / package).rglob("test_*.py")]
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


def namesake(module: str) -> str:
    *folders, name = module.split(".")
    return "/".join(("tests", *folders, f"test_{name.strip('_')}.py"))


def complaints(
    modules: Iterable[str], test_files: Iterable[str], elsewhere: Mapping[str, str]
) -> Iterator[str]:
    tests = set(test_files)
    own = {namesake(module) for module in modules}
    for module in modules:
        if namesake(module) in tests and module in elsewhere:
            yield f"{module} has {namesake(module)}; it need not be listed"
        if namesake(module) not in tests and module not in elsewhere:
            yield f"{module} has no {namesake(module)}; write it or say where it is tested"
    for module in elsewhere.keys() - set(modules):
        yield f"{module} is listed, but there is no such module"
    named = {
        path for reason in elsewhere.values() for path in re.findall(r"tests/[\w/]+\.py", reason)
    }
    for path in named - tests:
        yield f"{path} is named, but there is no such test file"
    for path in tests - own - named:
        if not any(path.startswith(other.removesuffix(".py") + "_") for other in own & tests):
            yield f"{path} is named like no module beside it, and the list does not name it"


def test_every_module_has_its_test_file_or_is_listed() -> None:
    assert sorted(complaints(modules(), files_of_tests(), ELSEWHERE)) == []


@pytest.mark.parametrize(
    ("modules", "tests", "elsewhere"),
    [
        (["server.a"], [], {}),
        (["server.a"], ["tests/server/test_a.py"], {"server.a": "too simple"}),
        (["server.a"], ["tests/server/test_a.py"], {"server.b": "too simple"}),
        (["server.a"], [], {"server.a": "tests/server/test_b.py"}),
        (["server.a"], ["tests/server/test_a.py", "tests/server/test_b.py"], {}),
        (["server.a"], ["tests/server/test_a_b.py"], {"server.a": "too simple"}),
    ],
)
def test_wrong_tree_is_complained_of(
    modules: list[str], tests: list[str], elsewhere: dict[str, str]
) -> None:
    assert list(complaints(modules, tests, elsewhere))


def test_right_tree_is_accepted() -> None:
    modules = ["server.a", "server.x.__main__", "server.b"]
    tests = ["tests/server/test_a.py", "tests/server/test_a_more.py", "tests/server/x/test_main.py"]
    assert list(complaints(modules, tests, {"server.b": "tests/server/test_a_more.py"})) == []
