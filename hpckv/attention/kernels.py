"""Attention of given queries over given keys with its log-sum-exp, and the merge of partial results.

Shapes: B independent problems, N heads, R query rows, L keys, H head size. Keys may be expanded views (stride 0
over heads): nothing here copies them.
"""

from __future__ import annotations

import math

import torch


def attend_with_lse(
    q_BNRH: torch.Tensor,
    k_BNLH: torch.Tensor,
    v_BNLH: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention, (B, N, R, H) in q's dtype, and the log-sum-exp of its scores, (B, N, R) in fp32.

    `mask` is additive, in q's dtype, broadcast to (B, N, R, L); `is_causal` is for square problems.
    """
    if softcap is None and q_BNRH.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q_BNRH, k_BNLH, v_BNLH, 0.0, is_causal, attn_mask=mask, scale=scale)
        return out, lse
    if softcap is None and q_BNRH.device.type == "cuda" and q_BNRH.shape[-1] % 8 == 0:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        bias = None if mask is None else _aligned(mask).expand(*q_BNRH.shape[:3], k_BNLH.shape[2])
        out, lse, *_ = efficient(
            q_BNRH, k_BNLH, v_BNLH, bias, compute_log_sumexp=True, is_causal=is_causal, scale=scale
        )
        return out, lse[..., : q_BNRH.shape[2]]  # the kernel pads rows
    return _plain(q_BNRH, k_BNLH, v_BNLH, scale, softcap, mask, is_causal)


def _aligned(mask: torch.Tensor) -> torch.Tensor:
    """The same values in rows that begin at multiples of 16 elements, as the kernel reads them."""
    num_keys = mask.shape[-1]
    return torch.nn.functional.pad(mask, (0, -num_keys % 16))[..., :num_keys]


def _plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    softcap: float | None,
    mask: torch.Tensor | None,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.matmul(q.float() * scale, k.float().transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(-1)
    return torch.matmul((scores - lse[..., None]).exp(), v.float()).to(q.dtype), lse


class Merger:
    """Partial attention results of rows, merged by log-sum-exp.

    A row may get any number of partials over disjoint keys. Two of them weigh exp(lse_1) and exp(lse_2) in the whole,
    so the merged result lies between theirs, at sigmoid(lse_2 - lse_1) of the way.
    """

    def __init__(self, like_TNH: torch.Tensor) -> None:
        num_rows, num_heads, _ = like_TNH.shape
        self.out_TNH = torch.zeros(like_TNH.shape, dtype=torch.float32, device=like_TNH.device)
        self.lse_TN = torch.full((num_rows, num_heads), -math.inf, device=like_TNH.device)
        self._is_empty = True

    def add(self, rows: torch.Tensor | slice, out_RNH: torch.Tensor, lse_RN: torch.Tensor) -> None:
        """Merge one partial of `rows`; a row stands at most once in `rows`."""
        is_whole = isinstance(rows, slice) and rows.stop - rows.start == len(self.out_TNH)
        if is_whole and self._is_empty:
            self.out_TNH, self.lse_TN = out_RNH.float(), lse_RN
        elif is_whole:
            self.out_TNH, self.lse_TN = _merge(self.out_TNH, self.lse_TN, out_RNH, lse_RN)
        else:
            self.out_TNH[rows], self.lse_TN[rows] = _merge(self.out_TNH[rows], self.lse_TN[rows], out_RNH, lse_RN)
        self._is_empty = False


def _merge(
    out_RNH: torch.Tensor, lse_RN: torch.Tensor, more_RNH: torch.Tensor, more_lse_RN: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    way_RN = torch.sigmoid(more_lse_RN - lse_RN)
    return torch.lerp(out_RNH, more_RNH.float(), way_RN[..., None]), torch.logaddexp(lse_RN, more_lse_RN)
