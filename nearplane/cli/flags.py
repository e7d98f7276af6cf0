"""The flags of each command: one dataclass a command, whose fields are its flags and whose docstrings are its help."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nearplane.core.grid import Grid
from nearplane.methods import METHODS
from nearplane.run.job import WIDTHS, Dtype
from nearplane.runtime.cpu import Arithmetic


@dataclass
class Job:
    """What ``plan`` and ``quantize`` share."""

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A local transformers folder, a hub id, or "demo"."""
    method: Annotated[str, tyro.conf.arg(metavar="|".join(METHODS))] = "nearplane"
    """How weights are solved, or package.module:Class for your own. --help shows the options of the method given."""
    override: tyro.conf.UseAppendAction[Annotated[tuple[str, ...], tyro.conf.arg(metavar="REGEX=FIELD=VALUE,...")]] = ()
    """Another grid where REGEX is found in a linear's name: bits, group_size, sym or fit. Repeatable; the last one wins.
    As 'down_proj=bits=8,group_size=64'."""
    ignore: tyro.conf.UseAppendAction[Annotated[tuple[str, ...], tyro.conf.arg(metavar="REGEX")]] = ()
    """Leave dense the linears in whose names REGEX is found. Repeatable."""
    towers: Annotated[str, tyro.conf.arg(metavar="NAME,...")] = ""
    """Quantize only these towers of a model that has several: text, vision, encoder, decoder, or as they are named in it."""
    budget: Annotated[float | None, tyro.conf.arg(metavar="BITS")] = None
    """Choose the bits of every stage, from --widths, so that quantized weights take so many bits on average, scales and zeros
    counted, at the least sum of errors. They are measured first; --bits is not used."""
    widths: tuple[int, ...] = WIDTHS
    """The bits that --budget chooses from."""
    rotate: Annotated[str, tyro.conf.arg(metavar="r1,r2[,r4]")] = ""
    """Rotations fused into the weights before they are quantized: r1 of the residual stream, r2 of every head's values. Applied
    while the model runs, by nearplane alone: r4 of the down projection's input, r3 of keys where eval --kv-bits rounds them."""
    rotate_seed: int = 0
    """Seed of their random signs."""
    act_bits: int = 16
    """Round what goes into every quantized linear to so many bits, 2 to 8, by a scale for each token; 16: not at all."""
    act_sym: bool = True
    """Activations on a symmetric grid; --no-act-sym (or --act-asym) gives every token a zero point."""
    act_clip: float = 1.0
    """Share of a token's range that is kept."""
    format: Literal["compressed-tensors", "gptq", "gptq_v2"] = "compressed-tensors"
    """Checkpoint format."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, ..."""
    dtype: Dtype = "auto"
    """What dense tensors and scales are stored in; auto: as in MODEL. On CPU the computation is always float32."""
    offload: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Keep hidden states in files below this folder, not in memory."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


@dataclass
class Plan(Job):
    """Say what quantize will need with the same flags, before any compute: memory, disk, time, and whether it fits here.

    Reads no weight: MODEL may be a folder that holds nothing but config.json. The time comes from a few seconds of
    measuring this machine. Exit status: 0 if the run fits, 1 if it does not.
    """

    ranks: int = 1
    """Plan for so many processes of this machine, as torchrun starts them: memory and time of each."""
    json: bool = False
    """Print one JSON object and nothing else on standard output."""


@dataclass
class Quantize(Job):
    """Quantize every linear of a model's blocks and write a checkpoint that vLLM, SGLang and transformers load.

    Calibrates block by block on a text, in the memory of one block, the hidden states and up to 4 GiB of activations.
    What cannot fit into this machine is refused first; nearplane plan says why. OUT is complete when it has an index; a run
    that was ended before (Ctrl-C, kill, a full disk) goes on with --resume.
    """

    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]] = field(kw_only=True)
    """Folder to write; must not exist, or be empty, or with --resume hold what an ended run left."""
    resume: bool = False
    """Go on after the last finished block in OUT; with the same settings, but for --damp-percent and --nsamples."""
    force: bool = False
    """Run even if the estimate of memory or disk says that it cannot fit."""


