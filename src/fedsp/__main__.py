"""Entry of `fedsp` and `python -m fedsp`: help at once, the rest through the two command lines."""

import sys
from importlib.metadata import version

HELP = """\
usage: fedsp {fit,plan,validate,test,predict,export} --config FILE [--config FILE ...]
             [--OPTION VALUE]
       fedsp chat RUN_DIR [--OPTION VALUE]
       fedsp report RUN_DIR [RUN_DIR ...] [--output FILE]
       fedsp compare --config FILE --methods NAME [NAME ...] --seeds N [N ...] [--OPTION VALUE]
       fedsp audit RUN_DIR [--clients CLIENT_RUN ...]
       fedsp federation {init,server,client,renew} DIR [--OPTION VALUE]

Federated learning in which only tunable soft prompts travel.

commands:
  fit       Run the federated rounds, then test and export the best round's prompt.
  plan      Say what a run would need and send, and try a few steps; no training, no files.
  validate  Measure a run's prompt on the selection split.
  test      Measure a run's prompt on the test split, and in other ways where asked.
  predict   Write completions of a file's prompts, or of the test split's, as JSON lines.
  export    Write a run's prompt as a peft PREFIX_TUNING adapter with a model card.
  chat      Talk to a run's global model and its soft prompt; Ctrl-D or `exit` ends.
  report    Write one HTML page about a run, or about several beside each other.
  compare   Run methods with seeds, one after the other, and compare them; goes on where it stopped.
  audit     Check by the ledgers, of one side or of both, that only declared payloads travelled.
  federation  Run a live federation of separate machines: its folder, its server, its clients.

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
    if arguments[0] in ("report", "compare", "audit"):
        from fedsp.report_commands import main as run_report

        run_report(arguments)
        return
    if arguments[0] == "federation":
        from fedsp.federation_commands import main as run_federation

        run_federation(arguments[1:])
        return
    from fedsp.cli import main as run

    run()


if __name__ == "__main__":
    main()
