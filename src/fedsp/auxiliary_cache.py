"""Auxiliary models on disk, found again by all that makes them: a run's own, and one for all runs.

Nothing is made here. Where there are several ranks, the first one reads and writes for all.
"""

import warnings
from pathlib import Path
from typing import Any

from fedsp.auxiliary import Auxiliary, AuxiliaryRecipe
from fedsp.data import FederatedDataModule
from fedsp.distillation import Distillation, cache_key, describe_stage
from fedsp.ranks import Ranks
from fedsp.run_folder import cache_folder
from fedsp.server import ServerModule
from fedsp.stages import Stage
from fedsp.state_files import decode_state, encode_state, load_state, save_state


def making_key(
    server: ServerModule, auxiliary: Auxiliary, data: FederatedDataModule, trainer: Any
) -> str:
    """Hash all that makes the auxiliary model, so that none of another making is taken for it.

    Args:
        server: With its model loaded.
        auxiliary: As it is before any teaching.
        data: Set up.
        trainer: Its seed and precision count.
    """
    batching, vocabulary = data.batching, auxiliary.backbone.vocabulary
    backbone, prompt = server.require_model()
    facts: dict[str, Any] = {
        "recipe": _describe(server.auxiliary_recipe),
        "kept": None if vocabulary is None else vocabulary.kept.tolist(),
        "public": data.fingerprint("public") if data.num_examples("public") else None,
        "batches": [data.seed, batching.batch_size, batching.length_grouping],
        "seed": trainer.seed,
        "precision": trainer.precision,
    }
    spec = server.initial_distillation or Distillation(Stage(steps=0))
    if spec.prompts is not None or server.auxiliary_recipe.calibration_batches:
        facts["initial_prompt"] = prompt.prefix().cpu().numpy().tobytes().hex()
    if spec.prompts is not None:
        facts["server"] = data.fingerprint("server") if data.num_examples("server") else None
        facts["training"] = describe_stage(server.training_stage)
        facts["prompt_network"] = [
            server.prompt_spec.dropout,
            server.prompt_spec.reparameterization_size,
            server.seed,
        ]
    return cache_key(backbone, spec, facts)


def _describe(recipe: AuxiliaryRecipe) -> list[Any]:
    """Return a recipe as plain data, those that it wraps included."""
    settings = {
        name: _describe(value) if isinstance(value, AuxiliaryRecipe) else value
        for name, value in vars(recipe).items()
    }
    return [type(recipe).__qualname__, settings]


def find_state(ranks: Ranks, path: Path, key: str) -> Any:
    """Read what an earlier start of the run left; None if it left nothing or had other settings.

    The first rank reads for all: no rank must find what another one is just writing.

    Args:
        ranks: Those that prepare together.
        path: The run's own file; it holds its `key` beside what it is about.
        key: What `making_key` returned.
    """
    found: Any = load_state(path) if ranks.rank == 0 and path.exists() else None
    if found is not None and found["key"] != key:
        found = None
    return found if ranks.size == 1 else decode_state(ranks.of_first(encode_state(found)))


def equalize(ranks: Ranks, auxiliary: Auxiliary) -> None:
    """Take the first rank's weights: what was computed on other hardware may differ in a bit."""
    if ranks.size > 1:
        state: Any = decode_state(ranks.of_first(encode_state(auxiliary.state())))
        auxiliary.load(state)


def artefact_path(spec: Distillation, key: str) -> Path | None:
    """Return the file of the distilled weights in the cache; None keeps none."""
    root = cache_folder(spec.cache_dir)
    return root / "auxiliary" / f"{key}.safetensors" if root else None


def load_artefact(ranks: Ranks, artefact: Path, auxiliary: Auxiliary) -> bool:
    """Take distilled weights from the first rank's cache, and say whether it had them.

    Args:
        ranks: Those that prepare together.
        artefact: The file; one that is damaged is as good as none.
        auxiliary: Changed in place.
    """
    has_loaded = ranks.rank == 0 and _load_own(artefact, auxiliary)
    has_loaded = bool(ranks.of_first(b"x" * has_loaded))
    if has_loaded:
        equalize(ranks, auxiliary)
    return has_loaded


def _load_own(artefact: Path, auxiliary: Auxiliary) -> bool:
    if not artefact.exists():
        return False
    try:
        auxiliary.load(load_state(artefact))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(
            f"The cached auxiliary model {artefact} is unusable and made anew: {error}.",
            stacklevel=2,
        )
        return False
    return True


def store_artefact(artefact: Path, auxiliary: Auxiliary) -> None:
    """Put distilled weights into the cache; a folder that cannot be written costs the cache only.

    Args:
        artefact: The file.
        auxiliary: The distilled model.
    """
    try:
        artefact.parent.mkdir(parents=True, exist_ok=True)
        save_state(artefact, auxiliary.state())
    except OSError as error:
        warnings.warn(
            f"The auxiliary model cannot be cached in {artefact.parent}: {error}. "
            "Every run distils anew until `model.initial_distillation.cache_dir` names a folder "
            "that can be written.",
            stacklevel=2,
        )
