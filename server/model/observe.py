"""What every module of a definition is given in one forward pass, and who reads which parameter.

The pass has a number of tokens, and keeps the logits of a number of them, that are no other size of
the model: an axis of such a length is the tokens', whatever else is as long in a step.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

FEWEST_TOKENS, FEWEST_KEPT = 11, 3
FORWARD = "forward"
KEEP = "logits_to_keep"


@dataclass(frozen=True, slots=True, eq=False)
class Method:
    """A method of a module, running."""

    module: nn.Module
    method: str


@dataclass(slots=True, eq=False)
class Call:
    """One call of a module's method, with copies of its tensors: a definition may change them.

    args, kwargs, output  None for linears, whose tensors are large and not asked for
    tensors               shapes of what it was given
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: tuple[torch.Size, ...]
    output: Any = None


@dataclass(slots=True)
class Observation:
    """One forward pass of a definition.

    keeps   whether it gives the logits of the wanted rows alone when asked to
    calls   by module and method, in the order of the first call
    reads   by (module, name of its own parameter or buffer): the frames that ran at each reading,
            the outermost first
    """

    n_tokens: int
    n_kept: int
    keeps: bool = False
    calls: dict[tuple[nn.Module, str], list[Call]] = field(default_factory=dict)
    reads: dict[tuple[nn.Module, str], list[tuple[Method, ...]]] = field(default_factory=dict)

    def of(self, module: nn.Module) -> Sequence[Call]:
        """The calls of a module as such."""
        return self.calls.get((module, FORWARD), ())

    def axis(self, shape: Sequence[int]) -> int | None:
        """Which axis is the tokens'; None if none or more than one is."""
        found = [i for i, n in enumerate(shape) if n in (self.n_tokens, self.n_kept)]
        return found[0] if len(found) == 1 else None

    def is_only_read(self, module: nn.Module) -> bool:
        """Whether another module reads what it has, and it does not run."""
        return not self.of(module) and any(owner is module for owner, _ in self.reads)

    def sees_kept_rows(self, module: nn.Module) -> bool:
        """Whether it is given rows whose logits are wanted, and those alone."""
        sizes = {n for call in self.of(module) for shape in call.tensors for n in shape}
        return self.n_kept in sizes and self.n_tokens not in sizes


def observe(model: PreTrainedModel, owners: Mapping[nn.Module, Sequence[str]]) -> Observation:
    """Run the definition once on as many tokens as nothing else has.

    owners  modules and their own parameters and buffers whose readings are wanted. Their methods
            are watched besides every module's forward.
    """
    n_tokens, n_kept = unlike_numbers(model)
    seen = Observation(n_tokens, n_kept)
    table = model.get_input_embeddings().weight
    ids = torch.arange(n_tokens, device=table.device).unsqueeze(0)
    kept = torch.arange(n_kept, device=table.device)
    with _Watch(model, seen, owners), torch.inference_mode():
        output = model(
            input_ids=ids % len(table),
            position_ids=ids,
            use_cache=False,
            **({KEEP: kept} if takes_kept_rows(model) else {}),
        )
    seen.keeps = output.logits.shape[1] == n_kept
    return seen


def unlike_numbers(model: PreTrainedModel) -> tuple[int, int]:
    """How many tokens to give and how many of them to keep."""
    sizes = _sizes(model)
    n_kept = _prime_beside(sizes, FEWEST_KEPT)
    return _prime_beside(sizes | {n_kept}, max(FEWEST_TOKENS, n_kept)), n_kept


def takes_kept_rows(model: PreTrainedModel) -> bool:
    """Whether the definition can be told whose logits are wanted."""
    return KEEP in inspect.signature(model.forward).parameters


