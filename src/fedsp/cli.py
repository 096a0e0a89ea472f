"""The `fedsp` command: LightningCLI over the federated trainer.

Run `fedsp fit --config configs/quickstart.yaml`; every choice is a `class_path` in YAML or an
option.
"""

import inspect
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn, TextIO, cast

import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from fedsp.chat import Layout, Manner, converse
from fedsp.client import ClientModule
from fedsp.data import FederatedDataModule
from fedsp.failures import OtherRankFailedError
from fedsp.pretrained import hide_loading_bar
from fedsp.remote import FederationError
from fedsp.run_folder import RunFolder
from fedsp.server import ServerModule
from fedsp.shipped import expand_names
from fedsp.strict_parser import StrictParser, full_names
from fedsp.trainer import FederatedTrainer

SUBCOMMANDS = ("fit", "plan", "validate", "test", "predict", "export")
INTERRUPTED = 130
TERMINATED = 143
# errors that the user can mend
REPORTED = (
    ValueError,
    OSError,
    ModuleNotFoundError,
    MisconfigurationException,
    OtherRankFailedError,
    FederationError,
)
SEEDS = ("trainer.seed", "model.init_args.seed", "data.init_args.seed")


class Terminated(KeyboardInterrupt):
    """SIGTERM, treated as Ctrl-C."""


