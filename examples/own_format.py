"""An on-disk format of your own: a code in a byte of its own, scales and zeros in float32, groups as they come.

Run it with a model and a new folder:  python examples/own_format.py demo out
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import nearplane
from nearplane.core.grid import Grid
from nearplane.formats import Format
from nearplane.formats.base import Decoded, StoredLayer, check, collect, group_of_columns
from nearplane.formats.read import open_checkpoint


@dataclass(frozen=True)
class PlainCodes(Format):
    """``codes`` uint8 (out, in), ``scale`` float32 (out, groups), ``zero`` uint8 (out, groups)."""

    name: str = "plain-codes"

    def scale_dtype(self, model_dtype):
        """Always float32."""
        return "float32"

    def pack(self, name, quantized, grid):
        """Three tensors, as they were solved."""
        codes, scale, zero = check(name, quantized, grid)[:3]
        return {f"{name}.codes": codes, f"{name}.scale": scale, f"{name}.zero": zero}

    def nbytes(self, shape, grid):
        """Count exactly."""
        return shape[0] * (shape[1] + 5 * grid.group_count(shape[1]))

    def config(self, grid, *, ignore, settings, grids=None):
        """Bits, group size and symmetry of each linear."""
        named = {name: [g.storage_bits, g.group_size, g.sym] for name, g in (grids or {}).items()}
        return {"quant_method": self.name, "grids": named, "ignore": list(ignore)}

    def claims(self, config):
        """By its name."""
        return config.get("quant_method") == self.name

    def find(self, store, config, broken=None):
        """Every tensor that ends in ``.codes``."""

        def layer(name):
            bits, size, sym = config["grids"][name]
            tensors = {suffix: f"{name}.{suffix}" for suffix in ("codes", "scale", "zero")}
            return StoredLayer(name, Grid(bits, size, sym), store.shape(tensors["codes"]), tensors)

        return collect({name[: -len(".codes")] for name in store.names if name.endswith(".codes")}, layer, broken)

    def unpack(self, store, layer):
        """Three tensors, as they are."""
        codes, scale, zero = (store.get(layer.tensors[suffix]) for suffix in ("codes", "scale", "zero"))
        return Decoded(codes, scale, zero, group_of_columns(store, None, layer.grid, layer.shape[1]))


def main(model: str, out: str) -> torch.Tensor:
    """Quantize into the format, read a weight back, and convert the folder into one that engines load."""
    own, grid = PlainCodes(), Grid(bits=4, group_size=32)
    nearplane.quantize(model, out, method=nearplane.RTN(), grid=grid, format=own, dtype="float32", progress=False)
    checkpoint = open_checkpoint(Path(out), formats=[own])
    name = next(iter(checkpoint.layers))
    print(f"{out}: {len(checkpoint.layers)} layers in {checkpoint.format}; {name} is {checkpoint.layers[name].grid}")
    print(nearplane.convert(out, f"{out}-ct", "compressed-tensors", formats=[own]))
    return checkpoint.weight(name)


if __name__ == "__main__":
    main(*sys.argv[1:])
