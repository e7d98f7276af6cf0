"""Encoders and vision models: how far their final hidden states are from a reference's, and what a probe reads in them.

Decides what the features of a model are and on which inputs they are compared. Relative error: the norm of the difference of
all features over the norm of the reference's; cosine: the mean over positions. Of an encoder-decoder the encoder's states
are compared, and the decoder's predictions as those of any language model.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.data.samples import Batch, masks
from nearplane.evaluation.perplexity import Divergence
from nearplane.machine.progress import track
from nearplane.models import inputs

# Samples in one forward.
AT_ONCE = 16


@dataclass(frozen=True)
class Features:
    """What was measured, and how."""

    samples: int
    dataset: str
    error: dict[str, float] = field(default_factory=dict)
    """‖f - f₀‖ / ‖f₀‖ over all samples, by kind of feature."""
    cosine: dict[str, float] = field(default_factory=dict)
    """Mean cosine of a position's feature with the reference's."""
    kl: float | None = None
    top1: float | None = None
    accuracy: float | None = None
    reference_accuracy: float | None = None
    protocol: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{name}: relative error {error:.4f}, mean cosine {self.cosine[name]:.5f}"
            for name, error in self.error.items()
        ]
        if self.kl is not None and self.top1 is not None:
            agreement = f"top-1 agreement {100 * self.top1:.2f}%"
            lines.append(f"decoder: mean KL(reference || model) {self.kl:.5f} nats per token, {agreement}")
        for name, value in (("top-1 accuracy", self.accuracy), ("reference top-1 accuracy", self.reference_accuracy)):
            lines += [] if value is None else [f"{name} {100 * value:.2f}%"]
        return "\n".join([*lines, f"protocol: {self.protocol}"])

    __repr__ = __str__


def compare(model: nn.Module, reference: nn.Module, samples: Batch, origin: str, *, progress: bool = False) -> Features:
    """Features of both on the same samples. NearplaneError where they are not finite, SettingError where they do not compare."""
    apart: dict[str, float] = {}
    size: dict[str, float] = {}
    cosines: dict[str, list[Tensor]] = {}
    divergence = Divergence()
    with torch.inference_mode():
        starts = torch.arange(0, len(next(iter(samples.values()))), AT_ONCE)
        for batch, _ in zip(batches(samples), track(starts, "eval", enabled=progress), strict=True):
            found, wanted = final_states(model, batch), final_states(reference, batch)
            if found.keys() != wanted.keys():
                raise SettingError("model and reference are of different kinds; they cannot be compared.")
            for name, expected in wanted.items():
                rows = _rows(found[name], batch), _rows(expected, batch)
                if rows[0].shape != rows[1].shape:
                    raise SettingError(f"{name} of model and reference differ in shape; they cannot be compared.")
                if name == "logits":
                    divergence.add(rows[1], rows[0])
                    continue
                apart[name] = apart.get(name, 0.0) + float((rows[0] - rows[1]).double().square().sum())
                size[name] = size.get(name, 0.0) + float(rows[1].double().square().sum())
                cosines.setdefault(name, []).append(nn.functional.cosine_similarity(*rows, dim=-1))
    error = {name: (apart[name] / size[name]) ** 0.5 if size[name] > 0 else float("nan") for name in apart}
    if any(not math.isfinite(value) for value in error.values()):
        raise NearplaneError("the model's features are not finite: its weights or its dtype are broken.")
    count = len(next(iter(samples.values())))
    shapes = ", ".join(f"{name} {list(value.shape[1:])}" for name, value in samples.items())
    return Features(
        samples=count,
        dataset=origin,
        error=error,
        cosine={name: float(torch.cat(parts).mean()) for name, parts in cosines.items()},
        kl=divergence.kl if divergence.tokens else None,
        top1=divergence.top1 if divergence.tokens else None,
        protocol=f"{origin}; {count} samples of {shapes}; final hidden states at all positions that are no padding",
    )


def classify(
    model: nn.Module,
    reference: nn.Module | None,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    names: list[str],
    origin: str,
) -> Features:
    """Top-1 accuracy: of the classifier head where it knows these classes, else of a linear probe on frozen features.

    The probe is trained on the reference's features where there is one, else on the model's own.
    """
    models = [model] if reference is None else [model, reference]
    columns = [_columns(some, names) for some in models]
    labels, count = test[1], len(test[1])
    if all(column is not None for column in columns):
        scores = [_logits(some, test[0])[:, column] for some, column in zip(models, columns, strict=True)]
        how = "the model's own classifier head, over these classes"
    else:
        teacher = models[-1]
        probe = Probe(pooled(teacher, train[0]), train[1], len(names))
        scores = [probe.scores(pooled(some, test[0])) for some in models]
        whose = "the model's own" if reference is None else "the reference's"
        how = (
            f"linear probe trained on {whose} features of {len(train[1])} images (final hidden state at the first position and "
            f"its mean over all, standardized; {probe.protocol})"
        )
    accuracies = [float((score.argmax(1).cpu() == labels).double().mean()) for score in scores]
    return Features(
        samples=count,
        dataset=origin,
        accuracy=accuracies[0],
        reference_accuracy=None if reference is None else accuracies[1],
        protocol=f"{origin}; {count} test images of {len(names)} classes; {how}",
    )


def final_states(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """A model's features of a batch: final hidden states, pairs of embeddings, or an encoder's states and a decoder's logits."""
    arguments = {name: value.to(next(model.parameters()).device) for name, value in batch.items()}
    arguments |= inputs.options(model)
    output = model(**arguments)
    if getattr(output, "encoder_last_hidden_state", None) is not None:
        last = "logits" if getattr(output, "logits", None) is not None else "last_hidden_state"
        return {"encoder": output.encoder_last_hidden_state, last: getattr(output, last)}
    for names in (("last_hidden_state",), ("text_embeds", "image_embeds")):
        if all(isinstance(getattr(output, name, None), Tensor) for name in names):
            return {name: getattr(output, name) for name in names}
    base: Any = getattr(model, "base_model", model)
    if hasattr(base, "forward_features"):  # timm's
        return {"last_hidden_state": base.forward_features(arguments[inputs.IMAGES])}
    state = None if base is model else getattr(base(**arguments), "last_hidden_state", None)
    if state is None:
        raise NearplaneError(f"{type(model).__name__} gives no final hidden state; its features cannot be compared.")
    return {"last_hidden_state": state}


