"""Read weights that transformers converts while it loads them: split, concatenated, transposed.

A checkpoint may store one matrix for queries, keys and values where the model has three, or three convolutions where the model
has one. transformers has a rule for each. ``ConvertedStore`` shows the result of a rule under the name of the model's parameter.
What is not quantized is copied as it is stored, so that transformers converts it as before. ``experts_disk.py`` has the rules of
experts.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter, dot_natural_key

from nearplane.core.errors import NearplaneError
from nearplane.formats.store import Store

# Failures of a rule on tensors that do not fit it.
RULE_ERRORS = (ValueError, RuntimeError, LookupError, AttributeError, TypeError)


@dataclass(frozen=True)
class Group:
    """Stored tensors that one rule converts together."""

    rule: WeightConverter
    key: str
    """The first parameter that the rule makes of them."""
    sources: dict[str, str]
    """The rule's source pattern by name on disk."""

    def make(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Apply the rule to ``tensors``, by name on disk; returns the model's parameters by name."""
        rule = self.rule.copy(
            list(self.rule._original_source_patterns),
            list(self.rule._original_target_patterns),
            operations=self.rule.operations,
        )
        for name, pattern in self.sources.items():
            rule.add_tensor(self.key, name, pattern, lambda name=name: tensors[name])
        made: dict[str, Any] = rule.convert(self.key, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class ConvertedStore(Store):
    """A store in which converted tensors appear under the names of the model's parameters."""

    def __init__(self, store: Store, model: nn.Module, groups: list[Group]) -> None:
        """Wrap ``store``. NearplaneError where a rule does not fit the stored tensors."""
        self.folder, self.store, self.model = store.folder, store, model
        self._made: dict[str, tuple[Group, tuple[int, ...]]] = {}
        for group in groups:
            drafts = {name: torch.empty(store.shape(name), device="meta") for name in group.sources}
            try:
                made = group.make(model, drafts)
            except RULE_ERRORS as error:
                raise NearplaneError(
                    f"{self.folder}: transformers' rule for {next(iter(group.sources))} does not fit what is stored ({error})."
                ) from error
            self._made |= {name: (group, tuple(value.shape)) for name, value in made.items()}
        self.names = store.names.difference(*(group.sources for group in groups)) | self._made.keys()

    def get(self, name: str) -> Tensor:
        """Read a tensor; for a converted one, all that it is made of."""
        if name not in self._made:
            return self.store.get(name)
        group, _ = self._made[name]
        return group.make(self.model, {source: self.store.get(source) for source in group.sources})[name].contiguous()

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Read some rows of a tensor's first dimension."""
        return self.get(name)[first : first + count] if name in self._made else self.store.rows(name, first, count)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; reads no data."""
        return self._made[name][1] if name in self._made else self.store.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype; reads no data."""
        return self.store.dtype(next(iter(self._made[name][0].sources)) if name in self._made else name)

    def nbytes(self, name: str) -> int:
        """Return a tensor's size in bytes; reads no data."""
        return prod(self.shape(name)) * self.dtype(name).itemsize

    def stored(self, names: Iterable[str]) -> frozenset[str]:
        """Return the names to copy for ``names``: converted tensors as they are stored, if all of a rule are among them."""
        wanted = frozenset(names)
        for group in {id(group): group for group, _ in self._made.values()}.values():
            made = {name for name, (other, _) in self._made.items() if other is group}
            if made <= wanted:
                wanted = (wanted - made) | group.sources.keys()
        return wanted


def grouped(found: dict[str, tuple[str, str]], rules: list[WeightConverter]) -> list[Group]:
    """Gather the stored tensors that are converted together.

    Args:
        found: the first parameter made, and the rule's source pattern, by name on disk.
        rules: transformers' rules.
    """
    groups: dict[str, Group] = {}
    for name in sorted(found, key=dot_natural_key):
        key, pattern = found[name]
        rule = next(rule for rule in rules if pattern in rule.source_patterns)
        groups.setdefault(key, Group(rule, key, {})).sources[name] = pattern
    return list(groups.values())
