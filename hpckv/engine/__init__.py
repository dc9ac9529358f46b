"""Requests in, answers out: scheduler, forward loop, sampling."""

from hpckv.engine.config import EngineConfig
from hpckv.engine.request import Request, SamplingParams

__all__ = ["EngineConfig", "Request", "SamplingParams"]
