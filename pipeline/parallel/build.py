"""Replicas from the config: how gradients are summed is chosen here, by rule."""

import torch
from torch import Tensor, nn

from pipeline.base.timing import PhaseTimer
from pipeline.config.schema import TrainConfig
from pipeline.parallel.node_memory import open_node_sum
from pipeline.parallel.ordered import OrderedReplicas
from pipeline.parallel.rank import Rank
from pipeline.parallel.replicas import DDPReplicas, Replicas
from pipeline.parallel.start import CAUSE_FIRST


def build_replicas(
    config: TrainConfig,
    model: nn.Module,
    rank: Rank,
    timer: PhaseTimer,
    images: Tensor,
    *,
    compress: bool = False,
    capture_stream: torch.cuda.Stream | None = None,
) -> Replicas:
    """Collective. Give all ranks the weights of rank 0, and choose by rule how their gradients are summed.

    CPU ranks of one node use memory that they share, unless a backend is set; all others DistributedDataParallel, which
    hides the communication behind the backward pass. `images` is a batch to try DDP with, `compress` sends gradients as
    bfloat16 (NCCL only). With `capture_stream` a step can be captured there in a CUDA graph. `timer` gets a lap at the
    end of the backward pass's own work: what comes behind is communication that nothing hides.
    """
    timeout = config.hang_timeout + CAUSE_FIRST
    rank.broadcast_tensors([*model.parameters(), *model.buffers()])
    if config.reproducible:
        return OrderedReplicas(model, rank, config.virtual_ranks, timeout)
    if rank.world_size == 1:
        return Replicas(model)
    node = open_node_sum(rank, model, timer, timeout) if config.backend == "auto" else None
    return node or DDPReplicas(model, rank, timer, images, config.accumulate, compress, capture_stream)
