"""Before a run's first round: Fabric, data and model are brought up, server and clients joined.

Whatever can be wrong with the settings is found here, before the run's folder exists.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedsp.auxiliary import Auxiliary
from fedsp.client import ClientModule
from fedsp.client_state import ClientStateStore
from fedsp.data import FederatedDataModule
from fedsp.evaluation import check_completions
from fedsp.executors import Executor, InProcessExecutor, Simulation
from fedsp.federation import Federation
from fedsp.history import Evaluation
from fedsp.parallel import ParallelExecutor
from fedsp.preparation import check_public_data, prepare_auxiliary
from fedsp.ranks import Ranks, check_processes
from fedsp.server import ServerModule
from fedsp.stages import try_out


def make_fabric(options: dict[str, Any]) -> Fabric:
    """Create Fabric; no process is started. Warns of arithmetic that the CPU is slow at.

    Args:
        options: What Fabric takes, as the user gave it to the trainer.

    Raises:
        ValueError: If the accelerator is not there or the devices do not fit it.
    """
    try:
        fabric = Fabric(**options)
    except (MisconfigurationException, RuntimeError) as error:
        accelerator, devices = options["accelerator"], options["devices"]
        raise ValueError(
            f"`trainer.accelerator` {accelerator!r} with `trainer.devices` {devices!r} cannot "
            f"run here: {error} Use `--trainer.accelerator cpu` where there is no accelerator."
        ) from error
    if options["precision"] == "bf16-mixed" and fabric.device.type == "cpu" and is_slow_at_bf16():
        warnings.warn(
            "This CPU has no instructions for bfloat16: with `trainer.precision: bf16-mixed` every "
            "step takes several times as long as with 32-true (and `model.backbone.dtype: "
            "float32`).",
            stacklevel=2,
        )
    return fabric


def is_slow_at_bf16() -> bool:
    """Whether this CPU's matrix products in bfloat16 are done without instructions for it."""
    has_library = torch.backends.mkldnn.is_available()
    return has_library and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def launch(fabric: Fabric) -> None:
    """Start the run's processes, or join those that torchrun or Slurm has started.

    Args:
        fabric: Not launched yet, or launched by `fabric run`.

    Raises:
        ValueError: If several processes are wanted with another strategy than `ddp`.
    """
    check_processes(fabric)
    if not fabric._launched:
        fabric.launch()


def load(fabric: Fabric, server: ServerModule) -> None:
    """Load the global model on the device.

    Args:
        fabric: Launched.
        server: Its model is loaded.

    Raises:
        ValueError: If the model cannot be loaded.
    """
    server.configure_model()
    fabric.to_device(server)


def join_data(server: ServerModule, data: FederatedDataModule) -> None:
    """Hand the data the loaded global model's tokenizer and its room; nothing is read.

    Args:
        server: With its model loaded.
        data: Takes over the model's tokenizer and what its positions leave for text.

    Raises:
        ValueError: If data and model do not fit.
    """
    backbone = server.require_model()[0]
    room = server.text_room()
    if room is not None:
        data.limit_tokens(room)
    name = backbone.spec.tokenizer or backbone.spec.name_or_path
    data.default_tokenizer(name, backbone.vocab_size)


def set_up_data(
    fabric: Fabric, server: ServerModule, data: FederatedDataModule, stage: str
) -> None:
    """Read and tokenise the data for the loaded global model, on the first rank before the others.

    Args:
        fabric: Launched.
        server: With its model loaded.
        data: Is joined with it.
        stage: As `LightningDataModule.setup` takes it.

    Raises:
        ValueError: If data and model do not fit, or the data is not as it should be.
    """
    join_data(server, data)
    with Ranks(fabric).first_before_others():
        data.prepare_data()
    data.setup(stage)


