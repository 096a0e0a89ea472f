"""What a checkpoint holds of a running trainer, and how it gets back into one."""

from typing import Any

from fedsp.callbacks import FederatedCallback

# a resumed run may differ in these: they say where and how long to run, not what
RESUME_IGNORES = (
    "trainer.accelerator",
    "trainer.strategy",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.plugins",
    "trainer.num_rounds",
    "trainer.run_dir",
    "trainer.logger",
    "trainer.keep_checkpoints",
    "trainer.client_memory_bytes",
    "trainer.enable_progress_bar",
    "trainer.privacy.init_args.max_epsilon",
    "client.init_args.privacy.init_args.max_epsilon",
    "model.init_args.backbone.sharded",
    "ckpt_path",
    "config",
)


def capture(trainer: Any) -> dict[str, Any]:
    """Return all that the next round depends on, as nested plain values and tensors.

    Args:
        trainer: A `FederatedTrainer` between two rounds.
    """
    callbacks = _named(trainer.callbacks)
    return {
        "federation": trainer.federation.state_dict(),
        "history": trainer.history.state_dict(),
        "precision": trainer.fabric.strategy.precision.state_dict(),
        "callbacks": {name: callback.state_dict() for name, callback in callbacks.items()},
    }


def restore(trainer: Any, tree: dict[str, Any]) -> None:
    """Bring a trainer back to where another one was.

    Args:
        trainer: A `FederatedTrainer` before its first round.
        tree: What `capture` returned.
    """
    trainer.federation.load_state_dict(tree["federation"])
    trainer.history.load_state_dict(tree["history"])
    trainer.fabric.strategy.precision.load_state_dict(tree["precision"])
    for name, callback in _named(trainer.callbacks).items():
        if name in tree["callbacks"]:
            callback.load_state_dict(tree["callbacks"][name])


def _named(callbacks: list[FederatedCallback]) -> dict[str, FederatedCallback]:
    """Callbacks by class and place: a resumed run may have more or fewer of them."""
    named: dict[str, FederatedCallback] = {}
    for callback in callbacks:
        name = type(callback).__qualname__
        place = sum(other.split("#")[0] == name for other in named)
        named[f"{name}#{place}"] = callback
    return named
