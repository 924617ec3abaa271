"""Layers that keep state of their own between tokens: convolutions, state spaces, linear attention.

The server has KV blocks for every sequence and nothing else: in a packed batch such a layer would
run from one sequence into the next. Behaviour decides (`server.engine.check`); what is looked for
here has a sentence that says more.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

# Words in a configuration's `layer_types`; "full_attention" and its like have none of them.
# What a path of the text decoder's layers has none of.
OTHER_PARTS = ("embed", "audio", "vision", "visual", "encoder")
RECURRENT = ("linear", "mamba", "conv", "recurrent", "ssm", "rwkv", "lstm", "delta", "hybrid")
# Parameters of a state space's own.
STATE_PARAMETERS = ("A_log", "dt_bias", "time_decay", "recurrent_gate_weight")


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The members of the outermost module lists, by path: a decoder's layers and whatever else
    there are several of in a row.
    """
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outermost = {
        path: module
        for path, module in lists.items()
        if not any(path.startswith(f"{other}.") for other in lists)
    }
    return {
        f"{path}.{name}": layer
        for path, module in outermost.items()
        for name, layer in module.named_children()
    }


def keeps_state(model: nn.Module) -> str | None:
    """What keeps state outside attention, as a sentence's subject; None if nothing looks so."""
    return next(_stateful_modules(model), None) or next(_stateful_types(model), None)


def _stateful_types(model: nn.Module) -> Iterator[str]:
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    for index, kind in enumerate(getattr(text, "layer_types", None) or ()):
        if isinstance(kind, str) and any(word in kind for word in RECURRENT):
            yield f"layer {index}, of type {kind},"


def _stateful_modules(model: nn.Module) -> Iterator[str]:
    for path, layer in decoder_layers(model).items():
        if any(part in path for part in OTHER_PARTS):
            continue
        for name, module in layer.named_modules():
            children = [child for child in module.children() if isinstance(child, nn.Conv1d)]
            causal = any(child.groups > 1 for child in children)
            own = dict(module.named_parameters(recurse=False))
            if causal or not own.keys().isdisjoint(STATE_PARAMETERS):
                where = f"{path}.{name}" if name else path
                yield f"{type(module).__name__} in {where}"
