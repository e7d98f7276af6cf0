"""llama.cpp by the package xllamacpp: runs a ``.gguf``. The contract is in contract.py.

    PYTHON runs/engines/llama.py MODEL.gguf IDS OUT

llama.cpp rounds the inputs of quantized matrices to 8 bits, in blocks of 32. Options: ``threads``, 1 unless said otherwise.
"""
import sys