def check_trainer(trainer: Any, client: ClientModule) -> None:
    """Make the last checks before any work; see `check_run`.

    Args:
        trainer: With server and data set up.
        client: Plays every client.

    Raises:
        ValueError: As `check_run`, or if nobody has the clients' data, the aggregator needs a
            larger cohort, the acceptance a selection split, or noise cannot make the run private.
    """
    server, data, evaluation = trainer.server, trainer.data, trainer.history.evaluation
    if data.clients is None and trainer.make_executor is simulate:
        raise ValueError(
            "`data.clients` is null: the data is with the parties of a live federation, which "
            "`fedsp federation server` runs. Give a source to simulate the clients here."
        )
    if client.joint and trainer.precision == "16-mixed":
        raise ValueError(
            "`client.joint` needs `trainer.precision` 32-true or bf16-mixed, got '16-mixed': two "
            "optimizers would share one loss scale, which the first would change for the second."
        )
    cohort = trainer.cohort(0)
    trainer.rules.aggregator.check(len(cohort))
    fewest = trainer.rules.communication.min_updates
    if 0 < len(cohort) < fewest:
        raise ValueError(
            "`trainer.communication.min_updates` must be at most the number of clients of a round, "
            f"{len(cohort)}, got {fewest}: no update would ever be taken."
        )
    trains = server.training_stage.steps or (cohort and client.stages["soft_prompt"].steps)
    tunes = server.prompt_spec.num_virtual_tokens or server.tuned_weights is not None
    if trainer.num_rounds and trains and not tunes:
        raise ValueError(
            "`model.soft_prompt.num_virtual_tokens` is 0 and `model.tuned_weights` null: there is "
            "nothing to train. Set one of them, or `model.training.steps` and "
            "`client.soft_prompt.steps` to 0."
        )
    if trainer.rules.acceptance is not None:
        trainer.rules.acceptance.check(data)
    _check_privacy(trainer, client, len(cohort))
    check_run(server, client, data, cohort=cohort, evaluation=evaluation)


def _check_privacy(trainer: Any, client: ClientModule, cohort_size: int) -> None:
    rules, data = trainer.rules, trainer.data
    if (rules.privacy or client.privacy) and data.pool_clients:
        raise ValueError(
            "`data.pool_clients: true` lets the server train on the clients' rows, which no noise "
            "hides. Leave it out, or `trainer.privacy` and `client.privacy`."
        )
    if client.privacy is not None:
        client.privacy.check()
    if rules.privacy is not None:
        rules.privacy.check(
            aggregator=rules.aggregator,
            min_updates=rules.communication.min_updates,
            sampler=trainer.sampler,
            seed=trainer.seed,
            sizes=(cohort_size, data.num_clients),
        )


def check_run(
    server: ServerModule,
    client: ClientModule,
    data: FederatedDataModule,
    *,
    cohort: Sequence[int],
    evaluation: Evaluation,
) -> None:
    """Try out what a run would otherwise meet only after hours of work, and make the first prompt.

    Args:
        server: With its model loaded.
        client: Its stages are tried out.
        data: Set up.
        cohort: Clients of the first round.
        evaluation: What is measured, and which metric picks the best round.

    Raises:
        ValueError: If a stage, the auxiliary recipe, the first prompt or the public data is wrong,
            the method lacks something, or the monitored metric cannot be measured.
    """
    monitor = evaluation.monitor
    wants_choices = "accuracy" in monitor and data.num_examples("selection") > 0
    if wants_choices and not data.has_choices("selection"):
        raise ValueError(
            f"`trainer.evaluation.monitor` {monitor!r} needs questions with several choices, and "
            "`data.selection` has none. Use server/val_loss, or a fedsp.tasks.MultipleChoice task."
        )
    if evaluation.generate_tokens:
        server.check_whole("`trainer.evaluation.generate_tokens`")
    if server.tuned_weights is not None:
        server.check_whole("`model.tuned_weights`")
        if server.backbone_spec.quantization is not None:
            raise ValueError(
                "`model.tuned_weights` needs `model.backbone.quantization` to be null, got "
                f"{server.backbone_spec.quantization}: beside quantised weights only a soft prompt "
                "is tuned."
            )
    for split in ("selection", "test"):
        check_completions(data, split, evaluation)
    distillation = server.initial_distillation
    try_out(
        {
            "model.training": server.training_stage,
            "model.initial_distillation.stage": distillation.stage if distillation else None,
            **{f"client.{name}": stage for name, stage in client.stages.items()},
        }
    )
    _check_method(server, client, data, cohort)
    check_public_data(data, distillation)
    backbone, prompt = server.require_model()
    server.auxiliary_recipe.check(backbone.kv_shape.num_layers)
    if server.tuned_weights is not None:
        server.tuned_weights.check(backbone)
    server.initialize_prompt(data.sample_ids(prompt.num_virtual_tokens))


