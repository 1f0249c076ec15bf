"""From a config to a trainer: wiring alone. Each room builds its own parts from its own section."""

from dataclasses import asdict
from functools import partial

from pipeline.base.signals import StopRequest
from pipeline.base.timing import StartupTimer, build_timer
from pipeline.config import Config
from pipeline.data.build import build_train_loader
from pipeline.data.samples import Dataset
from pipeline.learning.evaluation import build_evaluator
from pipeline.learning.losses import LOSSES
from pipeline.learning.optim import Schedule
from pipeline.learning.update import Precision, build_update
from pipeline.models.catalog import ModelSpec, build_model
from pipeline.parallel.rank import Rank
from pipeline.parallel.replicas import OrderedReplicas, build_replicas
from pipeline.run.checkpoint import RunIdentity
from train.agreement import Agreement
from train.display import build_display
from train.execution import choose_execution
from train.output import RunOutput
from train.profiling import Profiler
from train.recording import Recording
from train.saving import Saving
from train.steps.captured import CapturedStep
from train.steps.eager import EagerStep, OrderedStep
from train.steps.parts import Step, StepParts
from train.trainer import Trainer


def build_spec(config: Config, dataset: Dataset) -> ModelSpec:
    model = config.model
    return ModelSpec(model.name, model.arguments, dataset.channels, dataset.image_size, len(dataset.classes))


def build_schedule(config: Config, dataset: Dataset) -> Schedule:
    steps_per_epoch = -(-len(dataset.train) // config.data.global_batch_size)
    return Schedule(config.optim, steps_per_epoch, config.train.epochs * steps_per_epoch)


def build_trainer(
    config: Config, rank: Rank, dataset: Dataset, output: RunOutput, stop: StopRequest, startup: StartupTimer
) -> Trainer:
    """Collective. Return a trainer whose model has the same weights on every rank."""
    spec, data, settings, seed = build_spec(config, dataset), config.data, config.train, config.run.seed
    execution = rank.run_on_main(lambda: choose_execution(config, rank, dataset))
    placement, capture = execution.placement, execution.is_captured
    precision, timer, loss = Precision(execution.precision, rank.device), build_timer(rank.device), LOSSES[config.loss]
    dtype = precision.weights_dtype
    model = build_model(spec, settings, seed, rank.device, dtype)
    update = build_update(model, build_schedule(config, dataset), precision, settings.clip_norm, capture=capture)
    loader = build_train_loader(data, settings, seed, dataset, rank, placement=placement, dtype=dtype, timer=timer)
    evaluator_of = partial(build_evaluator, data, model, loss, precision, rank, dataset, placement)
    image = loader.prepare.normalize(dataset.train.read(0)[None].to(rank.device))
    replicas = build_replicas(settings, model, rank, timer, image, compress=execution.compress, capture=capture)
    output.execution(execution.reasons | {"gradients": replicas.description})
    parts = StepParts(replicas, loader.prepare, loss, update, precision, rank, timer, seed)
    display = build_display(rank, settings.epochs, len(dataset.train), update.schedule.total_steps)
    return Trainer(
        config=settings,
        saving=Saving(config.checkpoint, rank, output, display, stop),
        rank=rank,
        model=model,
        step=_build_step(parts, loader.order.full_share),
        update=update,
        train_loader=loader,
        evaluator=evaluator_of(dataset.validation),
        test_evaluator=None if dataset.test is None else evaluator_of(dataset.test),
        recording=Recording(settings, rank, timer, update, output, display),
        output=output,
        display=display,
        stop=stop,
        agreement=Agreement(rank),
        timer=timer,
        startup=startup,
        profiler=Profiler(settings.profile if rank.is_main else 0),
        identity=RunIdentity(output.run_id, config.flat(), dataset.digest, asdict(spec)),
    )


def _build_step(parts: StepParts, batch_size: int) -> Step:
    if isinstance(parts.replicas, OrderedReplicas):
        return OrderedStep(parts, parts.replicas)
    return EagerStep(parts) if parts.replicas.capture_stream is None else CapturedStep(parts, batch_size)
