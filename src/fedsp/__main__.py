"""Entry of `fedsp` and `python -m fedsp`: help at once, everything else through `cli`."""

import sys
from importlib.metadata import version

HELP = """\
usage: fedsp {fit,validate,test,predict,export} --config FILE [--config FILE ...] [--OPTION VALUE]

Federated learning in which only tunable soft prompts travel.

commands:
  fit       Run the federated rounds, then test and export the best round's prompt.
  validate  Measure a run's prompt on the selection split.
  test      Measure a run's prompt on the test split; on request by lm-eval, and model privacy.
  predict   Write completions of the test split's prompts to `predictions.jsonl` in the run folder.
  export    Write a run's prompt as a peft PREFIX_TUNING adapter with a model card.

  fedsp COMMAND --help           every option with its meaning and default
  fedsp COMMAND --print_config   the configuration that would run

First run: fedsp fit --config configs/quickstart.yaml
"""


def main() -> None:
    """Print help or version at once, run everything else."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return
    if arguments == ["--version"]:
        print(f"fedsp {version('fedsp')}")
        return
    # torch, lightning and transformers take seconds to import; help must not wait for them
    from fedsp.cli import main as run

    run()


if __name__ == "__main__":
    main()
