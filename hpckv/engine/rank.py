"""One process's part of an engine: its layers and heads, the pages and the share of the store that go with them.

Ranks of one replica build this at the same time; what must be the same everywhere (dtype, weights, stages, pages) they agree on
here, before the first step.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from pathlib import Path

import numpy as np
import torch

from hpckv.attention import make_backend
from hpckv.comm import ParallelConfig, World
from hpckv.comm.parallel_dims import balanced_stages
from hpckv.comm.transport import make_transport
from hpckv.device import Capability, choose_dtype, probe
from hpckv.device.capability import DTYPES
from hpckv.device.host_memory import keep_freed_memory
from hpckv.engine.config import EngineConfig
from hpckv.engine.runner import Runner
from hpckv.engine.sizing import PagePlan, build_namespace, digest_weights, plan_pages
from hpckv.errors import CapabilityError
from hpckv.kvcache import CacheConfig
from hpckv.kvcache.kv_pool import KVPool
from hpckv.model import ModelConfig, ModelSettings, read_config
from hpckv.model.decoder import Decoder
from hpckv.model.stage import staged_model
from hpckv.store import StoreConfig, TieredStore, open_store

_DIGEST_BYTES = 64
_BALANCE_ROWS = 64
_KEPT_TAIL_BYTES = 1024**3
"""Of decoding sequences' keys and values, beside those in the pages."""


