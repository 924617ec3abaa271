"""``impart merge``: several fine-tunes of one base become one model, or one delta."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compressor.cli.common import (
    Overwrite,
    Quiet,
    look_at,
    progress_bar,
    reporting,
    silence_libraries,
)
from compressor.errors import InputError

if TYPE_CHECKING:
    from compressor.merge.config import MergeConfig, Setting

_YAML = (".yaml", ".yml")


@reporting
def merge(
    arguments: Annotated[
        list[str],
        typer.Argument(
            help="CONFIG.yaml OUT, or BASE MODEL... OUT. Models are directories or Hub "
            "ids[@revision] of full fine-tunes, PEFT adapters or deltas.",
            metavar="CONFIG|BASE MODEL... OUT",
        ),
    ],
    method: Annotated[str | None, typer.Option(help="ta or ties (default).")] = None,
    mask: Annotated[
        str | None, typer.Option(help="Sparsify each difference first: none, dare or impart.")
    ] = None,
    scale: Annotated[
        float | None, typer.Option("--lambda", help="Factor of the merged difference.")
    ] = None,
    weight: Annotated[
        list[float] | None, typer.Option(help="Of each model, in order; one value: of all.")
    ] = None,
    density: Annotated[
        list[float] | None,
        typer.Option(help="ties: share that trimming keeps, per model or one for all."),
    ] = None,
    mask_density: Annotated[
        list[float] | None, typer.Option(help="Share that the mask keeps, per model or for all.")
    ] = None,
    trim_scope: Annotated[
        str | None,
        typer.Option(help="ties: trim over the whole model (default, the paper's) or each tensor."),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(help="Divide by the weights that took part; default: for ties only."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the masks and the codec.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default: the base's.")
    ] = None,
    delta: Annotated[
        bool, typer.Option("--delta", help="Write a delta artifact, not a full model.")
    ] = False,
    codec: Annotated[str | None, typer.Option(help="--delta: the codec.")] = None,
    ratio: Annotated[
        float | None, typer.Option(help="--delta: model bytes / bytes of the artifact.")
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Merge fine-tunes of one base by task arithmetic or TIES."""
    from compressor.merge.config import MergeConfig, MergeModel, read_merge_config

    *inputs, out = arguments
    settings = {
        "method": method,
        "mask": mask,
        "scale": scale,
        "normalize": normalize,
        "trim_scope": trim_scope,
        "seed": seed,
        "dtype": dtype,
    }
    given = {key: value for key, value in settings.items() if value is not None}
    config: MergeConfig
    if len(inputs) == 1 and inputs[0].endswith(_YAML):
        extra = [*(given.keys() - {"seed"}), *(["weight"] if weight else [])]
        extra += ["density"] if density or mask_density else []
        if extra:
            raise InputError(f"{inputs[0]} says how to merge; give {extra[0]} there")
        config = read_merge_config(Path(inputs[0]), seed)
    else:
        base, names = (inputs or [""])[0], inputs[1:]
        if density and method == "ta":
            raise InputError("--density is what ties keeps when it trims; see --mask-density")
        per_model = {"weight": weight, "density": density, "mask_density": mask_density}
        chosen = [_per_model(per_model, names, index) for index in range(len(names))]
        models = tuple(MergeModel(name, **own) for name, own in zip(names, chosen, strict=True))
        config = MergeConfig(base, models, **given)  # type: ignore[arg-type]  # checked there
    if (codec or ratio) and not delta:
        raise InputError("--codec and --ratio are for --delta")
    recipe = [Path(inputs[0])] if len(inputs) == 1 else []  # CONFIG.yaml
    look_at(*config.inputs, files=recipe, out=out, overwrite=overwrite)

    from compressor.compress.options import Options
    from compressor.merge.merge import merge as run
    from compressor.merge.merge import merge_to_delta

    silence_libraries()
    with progress_bar(quiet) as progress:
        if not delta:
            run(config, out, overwrite=overwrite, progress=progress)
            summary = f"{out}: written"
        else:
            compressing = {"codec": codec, "ratio": ratio}
            options = Options(
                seed=config.seed,
                overwrite=overwrite,
                **{key: value for key, value in compressing.items() if value is not None},  # type: ignore[arg-type]
            )
            made = merge_to_delta(config, out, options, progress)
            summary = f"{out}: {made.n_bytes:,} bytes, ratio {made.ratio:.2f}\ndigest {made.digest}"
    if not quiet:
        typer.echo(summary)


def _per_model(
    given: dict[str, list[float] | None], names: list[str], index: int
) -> dict[str, Setting]:
    from compressor.merge.config import constant

    found = {}
    for key, values in given.items():
        if not values:
            continue
        if len(values) not in (1, len(names)):
            raise InputError(f"{key}: {len(values)} values for {len(names)} models; give 1 or all")
        found[key] = constant(values[0] if len(values) == 1 else values[index])
    return found
