"""The check of a run: what quantization changes on a few windows that calibration has not used.

Three streams of these windows pass the blocks while each is open: through original weights, through quantized ones, and
through weights that are rounded to nearest. Behind a block the first two are compared, token by token:
‖x̂-x‖²/‖x‖², the mean over tokens. Unlike a linear's own error, this figure counts what later linears answer, so it ranks
methods. Rounding to nearest has the same bits, groups and symmetry, and always the min-max range: no other setting moves it.

Behind the last block the model goes on to its logits, from both streams. So KL(original ‖ quantized), top-1 agreement and
perplexities cost no second pass, and no more memory than one block and the output head. Only a tuning, which holds the whole
model anyway, is checked in it.
"""

from dataclasses import replace
from math import exp, isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nearplane.core.errors import NearplaneError
from nearplane.core.grid import Grid, dequantize, fit_groups, round_to_nearest
from nearplane.data.fresh import CHECK_WINDOW, Checked, at_once, checked_windows, fresh_shares
from nearplane.data.samples import Batch, cut, masks
from nearplane.models.discover import Block, Site, head_name
from nearplane.models.inputs import DECODER, TEXT, is_causal, output_head, reads, vocabulary
from nearplane.run.forward import Forward, Stream
from nearplane.run.measure import BlockRow

if TYPE_CHECKING:
    from nearplane.run.plan import Plan
    from nearplane.run.stream import OpenBlock

# Logits that are compared at a time, in tokens; numbers of a weight that are rounded at a time: a core caches so many.
CHUNK, ROUNDED_AT_ONCE = 64, 1 << 17
# Streams of the check; numbers for each logit while some are compared: both as floats, their logarithms, one product.
STREAMS, COMPARED = 3, 5
# A mean loss from which perplexity is no number.
OVERFLOW = 700.0


def predicts(model: nn.Module) -> bool:
    """Tell whether a model predicts tokens, so that its logits can be compared."""
    return output_head(model) is not None and not {TEXT, DECODER}.isdisjoint(reads(model))


def goes_on(plan: "Plan") -> bool:
    """Tell whether a check runs the blocks behind the last one that holds anything to quantize: not where they are the most."""
    return len(plan.blocks) - len(plan.walked) <= len(plan.walked)


def checked_tokens(plan: "Plan") -> int:
    """Return how many tokens a run is checked on, known before data is read."""
    if plan.checked is not None:
        return plan.checked.windows * plan.checked.width
    samples, positions = plan.windows
    if plan.job.tune:  # the windows that judge the tuning
        held = sum(count for count, _ in fresh_shares(plan.calibration, 0))
        return held * (positions or plan.calibration.seqlen)
    width = min(positions or plan.calibration.seqlen, CHECK_WINDOW)
    samples = samples or plan.calibration.nsamples  # without data, the windows that other methods are checked on
    return checked_windows(samples * (positions or width), width) * width


def needed(plan: "Plan") -> dict[str, int]:
    """Return the bytes that a check takes: its streams all along; of logits, both models' and what compares them, at the end."""
    size, tokens = plan.compute.itemsize, checked_tokens(plan)
    words = (vocabulary(plan.source.model.config) or 1) if predicts(plan.source.model) else 0
    logits = words * (2 * size * min(tokens, CHECK_WINDOW) + 4 * COMPARED * min(tokens, CHUNK))
    return {"streams": STREAMS * size * (plan.hidden + plan.handed) * tokens, "logits": logits}


def nearest(grid: Grid) -> Grid:
    """Return the grid of the rounding to nearest that figures are compared with: min-max ranges, scales above 0."""
    own = grid.negative_scales and type(grid) is not Grid  # of levels or scales of their own, the sign is theirs
    return replace(grid, fit="minmax", negative_scales=own)


class Shift:
    """Sums up, over tokens, ‖x̂-x‖²/‖x‖² of two hidden states."""

    def __init__(self) -> None:
        self.total, self.tokens = 0.0, 0

    def add(self, reference: Tensor, other: Tensor, mask: Tensor | None) -> None:
        """Take in two states (..., width); ``mask``: (...), of the real tokens, where it has that shape."""
        x, moved = reference.double(), (other.double() - reference.double()).square().sum(-1)
        shares = moved / x.square().sum(-1)
        if mask is not None and mask.shape == shares.shape:
            shares = shares[mask.bool()]
        shares = shares[shares.isfinite()]
        self.total, self.tokens = self.total + float(shares.sum()), self.tokens + shares.numel()

    @property
    def mean(self) -> float | None:
        """The mean; None where no token's is finite."""
        return self.total / self.tokens if self.tokens else None


