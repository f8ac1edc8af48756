"""`model.generate(…, custom_generate=chunk_generate)`: see `utils/decoding/hf.py`."""

from utils.decoding.hf import chunk_generate as chunk_generate