def pooled(model: nn.Module, pixels: Tensor) -> Tensor:
    """What a probe reads of each image: the final state at the first position, and the mean over all."""
    found = []
    with torch.inference_mode():
        for batch in batches({inputs.IMAGES: pixels}):
            state = final_states(model, batch)["last_hidden_state"].float()
            state = state.flatten(2).transpose(1, 2) if state.dim() == 4 else state
            found.append(torch.cat([state[:, 0], state.mean(1)], 1).cpu())
    return torch.cat(found)


def batches(samples: Batch) -> Iterator[Batch]:
    """A few samples at a time."""
    for first in range(0, len(next(iter(samples.values()))), AT_ONCE):
        yield {name: value[first : first + AT_ONCE] for name, value in samples.items()}


def _rows(state: Tensor, batch: Batch) -> Tensor:
    """Positions as rows, those of padding left out."""
    mask = next((m for m in masks(batch) if m.shape == state.shape[:2] and state.dim() == 3), None)
    rows = state.float().reshape(-1, state.shape[-1])
    return rows if mask is None else rows[mask.bool().flatten().to(rows.device)]


def _columns(model: nn.Module, names: list[str]) -> list[int] | None:
    """The head's outputs for these classes; None where it does not know them all."""
    known = {str(label).lower(): number for number, label in (getattr(model.config, "id2label", None) or {}).items()}
    found = [known.get(name.lower()) for name in names]
    if "Classification" not in type(model).__name__:
        return None
    return [int(number) for number in found if number is not None] if None not in found else None


def _logits(model: nn.Module, pixels: Tensor) -> Tensor:
    device = next(model.parameters()).device
    with torch.inference_mode():
        parts = [
            model(**{k: v.to(device) for k, v in b.items()}).logits.float().cpu()
            for b in batches({inputs.IMAGES: pixels})
        ]
    return torch.cat(parts)


# Ridge penalty per training sample, of features whose variance is 1.
RIDGE = 0.1


class Probe:
    """Trained when it is made."""

    protocol = f"ridge regression in closed form, penalty {RIDGE:g} per sample"

    def __init__(self, features: Tensor, labels: Tensor, classes: int) -> None:
        x = features.double()
        self.mean, self.deviation = x.mean(0), x.std(0).clamp(min=1e-6)
        x = (x - self.mean) / self.deviation
        target = torch.nn.functional.one_hot(labels, classes).double()
        self.offset = target.mean(0)
        gram = x.T @ x / len(x) + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
        self.weight = torch.linalg.solve(gram, x.T @ (target - self.offset) / len(x))

    def scores(self, features: Tensor) -> Tensor:
        """(samples, classes)."""
        x: Tensor = (features.double() - self.mean) / self.deviation
        scores: Tensor = x @ self.weight + self.offset
        return scores
