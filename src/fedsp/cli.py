"""The `fedsp` command: LightningCLI over the federated trainer.

Run `fedsp fit --config configs/quickstart.yaml`; every choice is a `class_path` in YAML or an option.
"""

import os
import sys
from typing import Any

import yaml
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from fedsp.client import ClientModule
from fedsp.data import FederatedDataModule
from fedsp.server import ServerModule
from fedsp.trainer import FederatedTrainer

SUBCOMMANDS = ("fit", "validate", "test", "predict", "export")
INTERRUPTED = 130


class FederatedCLI(LightningCLI):
    """`model` is the server, `client` the role that every client plays, `data` everybody's data."""

    def __init__(self, args: Any = None, run: bool = True) -> None:
        """Parse, instantiate and run.

        Args:
            args: Command line as a list, or the options as a dictionary; None reads `sys.argv`.
            run: False parses and instantiates only.
        """
        strict = {"allow_abbrev": False}
        super().__init__(
            ServerModule,
            FederatedDataModule,
            save_config_callback=None,
            trainer_class=FederatedTrainer,
            seed_everything_default=0,
            parser_kwargs={**strict, **{name: dict(strict) for name in SUBCOMMANDS}},
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            run=run,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the trainer's methods that are commands, with the arguments that the CLI fills itself."""
        return {name: {"model", "client", "datamodule"} for name in SUBCOMMANDS}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add trainer, server, client and data; LightningCLI's own method insists on a `lightning.Trainer`."""
        parser.add_class_arguments(
            FederatedTrainer, "trainer", fail_untyped=False, instantiate=False, sub_configs=True
        )
        parser.add_lightning_class_args(ServerModule, "model", subclass_mode=True)
        parser.add_lightning_class_args(ClientModule, "client", subclass_mode=True)
        parser.add_lightning_class_args(FederatedDataModule, "data", subclass_mode=True)
        roles = {"model": ServerModule, "client": ClientModule, "data": FederatedDataModule}
        parser.set_defaults(
            {name: {"class_path": f"{cls.__module__}.{cls.__name__}"} for name, cls in roles.items()}
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give all parts one seed, and the data the global model's tokenizer."""
        parser.link_arguments("seed_everything", "trainer.seed")
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def instantiate_classes(self) -> None:
        """Instantiate every part, the client too, and hand the trainer the configuration as parsed."""
        super().instantiate_classes()
        self.client = self._get(self.config_init, "client")
        parser = self._parser(self.subcommand)
        config = self.config[self.subcommand] if self.subcommand else self.config
        text = parser.dump(config, skip_unset=False)
        self.trainer.config_text = text
        self.trainer.config = yaml.safe_load(text)

    def _parse_ckpt_path(self) -> None:
        """Leave `ckpt_path` to the trainer: LightningCLI would unpickle it."""

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "client": self.client}


def main(args: list[str] | None = None) -> None:
    """Run the `fedsp` command.

    An error that the user can mend is one line on stderr and exit status 1; `FEDSP_TRACEBACK=1` shows where it
    came from. Ctrl-C ends with status 130 and leaves a run that can be resumed.

    Args:
        args: Command line; None reads `sys.argv`.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        FederatedCLI(args)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (ValueError, OSError, MisconfigurationException) as error:
        if os.environ.get("FEDSP_TRACEBACK"):
            raise
        print(f"fedsp: error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)


if __name__ == "__main__":
    main()