def _check_method(
    server: ServerModule, client: ClientModule, data: FederatedDataModule, cohort: Sequence[int]
) -> None:
    """Refuse a method that lacks what it trains, or what it trains it on."""
    if not cohort and not (server.training_stage.steps and data.num_examples("server")):
        raise ValueError(
            "Without clients (`trainer.sampler.clients_per_round: 0`) only the server trains: it "
            "needs `model.training.steps` above 0, and `data.server` or `data.pool_clients: true`."
        )
    recipe, distillation = server.auxiliary_recipe, server.initial_distillation
    first = client.stages["auxiliary"].steps
    if cohort and first and server.tuned_weights is not None and server.tuned_weights.takes_all:
        raise ValueError(
            "`client.auxiliary.steps` must be 0 for `model.tuned_weights` "
            f"{type(server.tuned_weights).__name__}, got {first}: the second stage trains them all."
        )
    if distillation and distillation.prompts and not server.prompt_spec.num_virtual_tokens:
        raise ValueError(
            "`model.initial_distillation.prompts` teaches to read prompts, and "
            "`model.soft_prompt.num_virtual_tokens` is 0. Set it to null."
        )
    if server.deploy_auxiliary and not recipe.knows_all_tokens:
        raise ValueError(
            "`model.deploy_auxiliary` measures the auxiliary model, and one of a trimmed "
            "vocabulary gives other tokens no likelihood: its loss would leave them out. Choose "
            "`model.auxiliary` without TrimmedVocabulary, such as fedsp.compression.LowRank."
        )
    if recipe.is_taught:
        return
    for option, steps in (
        ("client.auxiliary.steps", first),
        ("model.initial_distillation.stage.steps", distillation.stage.steps if distillation else 0),
    ):
        if steps:
            raise ValueError(
                f"`{option}` must be 0 for `model.auxiliary` {type(recipe).__name__}, which has no "
                f"weights of its own to train, got {steps}."
            )


def install(trainer: Any, client: ClientModule, auxiliary: Auxiliary) -> None:
    """Give the auxiliary model to the client and bring both to their device.

    Args:
        trainer: Gives Fabric, server, sampler and seed.
        client: Plays a client, or every one.
        auxiliary: As it is handed out.
    """
    server = trainer.server
    prompt = server.require_model()[1]
    # a server that trains alone may tune what no client could
    tuned_weights = server.tuned_weights if trainer.cohort(0) else None
    client.install(auxiliary, prompt.num_virtual_tokens, trainer.seed, tuned_weights)
    trainer.fabric.to_device(client)


def participations(trainer: Any) -> Counter[int]:
    """Return how often each client takes part in the whole run: its schedules are as long."""
    rounds = range(trainer.num_rounds)
    return Counter(client_id for idx in rounds for client_id in trainer.cohort(idx))


def simulate(trainer: Any, client: ClientModule, auxiliary: Auxiliary) -> Executor:
    """Make the executor that plays every client in the run's own processes.

    Args:
        trainer: Gives Fabric, server, data, folder, ledger, rules, rounds and seed.
        client: Plays every client, with its model installed.
        auxiliary: Not used: the client has it.
    """
    ranks = Ranks(trainer.fabric)
    simulation = Simulation(
        fabric=trainer.fabric,
        client=client,
        data=trainer.data,
        store=ClientStateStore(
            trainer.folder.clients,
            trainer.client_memory_bytes,
            trainer.checkpoints.keep,
            deletes=ranks.rank == 0,
        ),
        ledger=trainer.ledger,
        contract=trainer.rules.contract(trainer.server.payload()),
        seed=trainer.seed,
        participations=participations(trainer),
    )
    local = InProcessExecutor(simulation)
    return local if ranks.size == 1 else ParallelExecutor(local, ranks)


def open_federation(trainer: Any, client: ClientModule) -> Federation:
    """Make the auxiliary model and what carries out the clients' work, and join them.

    Args:
        trainer: Gives Fabric, server, data, folder, ledger, rules, rounds, seed and
            `make_executor`; gets `preparation`, and its callbacks are told.
        client: Plays every client.

    Returns:
        The federation before its first round.
    """
    server, data = trainer.server, trainer.data
    trainer.preparation = made = prepare_auxiliary(
        trainer.fabric, server, data, kept=trainer.folder.auxiliary, trainer=trainer
    )
    trainer.call("on_distillation_end", made.before, made.after, made.cached)
    server.start_tuning(made.auxiliary)
    trainer.fabric.to_device(server)
    install(trainer, client, made.auxiliary)
    if trainer.rules.privacy is not None:
        trainer.rules.privacy.start(
            len(trainer.cohort(0)),
            data.num_clients,
            Ranks(trainer.fabric),
            trainer.folder.privacy_budget,
        )
    contract = trainer.rules.contract(server.payload())
    trainer.ledger.declare(contract, made.auxiliary.handout_tensors())
    return Federation(
        trainer.fabric,
        server,
        data,
        trainer.make_executor(trainer, client, made.auxiliary),
        trainer.rules,
        num_rounds=trainer.num_rounds,
        seed=trainer.seed,
    )