@dataclass
class Eval:
    """Perplexity of a model or checkpoint, with its protocol; with --reference also KL divergence and top-1 agreement.

    Of encoders, encoder-decoders and vision models: how far their final hidden states are from those of --reference
    (relative error, cosine), or with --labels top-1 accuracy.
    """

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A transformers folder (original, compressed-tensors or GPTQ), a hub id, or "demo"."""
    dataset: str | None = None
    """Text file or dataset name; none: the held-out part of the embedded text. A folder of images or recordings for a model
    that reads such."""
    labels: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """A folder of images for each class (or such folders in train and test): top-1 accuracy, of the model's classifier head
    if it knows the classes, else of a linear probe on frozen features."""
    seqlen: int | None = None
    """Tokens per window, cut to the model's own limit; none: 2048, or 512 for models that are no decoders."""
    windows: int | None = None
    """Read only this many windows, or files."""
    reference: str | None = None
    """The original model, to compare with."""
    device: str = "auto"
    """Where to compute."""
    dtype: str = "float32"
    """Computation dtype."""
    packed: bool = True
    """Multiply quantized weights as they are, as they will be run; --no-packed makes them dense first."""
    arithmetic: Arithmetic = "auto"
    """How packed weights are multiplied: exact (float32), a16 or a8 (activations of 16 or 8 bits); auto: the default."""
    head_bits: int | None = None
    """Also round the output head to so many bits, in memory."""
    kv_bits: int = 16
    """Also round keys and values to so many bits, 2 to 8, as they enter the cache: a simulation, which no checkpoint carries."""
    json: bool = False
    """Print one JSON object and nothing else on standard output."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


@dataclass
class Generate:
    """Text from a checkpoint, its weights kept packed. Streams; says at the end how fast it was and what it took.

    Tokens go to standard output, the figures to standard error.
    """

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A transformers folder (original, compressed-tensors or GPTQ), a hub id, or "demo"."""
    prompt: str
    """The text to continue, or with --chat the user's message."""
    max_new_tokens: int = 128
    """Stop after so many tokens."""
    chat: bool = False
    """Put the prompt through the model's chat template."""
    temperature: float = 0.0
    """0: always the likeliest token; above: sample."""
    seed: int = 0
    """For sampling."""
    threads: int | None = None
    """CPU threads; none: as torch decides."""
    arithmetic: Arithmetic = "auto"
    """How packed weights are multiplied: exact (float32), a16 or a8 (activations of 16 or 8 bits); auto: the default."""
    head_bits: int | None = None
    """Also round the output head to so many bits, in memory."""
    device: str = "auto"
    """Where to compute."""
    dtype: str = "float32"
    """What dense weights are held and activations computed in: float32, float16, bfloat16; auto: as stored. The two
    small ones save memory, and are slower on a CPU."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


@dataclass
class Bench:
    """Tokens per second of a checkpoint packed, against the same weights dense in bf16 and fp32: same process, same threads."""

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A quantized checkpoint."""
    prompt_tokens: int = 128
    """Length of the prompt whose prefill is timed."""
    new_tokens: int = 32
    """Tokens decoded after it."""
    rounds: int = 3
    """Interleaved rounds; the median counts."""
    threads: int | None = None
    """CPU threads; none: as torch decides."""
    against: tuple[Literal["bf16", "fp32"], ...] = ("bf16", "fp32")
    """Dense models to compare with; all are in memory at once."""
    head_bits: int = 8
    """Width of the output head in the row that rounds it."""
    json: bool = False
    """Print one JSON object and nothing else on standard output."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


@dataclass
class Verify:
    """Re-read a whole checkpoint, every file and tensor, and list what is wrong with it, with the sha256 of each file.

    Exit status 0: nothing is wrong; 1: something is; 2: the folder is no checkpoint."""

    out: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="OUT")]]
    """A transformers folder, quantized by nearplane or another tool, or not at all."""
    engine: Literal["vllm", "sglang", "transformers"] | None = None
    """Also say what this engine would refuse."""
    json: bool = False
    """Print one JSON object and nothing else on standard output."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


@dataclass
class Convert:
    """Write a quantized checkpoint in another format. Nothing is quantized again: codes, scales and zeros keep their values."""

    out: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="OUT")]]
    """The quantized checkpoint."""
    new: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="NEW")]]
    """Folder to write; must not exist, or be empty."""
    format: Literal["compressed-tensors", "gptq", "gptq_v2"]
    """The format to write."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


@dataclass
class Inspect:
    """Blocks, stages, shapes and sizes of a model; for a quantized checkpoint, its grid per layer.

    Quantizes nothing: it reads one block of each kind and runs 8 tokens through it."""

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A transformers folder, a hub id, or "demo"."""
    grid: tyro.conf.OmitArgPrefixes[Grid] = field(default_factory=Grid)
    """The grid that sizes after quantization are computed for."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
