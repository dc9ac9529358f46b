"""Paged attention behind one contract, with a backend per kind of arithmetic."""

from hpckv.attention.backend import AttentionBackend, AttentionPlan, HeadShape, SequenceChunk, make_backend

__all__ = ["AttentionBackend", "AttentionPlan", "HeadShape", "SequenceChunk", "make_backend"]