class Answers:
    """Sums up, over tokens, KL(original ‖ quantized), equal top-1 predictions, and both models' losses."""

    def __init__(self, checked: Checked, causal: bool) -> None:
        """``causal``: whether the model predicts the next token, so that it has a loss."""
        self.unscored, self.causal = checked.unscored, causal
        self.tokens, self.agree, self.kl, self.losses = 0, 0, 0.0, [0.0, 0.0]

    def add(self, batch: Batch, original: Tensor, quantized: Tensor) -> None:
        """Take in logits (samples, positions, vocabulary) of both; padding is left out, and tokens that are not scored."""
        ids = batch[DECODER] if DECODER in batch else batch[TEXT]
        real = next((m.bool() for m in masks(batch) if m.shape == ids.shape), torch.ones_like(ids, dtype=torch.bool))
        if self.causal:  # as an evaluation counts: predictions of all tokens behind the first ones
            begun = torch.arange(ids.shape[1] - 1, device=ids.device) >= self.unscored - 1
            real = torch.cat([real[:, 1:] & real[:, :-1] & begun, torch.zeros_like(real[:, :1])], 1)
        target = ids.roll(-1, 1)
        for row in range(len(ids)):
            for where in torch.split(real[row].nonzero()[:, 0], CHUNK):
                p, q = (logits[row, where].float().log_softmax(1) for logits in (original, quantized))
                self.kl += float(nn.functional.kl_div(q, p, reduction="sum", log_target=True))
                self.agree += int((p.argmax(1) == q.argmax(1)).sum())
                self.tokens += len(where)
                for k, some in enumerate((p, q) if self.causal else ()):
                    self.losses[k] -= float(some.gather(1, target[row, where][:, None]).sum())

    def record(self) -> dict[str, Any]:
        """Return the means, as far as they are finite."""
        found: dict[str, Any] = {"tokens": self.tokens}
        if not self.tokens or not isfinite(self.kl):
            return found | {"unanswered": "the logits are not finite" if self.tokens else "no token is scored"}
        found |= {"kl": self.kl / self.tokens, "top1": self.agree / self.tokens}
        for name, loss in zip(("reference_perplexity", "perplexity"), self.losses, strict=True):
            if self.causal and isfinite(loss) and loss / self.tokens < OVERFLOW:
                found[name] = exp(loss / self.tokens)
        return found


