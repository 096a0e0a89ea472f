"""The federated trainer: owns Fabric and the round loop, and does no tensor maths of its own."""

import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.accelerators import Accelerator
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment, Precision
from lightning.fabric.strategies import Strategy
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from fedsp.acceptance import Acceptance
from fedsp.aggregation import Aggregator, ServerOptimizer, StreamingMean
from fedsp.auxiliary import Auxiliary
from fedsp.callbacks import FederatedCallback
from fedsp.checkpoint import Checkpoints, RunState
from fedsp.client import ClientModule
from fedsp.data import FederatedDataModule
from fedsp.evaluation import Subject, check_completions, measure_split, model_subject
from fedsp.executors import Executor
from fedsp.export import check_exportable, export_tuned
from fedsp.failures import failing_together
from fedsp.federation import Communication, Rules
from fedsp.harness import Harness, find_tasks, run_harness, write_harness
from fedsp.history import Evaluation, History
from fedsp.ledger import Ledger, next_attempt
from fedsp.opening import (
    check_trainer,
    join_data,
    launch,
    load,
    make_fabric,
    open_federation,
    set_up_data,
    simulate,
)
from fedsp.payload import Payload
from fedsp.plan import make_plan
from fedsp.plan_table import print_plan
from fedsp.predictions import check_output, write_predictions
from fedsp.preparation import check_handed_out, handed_out
from fedsp.privacy import CentralPrivacy
from fedsp.privacy_report import report_privacy
from fedsp.progress import RichProgress
from fedsp.prompts import Prompts
from fedsp.ranks import Ranks
from fedsp.report import privacy_results, spent_text
from fedsp.round_recorder import RoundRecorder
from fedsp.run_folder import RunFolder
from fedsp.run_state import RESUME_IGNORES, capture, restore
from fedsp.sampling import ClientSampler, UniformSampler
from fedsp.server import ServerModule
from fedsp.state_files import write_text_atomically
from fedsp.throughput import Throughput
from fedsp.tracking import LoggerFactory, Tracker, csv_logger

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
ExecutorFactory = Callable[["FederatedTrainer", ClientModule, Auxiliary], Executor]
Plugin = Precision | ClusterEnvironment | CheckpointIO


