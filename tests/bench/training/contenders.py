"""The table of contenders. To measure another lever of ours, add one row to OURS."""

from collections.abc import Sequence

from training.environments import HUGGING_FACE, LLAMA_FACTORY, SWIFT, Environment
from training.ours import Ours
from training.peers import Peer, Way

Contender = Ours | Peer

OURS = (
    Ours("ours", "ours, as shipped"),
    Ours("ours-recompute-off", "ours, recompute off", sets=["train.gradient_checkpointing=false"]),
    Ours("ours-dropout-0", "ours, dropout 0", sets=["lora.dropout=0"]),
    Ours("ours-plain-tower", "ours, tower as in transformers", sets=["model.fast_tower=false"]),
    Ours("ours-1-thread", "ours, 1 rank with 1 thread", threads=1),
    Ours("ours-2-ranks", "ours, 2 ranks with 1 thread each", ranks=2, threads=1),
)
TRL = (
    Peer("trl-recompute-on", "TRL, recompute on", "trl_sft.py", HUGGING_FACE, Way(recompute=True), tuned=True),
    Peer("trl-recompute-off", "TRL, recompute off", "trl_sft.py", HUGGING_FACE, Way(recompute=False), tuned=True),
)
HAND_WRITTEN = Peer(
    "hand-written",
    "hand-written Hugging Face Trainer loop, one sample at a time",
    "hand_written.py",
    HUGGING_FACE,
    Way(recompute=True, batch=1),
    compared_with="ours-answer-mean",
)
# Only for the comparison of losses. Hugging Face Trainer averages the means of its micro-batches for this model. With
# one sample in each, every answer counts the same, and that is our other objective.
ANSWER_MEAN = Ours("ours-answer-mean", "ours, every answer counts the same", sets=["objective.name=answer_mean"])
ALL: tuple[Contender, ...] = (*OURS, *TRL, HAND_WRITTEN)

# Trainers without a script here. Their environments are tried, so that the report says why they are missing.
WITHOUT_SCRIPT: dict[str, Environment] = {"ms-swift": SWIFT, "llama-factory": LLAMA_FACTORY}


def to_check(chosen: Sequence[Contender]) -> list[Contender]:
    """Return the contenders whose losses are compared: the chosen ones, and what those are compared with."""
    wanted = {contender.compared_with for contender in chosen if isinstance(contender, Peer)} | {"ours"}
    references = [c for c in (OURS[0], ANSWER_MEAN) if c.name in wanted and c not in chosen]
    return [*references, *chosen]


def choose(
    only: Sequence[str], skip: Sequence[str], global_batch: int
) -> tuple[list[Contender], dict[str, Environment]]:
    """Return the chosen contenders, and the chosen rows of WITHOUT_SCRIPT.

    Raises SystemExit if a name is unknown.
    """
    names = [contender.name for contender in ALL] + list(WITHOUT_SCRIPT)
    if unknown := [name for name in (*only, *skip) if name not in names]:
        raise SystemExit(f"train.py: no contender {', '.join(unknown)} → choose from {' '.join(names)}")
    chosen = [name for name in names if (not only or name in only) and name not in skip]
    missing = {name: environment for name, environment in WITHOUT_SCRIPT.items() if name in chosen}
    fitted = (contender.fitted(global_batch) if isinstance(contender, Peer) else contender for contender in ALL)
    return [contender for contender in fitted if contender.name in chosen], missing