class Check:
    """The three streams of one run; ``walk`` drives them."""

    def __init__(self, plan: "Plan", checked: Checked) -> None:
        model, device = plan.source.model, plan.device
        self.plan, self.checked, self.head = plan, checked, head_name(plan.source)
        self.blocks, size = plan.blocks, at_once(checked)
        self.batches = [cut(checked.batch, a, a + size, device) for a in range(0, checked.windows, size)]
        self.original = Stream(model, self.blocks, self.batches)
        self.quantized, self.rounded = (
            Stream(model, self.blocks, self.batches, activations=plan.activations) for _ in range(2)
        )
        self.compared = True
        """Whether weights can be rounded to nearest."""
        self.last: BlockRow | None = None

    def open(self, block: "OpenBlock") -> None:
        """Run a block that was just opened, with its original weights, and with these rounded to nearest."""
        if self._is_head(block.block):
            return
        self._pass(self.original, block.k)
        if not self.compared:
            return
        model = self.plan.source.model
        sites, kept = block.block.sites, block.original
        kept = kept or {site.name: site.weight(model).clone() for site in sites}
        try:
            for site in sites:
                _round(site.weight(model), site, self.plan.grid_of(site), block.walk.solve_dtype)
            self._pass(self.rounded, block.k)
        except NearplaneError:  # scales that no range of a group's extremes has: nothing to compare with
            self.compared = False
        finally:
            for site in sites:
                site.weight(model).copy_(kept[site.name])

    def close(self, block: "OpenBlock") -> BlockRow | None:
        """Run a block whose weights are quantized; return the errors behind it. None for the output head."""
        if self._is_head(block.block):
            return None
        self._pass(self.quantized, block.k)
        rounded = self._error(self.rounded, block.k) if self.compared else None
        self.last = BlockRow(block.block.name, self._error(self.quantized, block.k), rounded)
        return self.last

    def finish(self, block: "OpenBlock") -> dict[str, Any]:
        """Run what comes behind the last block that holds anything to quantize, and compare the answers.

        Args:
            block: the last block, still open.

        Returns:
            The record of the check, for the report.
        """
        plan, source = self.plan, self.plan.source
        found: dict[str, Any] = {**self.checked.record(), "tokens": 0}
        if self.last is not None:
            found |= {"block": self.last.name, "error": self.last.error, "rtn_error": self.last.rtn_error}
        if not predicts(source.model):
            return found | {"unanswered": f"{type(source.model).__name__} predicts no tokens"}
        if not goes_on(plan):
            return found | {"unanswered": f"most blocks come behind {block.block.name} and are not run"}
        for k in range(block.k + 1, len(self.blocks)):
            source.load(self.blocks[k].name, plan.device, plan.compute)
            for stream in (self.original, self.quantized):
                self._pass(stream, k)
            source.unload(self.blocks[k].name)
        compared = Answers(self.checked, is_causal(source.model))
        if self._is_head(block.block):
            self._through_head(block, compared)
        else:
            source.load("", plan.device, plan.compute, skip=[some.name for some in self.blocks])
            for number, batch in enumerate(self.batches):
                both = [self._logits(stream, number) for stream in (self.original, self.quantized)]
                if both[0] is None or both[1] is None:
                    return found | {"unanswered": f"the forward of {type(source.model).__name__} returns no logits"}
                compared.add(batch, both[0], both[1])
            source.unload("")
        return found | compared.record()

    def _through_head(self, block: "OpenBlock", compared: Answers) -> None:
        """Compare logits where the head is quantized, too: it is the open block."""
        plan, site = self.plan, block.block.sites[0]
        head = plan.source.model.get_submodule(site.name)
        solved = head.weight.data
        plan.source.load(site.name, plan.device, plan.compute)
        original = head.weight.data
        for number, batch in enumerate(self.batches):
            both = []
            for stream, weight in ((self.original, original), (self.quantized, solved)):
                head.weight.data = weight
                both.append(Forward(stream, block.k, number).until(None))
            assert both[0] is not None
            assert both[1] is not None
            compared.add(batch, both[0], both[1])
        head.weight.data = solved

    def _pass(self, stream: Stream, k: int) -> None:
        """Advance a stream through the open block ``k``, with its weights as they are."""
        for number in range(len(self.batches)):
            stream.hidden[self.blocks[k].tower][number] = Forward(stream, k, number).until(None)

    def _error(self, stream: Stream, k: int) -> float | None:
        """Return the error of a stream behind block ``k``."""
        shift, tower = Shift(), self.blocks[k].tower
        for number, batch in enumerate(self.batches):
            x, other = self.original.hidden[tower][number], stream.hidden[tower][number]
            assert x is not None
            assert other is not None
            shift.add(x, other, next((mask for mask in masks(batch) if mask.shape == x.shape[:-1]), None))
        return shift.mean

    def _logits(self, stream: Stream, number: int) -> Tensor | None:
        """Run the model on behind its last block; None where it answers no logits."""
        forward = Forward(stream, len(self.blocks), number)
        forward.until(None)
        logits = getattr(forward.answer, "logits", None)
        return logits if isinstance(logits, Tensor) else None

    def _is_head(self, block: Block) -> bool:
        return block.name == self.head


def _round(weight: Tensor, site: Site, grid: Grid, dtype: torch.dtype) -> None:
    """Round a live weight (out, in) to nearest, in place."""
    step = max(1, ROUNDED_AT_ONCE * (1 if weight.device.type == "cpu" else 64) // site.shape[1])
    fixed = nearest(grid)
    for rows in torch.split(weight, step):
        given = rows.to(dtype).contiguous()
        rows.copy_(dequantize(round_to_nearest(given, *fit_groups(given, fixed), fixed), fixed))