class FederatedTrainer:
    """Runs rounds of sampling, broadcast, client work, aggregation and server training."""

    def __init__(  # noqa: PLR0913 - the signature is the command line's schema
        self,
        accelerator: str | Accelerator = "auto",
        strategy: str | Strategy = "auto",
        devices: list[int] | str | int = 1,
        num_nodes: int = 1,
        precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
        plugins: Plugin | list[Plugin] | None = None,
        callbacks: list[FederatedCallback] | FederatedCallback | None = None,
        logger: list[LoggerFactory] | LoggerFactory | None = None,
        num_rounds: int = 10,
        sampler: ClientSampler | None = None,
        aggregator: Aggregator | None = None,
        server_optimizer: OptimizerCallable | None = None,
        acceptance: Acceptance | None = None,
        privacy: CentralPrivacy | None = None,
        communication: Communication = Communication(),
        evaluation: Evaluation = Evaluation(),
        seed: int | None = None,
        run_dir: str = "runs/default",
        keep_checkpoints: int = 2,
        client_memory_bytes: int = 0,
        enable_progress_bar: bool = True,
    ) -> None:
        """Keep the settings; nothing is loaded and no process is started before a method is called.

        Args:
            accelerator: `cpu`, `gpu` or `auto`, as Fabric takes it.
            strategy: As Fabric takes it.
            devices: Number of devices, as Fabric takes it.
            num_nodes: Number of machines.
            precision: Arithmetic of every step. The prompt and its optimizer are fp32 in each; for
                bf16 weights of the global model set `model.backbone.dtype`.
            plugins: Fabric plugins.
            callbacks: Called at the points of a run that `fedsp.callbacks` names.
            logger: Functions or classes called with the folder for their files; null writes
                `csv/metrics.csv`.
            num_rounds: Communication rounds, at least 0.
            sampler: Chooses each round's cohort; null takes every client.
            aggregator: Combines the updates; null averages them.
            server_optimizer: Any `torch.optim` class, stepped on the pseudo-gradient (FedAvgM,
                FedAdam, ...); null takes the aggregate as it is (FedAvg).
            acceptance: Measures how much of a step helps the global model, the clients' or the
                server's own too, and takes that much; null takes all of it.
            privacy: Clips the updates, averages them under noise and ends the run when the budget
                is spent (docs/differential-privacy.md); null averages them as they are.
            communication: What travels, and what is done with it.
            evaluation: When to measure on the selection split, what picks the best round, when to
                stop.
            seed: Seed of sampling, dropout and distillation; null takes `seed_everything`.
            run_dir: New or empty folder of the run's files.
            keep_checkpoints: Checkpoints kept beside the best one.
            client_memory_bytes: Memory that clients away from the cohort may use; the rest lies on
                disk.
            enable_progress_bar: Show progress bars and the table of rounds.

        Raises:
            ValueError: If a value is out of its range, or the accelerator is not there.
        """
        if precision not in PRECISIONS:
            raise ValueError(
                f"`trainer.precision` must be one of {', '.join(PRECISIONS)}, got {precision!r}. "
                "`model.backbone.dtype: bfloat16` gives bf16 weights beside a prompt in fp32."
            )
        for name, number in (
            ("num_rounds", num_rounds),
            ("client_memory_bytes", client_memory_bytes),
        ):
            if number < 0:
                raise ValueError(f"`trainer.{name}` must be at least 0, got {number}.")
        shown = [RichProgress()] if enable_progress_bar else []
        # the throughput is read before other callbacks measure models of their own
        self.callbacks = [Throughput(), *_as_list(callbacks), RoundRecorder(), *shown]
        self.fabric = make_fabric(
            {
                "accelerator": accelerator,
                "strategy": strategy,
                "devices": devices,
                "num_nodes": num_nodes,
                "precision": precision,
                "plugins": plugins,
            }
        )
        self.precision = precision
        self.loggers = _as_list(logger) or [csv_logger]
        self.num_rounds = num_rounds
        self.sampler = sampler or UniformSampler()
        self.rules = Rules(
            communication,
            aggregator or StreamingMean(),
            ServerOptimizer(server_optimizer),
            acceptance,
            privacy,
        )
        self.history = History(evaluation)
        self.seed = seed or 0
        self.folder = RunFolder(run_dir)
        self.checkpoints = Checkpoints(self.folder.checkpoints, keep=keep_checkpoints)
        self.client_memory_bytes = client_memory_bytes
        self.make_executor: ExecutorFactory = simulate
        self.config: dict[str, Any] = {}
        self.config_text = ""

    # --- the run ----------------------------------------------------------------------------------

    def fit(
        self,
        model: ServerModule,
        client: ClientModule,
        datamodule: FederatedDataModule,
        ckpt_path: str | None = None,
    ) -> None:
        """Run the federated rounds, then test and export the best round's prompt.

        Args:
            model: The server.
            client: Plays every client.
            datamodule: Every party's data.
            ckpt_path: `last` goes on from the newest checkpoint in `trainer.run_dir`.
        """
        self.folder.check(resume=ckpt_path is not None)
        state = self._resume_state(ckpt_path)
        with self._together():
            self._fit(model, client, datamodule, state)

    def _fit(
        self,
        model: ServerModule,
        client: ClientModule,
        datamodule: FederatedDataModule,
        state: RunState | None,
    ) -> None:
        self._set_up(model, datamodule, "fit")
        self._claim_folder(client)
        status = "failed"
        try:
            self._open(client, state)
            while self._goes_on() and self._can_pay(self.history.rounds_done):
                self._run_round(self.history.rounds_done)
            if self._goes_on():
                self.fabric.print(spent_text(self.history.rounds_done))
            self._conclude()
            status = "success"
        except BaseException as exception:
            self.call("on_exception", exception)
            raise
        finally:
            self.tracker.finalize(status)
            self.ledger.close()

    def _goes_on(self) -> bool:
        return self.history.rounds_done < self.num_rounds and not self.history.should_stop

    def _can_pay(self, round_idx: int) -> bool:
        """Whether a round stays within the privacy budget."""
        privacy = self.rules.privacy
        return privacy is None or privacy.affords(round_idx, self.cohort(round_idx))

    def cohort(self, round_idx: int) -> list[int]:
        """Return the clients of a round."""
        return self.sampler.cohort(self.data.num_clients, seed=self.seed, round_idx=round_idx)

    def _run_round(self, round_idx: int) -> None:
        started = time.perf_counter()
        cohort = self.cohort(round_idx)
        self.call("on_round_start", round_idx, cohort)
        metrics = self.federation.collect(round_idx, cohort, self.call)
        metrics |= self.federation.train_server(round_idx, self.call)
        if self.history.is_due(round_idx, self.num_rounds) or not self._can_pay(round_idx + 1):
            metrics |= self._select(round_idx)
        metrics |= {f"comm/{k}": float(v) for k, v in self.ledger.totals(round_idx).items()}
        metrics |= {"round": float(round_idx), "round/seconds": time.perf_counter() - started}
        self.call("on_round_metrics", round_idx, metrics)
        self.history.add(metrics)
        self.tracker.log(metrics, round_idx)
        self.call("on_round_end", round_idx, metrics)
        self._save()

    def _select(self, round_idx: int) -> dict[str, float]:
        """Measure the server's prompt on the selection split and keep it if it is the best."""
        if not self.data.num_examples("selection"):
            return {}
        measured = self.measure(self.server, "selection")
        metrics = {f"server/val_{name}": value for name, value in measured.items()}
        if self.history.offer(round_idx, metrics, self.server.payload()):
            self._save_best()
        return metrics

    def plan(
        self,
        model: ServerModule,
        client: ClientModule,
        datamodule: FederatedDataModule,
        as_json: bool = False,
    ) -> None:
        """Say what a run would need and send, and try a few steps; no training, no files.

        Args:
            model: The server.
            client: Plays every client.
            datamodule: Every party's data.
            as_json: Print one JSON object in bytes and seconds, not a table.
        """
        with self._together():
            self.server, self.data = model, datamodule
            load(self.fabric, model)
            set_up_data(self.fabric, model, datamodule, "fit")
            check_trainer(self, client)
            self.write(print_plan, make_plan(self, client), self, as_json=as_json)

    # --- what a finished run is used for ----------------------------------------------------------

    def validate(
        self,
        model: ServerModule,
        client: ClientModule,
        datamodule: FederatedDataModule,
        ckpt_path: str | None = "best",
    ) -> dict[str, float]:
        """Measure a run's prompt on the selection split.

        Args:
            model: The server.
            client: Not used.
            datamodule: Every party's data.
            ckpt_path: `best` or `last` of `trainer.run_dir`, a checkpoint file, or null for the
                initial prompt.

        Returns:
            Metrics by name.
        """
        with self._together():
            return self._measure_run(model, datamodule, "selection", ckpt_path)

    def test(
        self,
        model: ServerModule,
        client: ClientModule,
        datamodule: FederatedDataModule,
        ckpt_path: str | None = "best",
        harness: Harness | None = None,
        privacy: bool = False,
    ) -> dict[str, float]:
        """Measure a run's prompt on the test split, and in other ways where asked.

        Args:
            model: The server.
            client: Not used.
            datamodule: Every party's data.
            ckpt_path: `best` or `last` of `trainer.run_dir`, a checkpoint file, or null for the
                initial prompt.
            harness: What lm-evaluation-harness runs on the global model with the prompt; its
                figures are written to `harness.json` in the run folder. Null: nothing.
            privacy: Also measure how much of the global model's worth the clients were given
                (docs/privacy.md), and write it to `privacy.json` in the run folder.

        Returns:
            Metrics by name.
        """
        manager = find_tasks(harness) if harness is not None else None
        if harness is not None:
            model.check_whole("`harness`")
        if privacy:
            model.check_whole("`privacy`")
            check_handed_out(self.folder.auxiliary)
        with self._together():
            metrics = self._measure_run(model, datamodule, "test", ckpt_path)
            if privacy:
                report_privacy(self)
            if harness is not None:
                self.write(self._run_harness, harness, manager)
        return metrics

    def _run_harness(self, harness: Harness, manager: Any) -> None:
        results = run_harness(self.fabric, self.server, harness, manager)
        folder = self.folder
        self.fabric.print(write_harness(results, folder.harness, folder.harness_samples))

    def predict(
        self,
        model: ServerModule,
        client: ClientModule,
        datamodule: FederatedDataModule,
        ckpt_path: str | None = "best",
        max_new_tokens: int = 64,
        input: str | None = None,  # noqa: A002 - the option's name
        output: str | None = None,
    ) -> None:
        """Write completions of a file's prompts, or of the test split's, as JSON lines.

        Args:
            model: The server.
            client: Not used.
            datamodule: Gives the task, and the test split where there is no `input`.
            ckpt_path: `best` or `last` of `trainer.run_dir`, a checkpoint file, or null for the
                initial prompt.
            max_new_tokens: Longest completion in tokens, at least 1.
            input: File of rows (.jsonl, .csv, .parquet) that have the fields of the task's prompt;
                null takes the test split.
            output: New file to write; null writes `predictions.jsonl` in the run folder, in
                place of an older one.
        """
        model.check_whole("`fedsp predict`")
        path = check_output(output) if output else self.folder.predictions
        prompts = Prompts(input, datamodule.task) if input else None
        with self._together():
            if prompts is None:
                payload = self._payload_of(ckpt_path)
                self._set_up(model, datamodule, "predict")
                self._load(payload)
                batches = datamodule.predict_dataloader()
            else:
                self.load_run(model, datamodule, ckpt_path)
                size, room = datamodule.batching.eval_batch_size, model.text_room()
                batches = prompts.loader(
                    datamodule.tokenizer, size, text_room=room, max_new_tokens=max_new_tokens
                )
            self.write(self._predict, batches, path, max_new_tokens)

    def _predict(
        self, batches: Iterable[dict[str, Tensor]], path: Path, max_new_tokens: int
    ) -> None:
        count = write_predictions(
            self.fabric, self.server, batches, path, max_new_tokens=max_new_tokens
        )
        self.fabric.print(f"{count} completions: {path}")

    def export(
        self,
        model: ServerModule,
        client: ClientModule,
        datamodule: FederatedDataModule,
        ckpt_path: str | None = "best",
        output_dir: str | None = None,
    ) -> None:
        """Write a run's prompt as a peft PREFIX_TUNING adapter with a model card.

        Args:
            model: The server.
            client: Not used.
            datamodule: Not used.
            ckpt_path: `best` or `last` of `trainer.run_dir`, a checkpoint file, or null for the
                initial prompt.
            output_dir: Folder of the adapter; null writes `adapter` in the run folder.
        """
        check_exportable(model)
        with self._together():
            self.load_run(model, datamodule, ckpt_path)
            measured = self.folder.results if ckpt_path == "best" else None
            results = json.loads(measured.read_text()) if measured and measured.exists() else {}
            folder = Path(output_dir) if output_dir else self.folder.adapter
            self.write(export_tuned, model, folder, results)
            self.fabric.print(f"adapter: {folder}")

    def load_run(
        self, model: ServerModule, datamodule: FederatedDataModule, ckpt_path: str | None
    ) -> None:
        """Load the global model with a run's prompt; of the data only tokenizer and limits."""
        payload = self._payload_of(ckpt_path)
        if model.deploy_auxiliary or payload is None:
            # a vocabulary may be counted on the data, and the first prompt be made of it
            self._set_up(model, datamodule, "predict")
        else:
            self.server = model
            launch(self.fabric)
            load(self.fabric, model)
            join_data(model, datamodule)
        self._load(payload)

    # --- what callbacks may use -------------------------------------------------------------------

    def call(self, hook: str, *args: Any) -> None:
        """Call a method of every callback that has it, with the trainer first."""
        for callback in self.callbacks:
            if callback.on_every_rank or self.fabric.is_global_zero:
                getattr(callback, hook)(self, *args)

    def write(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Call what writes files of the run; only the first of several processes does."""
        Ranks(self.fabric).on_first(function, *args, **kwargs)

    def measure(self, server: ServerModule, split: str) -> dict[str, float]:
        """Measure a server's prompt on `selection` or `test`; see `fedsp.evaluation`."""
        server.eval()
        return measure_split(self, Subject(server.validation_step, server.predict_step), split)

    def measure_zero_shot(self, split: str) -> dict[str, float]:
        """Measure the global model without a prompt on `selection` or `test`."""
        with self.server.as_delivered() as model:
            return measure_split(self, model_subject(model, None, self.server.tokenizer), split)

    # --- opening and closing ----------------------------------------------------------------------

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Start the run's processes; what fails on one of them ends all."""
        launch(self.fabric)
        with failing_together(self.fabric):
            yield

    def _set_up(self, server: ServerModule, data: FederatedDataModule, stage: str) -> None:
        launch(self.fabric)
        self.server, self.data = server, data
        self.call("on_setup_start")
        load(self.fabric, server)
        set_up_data(self.fabric, server, data, stage)

    def _claim_folder(self, client: ClientModule) -> None:
        """Make the last checks, then create the run's files: from here on a run can be resumed."""
        check_trainer(self, client)
        # a logger that is not installed must leave no folder behind that looks like a run
        is_writer = self.fabric.is_global_zero
        self.tracker = Tracker(self.loggers, self.folder.path, enabled=is_writer)
        attempt = next_attempt(self.folder.ledger)
        self.write(self.folder.create, self.config_text)
        self.ledger = Ledger(self.folder.ledger if is_writer else None, attempt)
        self.tracker.log_config(self.config)

    def _open(self, client: ClientModule, state: RunState | None) -> None:
        """Bring everything up to the first round, or back to where the run was."""
        self.client = client
        self.federation = open_federation(self, client)
        self.call("on_fit_start")
        if state is None:
            self._measure_start()
            self._save()
        else:
            restore(self, state.tree)
            # after an older checkpoint the file may be of a round that this run has not seen
            self._save_best()
            self.tracker.replay(self.history.rounds)

    def _measure_start(self) -> None:
        """Measure the global model alone and the initial prompt, to compare with."""
        if not self.data.num_examples("selection"):
            return
        zero_shot = self.measure_zero_shot("selection")
        self.history.zero_shot = {f"server/val_{name}": x for name, x in zero_shot.items()}
        self._select(-1)

    def _conclude(self) -> None:
        """Test the best prompt on data that chose nothing, export it, say where all is."""
        best = self.history.best
        results: dict[str, Any] = {"selection": {"zero_shot": self.history.zero_shot}}
        if best is not None:
            self.server.load_payload(best.payload)
            results["selection"]["best"] = {
                "round": best.round_idx,
                self.history.evaluation.monitor: best.value,
            }
        if self.data.num_examples("test"):
            results["test"] = {
                "zero_shot": self.measure_zero_shot("test"),
                "best": self.measure(self.server, "test"),
            }
        self.call("on_test_end", results)
        results |= privacy_results(self)
        results["rounds"] = self.history.rounds
        text = json.dumps(results, indent=2) + "\n"
        self.write(write_text_atomically, self.folder.results, text)
        try:
            if self.server.is_exportable:
                self.write(export_tuned, self.server, self.folder.adapter, results)
        except ValueError as error:  # a long training must not fail for the adapter's sake
            warnings.warn(f"no adapter is written: {error}", stacklevel=2)
        self.call("on_fit_end", results)

    def _measure_run(
        self, server: ServerModule, data: FederatedDataModule, split: str, ckpt_path: str | None
    ) -> dict[str, float]:
        payload = self._payload_of(ckpt_path)
        self._set_up(server, data, split)
        check_completions(data, split, self.history.evaluation)
        self._load(payload)
        metrics = self.measure(server, split)
        self.fabric.print(json.dumps({split: metrics}, indent=2))
        return metrics

    # --- checkpoints ------------------------------------------------------------------------------

    def _save(self) -> None:
        rounds_done = self.history.rounds_done
        state = RunState(rounds_done, capture(self), self.config)
        self.write(self.checkpoints.save, state)
        self.federation.executor.commit()
        self.call("on_checkpoint_saved", self.checkpoints.path(rounds_done))

    def _save_best(self) -> None:
        best = self.history.best
        if best is None:
            self.write(self.checkpoints.forget_best)
            return
        tree = {"federation": {"payload": best.payload}}
        self.write(
            self.checkpoints.save_best, tree, round_idx=best.round_idx + 1, config=self.config
        )

    def _resume_state(self, ckpt_path: str | None) -> RunState | None:
        if ckpt_path is None:
            return None
        if ckpt_path == "last" and self.folder.is_before_first_checkpoint():
            # killed before the first checkpoint: nothing of worth was lost, start anew in the same
            # folder
            return None
        if ckpt_path == "best":
            raise ValueError(
                "`ckpt_path` must be last or a file round-*.safetensors for `fedsp fit`, got best: "
                "it holds the best round's prompt, not what a run goes on with."
            )
        config = self.config or None
        return self.checkpoints.load(ckpt_path, config=config, ignore=RESUME_IGNORES)

    def _payload_of(self, ckpt_path: str | None) -> Payload | None:
        if ckpt_path is None:
            return None
        payload: Payload = self.checkpoints.load(ckpt_path).tree["federation"]["payload"]
        return payload

    def _load(self, payload: Payload | None) -> None:
        auxiliary = None
        if self.server.deploy_auxiliary:
            made = handed_out(self.fabric, self.server, self.data, self.folder.auxiliary)
            auxiliary = made.auxiliary
        if payload is None:
            num_tokens = self.server.prompt_spec.num_virtual_tokens
            self.server.initialize_prompt(self.data.sample_ids(num_tokens))
        self.server.start_tuning(auxiliary)
        if payload is not None:
            self.server.load_payload(payload)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
