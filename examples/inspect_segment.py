#!/usr/bin/env python3
"""Look into a segment of a store with h5py alone: whose it is, which blocks, which positions, what their values look like.

    python examples/inspect_segment.py STORE/u/1000/seg/NAMESPACE/SEGMENT.h5 [--blocks 5]

`h5dump -H` and `h5ls` work as well. Nothing is verified here; `hpckv store check` does that.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import h5py
import numpy as np

DTYPES = {"float16": np.float16, "float32": np.float32, "bfloat16": np.uint16}


def main() -> None:
    """Print a segment."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("segment", type=Path)
    ap.add_argument("--blocks", type=int, default=5, help="how many blocks to show")
    args = ap.parse_args()
    with h5py.File(args.segment) as file:
        record = json.loads(file.attrs["namespace"])
        representation = record.get("representation", {})
        h0, h1, l0, l1 = file["box"][:]
        print(f"{args.segment.name}: {file.attrs['format']}, version {file.attrs['format_version']}")
        print(f"model      {record.get('identity', {}).get('config', {}).get('architectures', ['?'])[0]}")
        print(
            f"values     {representation.get('dtype', '?')}, {representation.get('block_tokens', '?')} tokens a block"
        )
        print(f"box        KV heads {h0} to {h1 - 1}, layers {l0} to {l1 - 1}")
        print(f"order      {file.attrs['kv_order']}; shape {tuple(file.attrs['kv_shape'])}")
        print(f"blocks     {len(file['keys'])}, {file['kv'].shape[1]:,} bytes each, {file['digests'].shape[1]} tiles\n")
        dtype = DTYPES.get(representation.get("dtype", ""), np.uint8)
        for row in range(min(args.blocks, len(file["keys"]))):
            values = file["kv"][row].view(dtype)
            if representation.get("dtype") == "bfloat16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            print(
                f"tokens from {file['positions'][row]:6d}  key {bytes(file['keys'][row]).hex()[:16]}  "
                f"after {bytes(file['parents'][row]).hex()[:16]}  first tile {bytes(file['digests'][row, 0]).hex()[:16]}  "
                f"values {values.min():.3g} to {values.max():.3g}"
            )


if __name__ == "__main__":
    main()
