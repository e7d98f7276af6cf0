"""Quantize a folder by ``mlx_lm.convert``, its linears alone: what ``--format mlx`` is compared with.

    MLX_PYTHON runs/mlx_peers.py FOLDER OUT [--bits 3] [--group-size 64]

Stands alone: run it by a Python that has ``mlx[cpu]`` and ``mlx-lm``. The embedding and the head stay as they are, as nearplane
leaves them. mlx-lm's own GPTQ, AWQ and DWQ are commands: ``mlx_lm.gptq``, ``mlx_lm.awq``, ``mlx_lm.dwq``.
"""

import argparse

import mlx.core as mx
from mlx import nn
from mlx_lm import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("out")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    convert(
        args.folder,
        args.out,
        quantize=True,
        q_bits=args.bits,
        q_group_size=args.group_size,
        quant_predicate=lambda path, module, *_: isinstance(module, nn.Linear) and not path.endswith("lm_head"),
    )


if __name__ == "__main__":
    main()