class Rank:
    """What every rank has; rank 0 schedules beside it (`Engine`), the others only follow (`serve`)."""

    def __init__(
        self,
        settings: ModelSettings,
        *,
        store: StoreConfig | None,
        cache: CacheConfig,
        engine: EngineConfig,
        parallel: ParallelConfig,
        world: World,
    ) -> None:
        """Check model, machine and store; the weights come with `load`. Raises `ModelError`, `CapabilityError`, `StoreError`."""
        self.settings, self.cache_config, self.config, self.parallel = settings, cache, engine, parallel
        self._in_use = contextlib.ExitStack()
        self.folder = Path(settings.path)
        if settings.stage:
            site = store.site_local if store else None
            self.folder = self._in_use.enter_context(staged_model(self.folder, site=site))
        self.model_config: ModelConfig = read_config(self.folder)
        self.capability: Capability = probe(settings.device)
        self.dtype_name = choose_dtype(settings.dtype, self.model_config.stored_dtype, self.capability)
        self._refuse_what_is_not_here()
        is_cuda = self.capability.kind == "cuda"
        # A task may see all GPUs of its node, or only its own.
        self.device = (
            torch.device("cuda", world.local_rank % torch.cuda.device_count()) if is_cuda else torch.device("cpu")
        )
        if not is_cuda and world.num_local > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // world.num_local))
        self.world = world
        if not world.is_single:
            self._agree_on_dtype()
            self.world = self._agree_on_stages()
        self.dims = self.world.dims
        self.pages: PagePlan = plan_pages(
            self.model_config, self.folder, cache, self.capability, self.dtype_name, self.dims, world.num_local
        )
        self.store: TieredStore | None = None
        self.store_config = store
        self.weights_digest: str | None = None
        if store is not None:
            self._open_store(store)
        self.transport = make_transport(World.single(), parallel, self.device, is_strict=False)
        self.pool: KVPool | None = None
        self._runner: Runner | None = None

    def load(self, num_pages: int | None = None) -> None:
        """Read the weights and take the pages, as many as every rank has room for and no more than `num_pages`.

        With 0 of them on rank 0 nothing is loaded anywhere: there is nothing to do.
        """
        limit = self.pages.num_pages if num_pages is None else min(num_pages, self.pages.num_pages)
        self.pages = self.pages.of(self._least(limit, "how many pages there are"))
        if not self.pages.num_pages:
            return
        dtype = getattr(torch, self.dtype_name)
        if self.device.type == "cpu":
            keep_freed_memory()
        backend = make_backend(
            self.config.numerics,
            block_tokens=self.cache_config.block_tokens,
            device=self.device,
            shares_prefixes=self.config.share_prefix_attention,
            kept_tail_tokens=self._kept_tail_tokens,
        )
        is_strict = self.config.numerics == "strict"
        self.transport = make_transport(self.world, self.parallel, self.device, is_strict=is_strict)
        buffers = self.store.buffers if self.store else None
        self.pool = KVPool(
            self.pages.geometry, num_pages=self.pages.num_pages, dtype=dtype, device=self.device, buffers=buffers
        )
        if buffers:  # there is time while the weights are read
            threading.Thread(target=buffers.reserve, name="hpckv-reserve", daemon=True).start()
        decoder = Decoder(
            self.model_config,
            self.folder,
            backend,
            dtype=dtype,
            device=self.device,
            dims=self.dims,
            collectives=self.transport.collectives,
        )
        self._runner = Runner(decoder, self.pool, numerics=self.config.numerics)
        self._least(0, "the other ranks to read their weights")
        self.world.watch.deadline_s = self.parallel.deadline_s

    @property
    def _kept_tail_tokens(self) -> int:
        """On GPUs gathering is cheap and memory dear; with micro-batches other sequences decode in every step."""
        if self.device.type != "cpu" or self.parallel.num_micro_batches > 1:
            return 0
        geometry = self.pages.geometry
        return _KEPT_TAIL_BYTES * geometry.block_tokens // geometry.block_bytes

    @property
    def runner(self) -> Runner:
        assert self._runner is not None
        return self._runner

    def close(self) -> None:
        """Seal what the store still holds open; idempotent."""
        if self.store:
            self.store.close()
        self._in_use.close()

    def _least(self, value: int, what: str) -> int:
        """The least of all ranks' numbers; none goes on before all are here."""
        if self.world.is_single:
            return value
        values = np.array([value], np.int32)
        self.world.watch.wait(self.world.group.reduce_min(values), what)
        return int(values[0])

    def _agree_on_dtype(self) -> None:
        number = list(DTYPES).index(self.dtype_name)
        if self._least(number, "the other ranks' dtype") != -self._least(-number, "the other ranks' dtype"):
            raise CapabilityError(
                f"the replica's devices compute in different dtypes (here {self.dtype_name}); set model.dtype"
            )

    def _agree_on_stages(self) -> World:
        """Layers cut so that stages take equally long, by what rank 0 measures."""
        dims = self.world.dims
        if dims.pp == 1:
            return self.world
        ends = np.zeros(dims.pp, np.int32)
        if self.world.is_root:
            head = head_cost(self.model_config, getattr(torch, self.dtype_name), self.device, dims.tp)
            ends[:] = balanced_stages(self.model_config.num_layers, dims.pp, last=head)
        self.world.watch.wait(self.world.group.broadcast(ends), "rank 0 to cut the layers into stages")
        return self.world.with_stages(tuple(ends.tolist()))

    def _open_store(self, config: StoreConfig) -> None:
        digest = np.zeros(_DIGEST_BYTES, np.uint8)
        if self.world.is_root:
            digest[:] = np.frombuffer(digest_weights(self.folder).encode(), np.uint8)
        self.world.watch.wait(self.world.group.broadcast(digest), "rank 0 to digest the weights")
        self.weights_digest = digest.tobytes().decode()
        namespace = build_namespace(
            self.weights_digest,
            self.model_config,
            self.cache_config,
            self.config,
            self.capability,
            self.dtype_name,
            self.dims.tp,
        )
        self.store = open_store(config, namespace, self.pages.geometry, owned=self.pages.owned)

    def _refuse_what_is_not_here(self) -> None:
        if self.settings.quantization != "none":
            raise CapabilityError(f"model.quantization: {self.settings.quantization} is not in this version of hpckv")
        if self.cache_config.kv_dtype not in ("auto", self.dtype_name):
            raise CapabilityError(
                f"cache.kv_dtype: {self.cache_config.kv_dtype} is not in this version of hpckv; keys and values are "
                f"kept in the model's dtype ({self.dtype_name})"
            )


@torch.inference_mode()
def head_cost(model: ModelConfig, dtype: torch.dtype, device: torch.device, tp: int) -> float:
    """What logits take of a step, in layers: their matrix product beside a layer's, measured on this device."""
    width, heads = model.hidden_size, model.num_heads + 2 * model.num_kv_heads
    per_layer = heads * model.head_dim + model.num_heads * model.head_dim + 3 * model.intermediate_size
    x = torch.zeros(_BALANCE_ROWS, width, dtype=dtype, device=device)

    def seconds(columns: int) -> float:
        weight = torch.zeros(max(1, columns // tp), width, dtype=dtype, device=device)
        times = []
        for _ in range(7):
            begun = time.perf_counter()
            torch.nn.functional.linear(x, weight).sum().item()
            times.append(time.perf_counter() - begun)
        return statistics.median(times)

    return seconds(model.vocab_size) / seconds(per_layer)