class _Watch:
    """Hooks on every module, for as long as it is entered."""

    def __init__(
        self,
        model: nn.Module,
        seen: Observation,
        owners: Mapping[nn.Module, Sequence[str]],
    ) -> None:
        self._model, self._seen, self._owners = model, seen, owners
        self._stack: list[Method] = []
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> None:
        for module in set(self._model.modules()) - set(self._owners):
            before = module.register_forward_pre_hook(self._before, with_kwargs=True)
            after = module.register_forward_hook(self._after)
            self._undo += [before.remove, after.remove]
        for module, names in self._owners.items():
            self._watch_reads(module, names)
            for name in _methods(type(module)):
                self._watch_method(module, name)

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._enter(Method(module, FORWARD), args, kwargs)

    def _after(self, module: nn.Module, _: Any, output: Any) -> None:
        self._leave(Method(module, FORWARD), output)

    def _enter(self, frame: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._stack.append(frame)
        shapes = tuple(t.shape for t in tensors_in((args, kwargs)))
        call = Call((), {}, shapes)
        if not isinstance(frame.module, nn.Linear | Conv1D):
            call.args, call.kwargs = _copied(args), _copied(kwargs)
        self._seen.calls.setdefault((frame.module, frame.method), []).append(call)

    def _leave(self, frame: Method, output: Any) -> None:
        self._stack.pop()
        if not isinstance(frame.module, nn.Linear | Conv1D):
            self._seen.calls[frame.module, frame.method][-1].output = _copied(output)

    def _watch_reads(self, module: nn.Module, names: Sequence[str]) -> None:
        def note(name: str) -> None:
            if name in names:
                stack = tuple(self._stack)
                self._seen.reads.setdefault((module, name), []).append(stack)

        for store in ("_parameters", "_buffers"):
            content = vars(module)[store]
            vars(module)[store] = _Noting(content, note)
            self._undo.append(functools.partial(vars(module).update, {store: content}))

    def _watch_method(self, module: nn.Module, name: str) -> None:
        method = getattr(module, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            frame = Method(module, name)
            self._enter(frame, args, kwargs)
            output = method(*args, **kwargs)
            self._leave(frame, output)
            return output

        before = {n: m for n, m in vars(module).items() if n == name}  # of an instance's own

        def undo() -> None:
            del vars(module)[name]
            vars(module).update(before)

        vars(module)[name] = run
        self._undo.append(undo)


class _Noting(dict[str, Any]):
    """A module's parameters; tells which are read, one by one."""

    def __init__(self, content: Mapping[str, Any], note: Callable[[str], None]) -> None:
        super().__init__(content)
        self._note = note

    def __getitem__(self, name: str) -> Any:
        self._note(name)
        return super().__getitem__(name)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif type(value) is dict:
        for item in value.values():
            yield from tensors_in(item)
    elif type(value) in (tuple, list):
        for item in value:
            yield from tensors_in(item)


def with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same nest with these in the places of `tensors_in`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if type(value) is dict:
        return {name: with_tensors(item, tensors) for name, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(with_tensors(item, tensors) for item in value)
    return value


def _copied(value: Any) -> Any:
    return with_tensors(value, (t.clone() for t in tensors_in(value)))


def _methods(kind: type[nn.Module]) -> list[str]:
    """The definition's own, `forward` included: it may be called as any other."""
    own = itertools.takewhile(lambda c: c is not nn.Module, kind.__mro__)
    names = {n for c in own for n, f in vars(c).items() if isinstance(f, FunctionType)}
    return sorted(name for name in names if not name.startswith("__"))


def _sizes(model: PreTrainedModel) -> set[int]:
    """Every size that a tensor of this model may have beside the number of tokens."""
    shapes = (t.shape for t in (*model.parameters(), *model.buffers()))
    found = {n for shape in shapes for n in shape} | set(_numbers(model.config))
    return found | {1}


def _numbers(config: PretrainedConfig) -> Iterator[int]:
    waiting: list[Any] = [config.to_dict()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, int):
            yield value


def _prime_beside(sizes: Iterable[int], fewest: int) -> int:
    """The first prime from there on that is no such size: a product of them it is neither."""
    taken = set(sizes)
    return next(n for n in itertools.count(fewest) if n not in taken and _is_prime(n))


def _is_prime(n: int) -> bool:
    return all(n % factor for factor in range(2, int(n**0.5) + 1))