class FederatedCLI(LightningCLI):
    """`model` is the server, `client` the role that every client plays, `data` everybody's data."""

    def __init__(self, args: Any = None, run: bool = True) -> None:
        """Parse, instantiate and run.

        Args:
            args: Command line as a list, or the options as a dictionary; None reads `sys.argv`.
            run: False parses and instantiates only.
        """
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        super().__init__(
            ServerModule,
            FederatedDataModule,
            save_config_callback=None,
            trainer_class=cast(Any, FederatedTrainer),
            parser_class=StrictParser,
            seed_everything_default=0,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            run=run,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the trainer's methods that are commands, with what the CLI hands them itself."""
        return {name: {"model", "client", "datamodule"} for name in SUBCOMMANDS}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add trainer, server, client and data; LightningCLI's method wants its own `Trainer`."""
        parser.add_class_arguments(
            FederatedTrainer, "trainer", fail_untyped=False, instantiate=False, sub_configs=True
        )
        parser.add_lightning_class_args(ServerModule, "model", subclass_mode=True)
        parser.add_lightning_class_args(ClientModule, "client", subclass_mode=True)
        parser.add_lightning_class_args(FederatedDataModule, "data", subclass_mode=True)
        roles = {"model": ServerModule, "client": ClientModule, "data": FederatedDataModule}
        parser.set_defaults(
            {
                name: {"class_path": f"{cls.__module__}.{cls.__name__}"}
                for name, cls in roles.items()
            }
        )

    def instantiate_classes(self) -> None:
        """Instantiate every part, the client too, and hand the trainer the configuration as given.

        `seed_everything` is filled in only here: the saved configuration keeps a null as null.
        """
        given = self.config
        self.config = given.clone()
        config = self.config[self.subcommand] if self.subcommand else self.config
        for key in SEEDS:
            if key in config and config[key] is None:
                config[key] = int(config.seed_everything)
        with full_names(config):
            # not LightningCLI's own method: it calls jsonargparse by a deprecated name
            self.config_init = self.parser.instantiate(self.config)
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        self.client = self._get(self.config_init, "client")
        with full_names(config):
            self.trainer = self.instantiate_trainer()
        self.config = given
        text = self._config_text(given[self.subcommand] if self.subcommand else given)
        trainer = cast(FederatedTrainer, self.trainer)
        trainer.config_text, trainer.config = text, yaml.safe_load(text)

    def _config_text(self, config: Namespace) -> str:
        """Return what defines the run: everything but the file that a command starts from."""
        kept = config.clone()
        kept.pop("ckpt_path", None)
        return str(self._parser(self.subcommand).dump(kept, skip_unset=False, skip_validation=True))

    def _run_subcommand(self, subcommand: str) -> None:
        with full_names(self.config[subcommand]):
            super()._run_subcommand(subcommand)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, without LightningCLI's warning that these are not the words of `sys.argv`."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LightningCLI's args parameter", UserWarning)
            super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Leave `ckpt_path` to the trainer: LightningCLI would unpickle it."""

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "client": self.client}


def chat(  # noqa: PLR0913 - the signature is the command's options
    run_dir: str,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    raw: bool = False,
    without_prompt: bool = False,
    ckpt_path: str = "best",
    accelerator: str = "auto",
    seed: int = 0,
) -> None:
    """Talk to a run's global model and its soft prompt; Ctrl-D or `exit` ends.

    Args:
        run_dir: Folder of the run.
        max_new_tokens: Longest answer in tokens, at least 1; null: 256, or half of the model's room
            where that is less.
        temperature: 0 takes the likeliest token each time; above 0 samples.
        raw: Send what is typed as it is, not inside the prompt of the run's task.
        without_prompt: Leave the soft prompt out: the global model as it was, to compare with.
        ckpt_path: `best` or `last` of the run, or a checkpoint file.
        accelerator: `cpu`, `gpu` or `auto`, as Fabric takes it.
        seed: Seed of sampling.
    """
    manner = Manner(max_new_tokens, temperature, without_prompt, seed)
    folder = RunFolder(run_dir)
    if not folder.config.is_file():
        raise ValueError(
            f"`fedsp chat` needs the folder of a run, got {folder.path}, which holds no "
            f"{folder.config.name}. Name the `trainer.run_dir` of a `fedsp fit`."
        )
    place = {"accelerator": accelerator, "devices": "1", "num_nodes": "1", "strategy": "auto"}
    settings = {**place, "run_dir": run_dir, "enable_progress_bar": "false", "callbacks": "null"}
    options = [f"--trainer.{name}={value}" for name, value in settings.items()]
    options.append("--model.init_args.backbone.sharded=false")
    run = FederatedCLI(["--config", str(folder.config), *options], run=False)
    trainer, server = cast(FederatedTrainer, run.trainer), cast(ServerModule, run.model)
    layout = Layout(run.datamodule.task, raw)
    trainer.load_run(server, run.datamodule, ckpt_path)
    converse(trainer.fabric, server, _typed_lines(), layout, manner)


def _run_chat(arguments: list[str]) -> None:
    """Parse the words after `fedsp chat` by the signature of `chat`, and run it."""
    summary = str(inspect.getdoc(chat)).splitlines()[0]
    parser = StrictParser(prog="fedsp chat", description=summary)
    parser.add_function_arguments(chat, as_positional=True)
    chat(**parser.parse_args(arguments).as_dict())


def _typed_lines() -> Iterator[str]:
    """Give what is typed until Ctrl-D or `exit`, with line editing and history on a terminal."""
    prompt = ""
    if sys.stdin.isatty():
        # imported for what it does to `input`; Windows has none
        with suppress(ModuleNotFoundError):
            import_module("readline")
        prompt = "> "
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return
        if line.strip() == "exit":
            return
        if line.strip():
            yield line


def main(args: list[str] | None = None) -> None:
    """Run the `fedsp` command.

    An error that the user can mend is one line on stderr and exit status 1; `FEDSP_TRACEBACK=1`
    shows where it came from. Ctrl-C ends with status 130 and SIGTERM with 143; both leave a run
    that can be resumed.

    Args:
        args: Command line; None reads `sys.argv`.
    """
    arguments = sys.argv[1:] if args is None else args
    with reporting():
        if arguments[:1] == ["chat"]:
            _run_chat(arguments[1:])
        else:
            FederatedCLI(expand_names(arguments))


@contextmanager
def reporting() -> Iterator[None]:
    """Give a command its manners: warnings and errors in one line, exit statuses, signals."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        hide_loading_bar()
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    except KeyboardInterrupt as interrupt:
        sys.exit(TERMINATED if isinstance(interrupt, Terminated) else INTERRUPTED)
    except REPORTED as error:
        if os.environ.get("FEDSP_TRACEBACK"):
            raise
        print(f"fedsp: error: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print what is to be known, once; where in the code it was found helps only developers."""
    if cast(Any, rank_zero_only).rank == 0:
        print(f"fedsp: warning: {message}", file=sys.stderr)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


if __name__ == "__main__":
    main()
