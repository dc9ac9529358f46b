"""How many tokens a second a device cannot exceed, whatever the program: what a ledger says beyond it is not true.

A token costs at least 2 floating-point operations for each weight of the layers' matrices (Kaplan et al. 2020, arXiv:2001.08361,
2.1), and a device does no more of them than its data sheet says: the largest dense figure of FP16, FP8 or INT8 in NVIDIA's and
AMD's data sheets of V100, A100, A40, L40S, H100, H200, B200, MI250X and MI300X. A process on CPUs: two sockets of 128 cores, each
with 2,048 operations a cycle (AMX, bfloat16; Intel's Optimization Reference Manual, 20) at 3.9 GHz.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hpckv.store.inspect import NamespaceView

_PEAK_FLOPS = {
    "V100": 130e12,
    "A100": 624e12,
    "A40": 299e12,
    "L40S": 733e12,
    "H100": 1979e12,
    "GH200": 1979e12,
    "H200": 1979e12,
    "B200": 4500e12,
    "MI250X": 383e12,
    "MI300X": 2615e12,
    "cpu": 2 * 128 * 2048 * 3.9e9,
}


def flops_per_token(config: Mapping[str, Any]) -> float | None:
    """At least so many, by a `config.json`; None if it does not say how large the layers are."""
    try:
        hidden, layers, heads = (int(config[f]) for f in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        head = int(config.get("head_dim") or hidden // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        weights = 2 * hidden * head * (heads + kv_heads) + 3 * hidden * int(config["intermediate_size"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return 2.0 * layers * weights if weights > 0 else None


def models_in(namespaces: Iterable[NamespaceView]) -> dict[str, float]:
    """Operations for a token at least, by the digest of the weights, of models that a store has blocks of."""
    found = {}
    for view in namespaces:
        identity = view.record.get("identity")
        if isinstance(identity, dict) and isinstance(identity.get("config"), dict):
            flops = flops_per_token(identity["config"])
            if flops is not None:
                found[str(identity.get("weights"))] = flops
    return found


def most_tokens_per_s(gpu: str, num_gpus: int, flops: float | None) -> float | None:
    """None where the device or the model is not known."""
    peaks = [peak for name, peak in _PEAK_FLOPS.items() if name in gpu]
    return num_gpus * max(peaks) / flops if peaks and flops else None
