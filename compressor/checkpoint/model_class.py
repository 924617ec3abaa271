"""Which class of transformers a configuration's language model is.

Most are registered as causal language models. One that also sees or hears is registered by what it
takes beside text, and generates text as the others do. What is registered nowhere, as the text part
of some, is found by the name that its configuration gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from compressor.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# In the order in which they are asked for a class that the configuration does not name.
_REGISTRIES = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
)


def language_model(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class that `config` names, if it generates text, else the first registered for it; and
    its own configuration, which may be the text part.

    Raises CheckpointError, in one sentence, if transformers has none.
    """
    named = (getattr(config, "architectures", None) or [""])[0]
    found = {kind.__name__: kind for kind in _registered(config)}
    kind = found.get(named) or next(iter(found.values()), None) or _named(named, config)
    what = f"{named or 'a model'} of type {config.model_type}"
    if kind is None:
        import transformers

        raise CheckpointError(
            f"transformers {transformers.__version__} has no language model for {what}; only "
            "models that it has are supported, and a newer release of it may have this one"
        )
    if kind.__name__ not in _causal_names() and getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"{what} writes from what an encoder has read; only models that go on with their own "
            "input are supported"
        )
    text = config.get_text_config()
    return kind, text if kind.config_class is type(text) else config


def _registered(config: PreTrainedConfig) -> Iterator[type[PreTrainedModel]]:
    from transformers.models.auto import modeling_auto

    for registry in _REGISTRIES:
        mapping: Any = getattr(modeling_auto, registry, {})
        try:
            found = mapping.get(type(config), ())
        except ImportError:  # of a library that it needs
            continue
        yield from found if isinstance(found, list | tuple) else (found,)


def _named(name: str, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of that name, if it generates text by such a configuration."""
    import transformers

    kind: Any = getattr(transformers, name, None) if name else None
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        return None
    writes = issubclass(kind, transformers.GenerationMixin)
    own_config = getattr(kind, "config_class", None)
    return kind if writes and own_config is type(config) else None


def _causal_names() -> set[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
