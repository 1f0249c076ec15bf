"""From a config to a trainer: wiring alone. Each room builds its own parts from its own section."""

from dataclasses import asdict

import torch
from torch import nn

from pipeline.base.seeding import stream_seed
from pipeline.base.signals import StopRequest
from pipeline.base.timing import StartupTimer, build_timer
from pipeline.config import Config
from pipeline.data.build import build_eval_loader, build_train_loader
from pipeline.data.samples import Dataset, Samples
from pipeline.learning.evaluation import Evaluator
from pipeline.learning.losses import LOSSES
from pipeline.learning.optim import Schedule, build_optimizer
from pipeline.learning.update import Precision, Update
from pipeline.models.catalog import ModelSpec
from pipeline.parallel.build import build_replicas
from pipeline.parallel.ordered import OrderedReplicas
from pipeline.parallel.rank import Rank
from pipeline.parallel.replicas import new_stream
from pipeline.run.checkpoint import RunIdentity
from train.agreement import Agreement
from train.display import build_display
from train.execution import choose_execution
from train.output import RunOutput
from train.profiling import build_profiler
from train.recording import Recording
from train.steps.captured import CapturedStep
from train.steps.eager import EagerStep
from train.steps.ordered import OrderedStep
from train.steps.parts import Step, StepParts
from train.trainer import Trainer


def build_spec(config: Config, dataset: Dataset) -> ModelSpec:
    model = config.model
    return ModelSpec(model.name, model.arguments, dataset.channels, dataset.image_size, len(dataset.classes))


def build_schedule(config: Config, dataset: Dataset) -> Schedule:
    steps_per_epoch = -(-len(dataset.train) // config.data.global_batch_size)
    return Schedule(config.optim, steps_per_epoch, config.train.epochs * steps_per_epoch)


def build_trainer(
    config: Config,
    rank: Rank,
    dataset: Dataset,
    output: RunOutput,
    stop: StopRequest,
    startup: StartupTimer,
    run_id: str,
) -> Trainer:
    """Collective. Return a trainer whose model has the same weights on every rank."""
    spec, settings = build_spec(config, dataset), config.train
    execution = choose_execution(config, rank, dataset)
    precision, loss = Precision(execution.precision, rank.device), LOSSES[config.loss]
    model = _build_model(config, spec, rank.device, precision.weights_dtype)
    stream = new_stream(rank.device) if execution.is_captured else None
    groups, capture_on = [{"params": list(model.parameters())}], rank.device if stream else None
    optimizer = build_optimizer(config.optim, groups, capture_on=capture_on)
    update = Update(optimizer, build_schedule(config, dataset), precision, settings.clip_norm)
    timer = build_timer(rank.device)
    placement, dtype = execution.placement, precision.weights_dtype
    loader = build_train_loader(config, dataset, rank, placement=placement, dtype=dtype, timer=timer)

    def evaluator(samples: Samples) -> Evaluator:
        apart = build_timer(rank.device)  # an evaluation belongs to no step
        blocks = build_eval_loader(config.data, dataset, samples, rank, placement=placement, dtype=dtype, timer=apart)
        return Evaluator(model, blocks, loss, precision, rank, len(dataset.classes))

    image = loader.prepare.normalize(dataset.train.read(0)[None].to(rank.device))
    compress = execution.compress
    replicas = build_replicas(settings, model, rank, timer, image, compress=compress, capture_stream=stream)
    output.execution(execution.reasons | {"gradients": replicas.description})
    parts = StepParts(replicas, loader.prepare, loss, update, precision, rank, timer, config.run.seed)
    display = build_display(rank, settings.epochs, len(dataset.train), update.schedule.total_steps)
    return Trainer(
        config=settings,
        saving=config.checkpoint,
        rank=rank,
        model=model,
        step=_build_step(parts, loader.order.full_share, stream),
        update=update,
        train_loader=loader,
        evaluator=evaluator(dataset.validation),
        test_evaluator=None if dataset.test is None else evaluator(dataset.test),
        recording=Recording(settings, rank, timer, update, output, display),
        output=output,
        display=display,
        stop=stop,
        agreement=Agreement(rank),
        timer=timer,
        startup=startup,
        profiler=build_profiler(settings.profile if rank.is_main else 0),
        identity=RunIdentity(run_id, config.flat(), dataset.digest, asdict(spec)),
        waits_in_backward=replicas.waits_in_backward,
    )


def _build_model(config: Config, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return the model with the same initial weights on every rank, by the seed."""
    torch.manual_seed(stream_seed(config.run.seed, "weights"))
    model = spec.build().to(device, dtype)
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if config.train.compile:
        model.compile()
    return model


def _build_step(parts: StepParts, batch_size: int, stream: torch.cuda.Stream | None) -> Step:
    if isinstance(parts.replicas, OrderedReplicas):
        return OrderedStep(parts, parts.replicas)
    return EagerStep(parts) if stream is None else CapturedStep(parts, batch_size, stream)
