"""The report of the training benchmark: dated Markdown for people, and JSON with every figure beside it."""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kfood_dist.system.words import plural
from training import scaled_model
from training.contenders import ANSWER_MEAN, HAND_WRITTEN, TRL, Contender, to_check
from training.environments import COMMON, STAMP, versions
from training.ours import Ours
from training.peers import Peer
from training.rounds import Bench, Outcome

ROOT = Path(__file__).resolve().parents[3]
_BESIDE = ("deepspeed", "trl", "datasets", "webdataset", "simplejpeg")


@dataclass(frozen=True)
class Found:
    """All that the benchmark found: the runs by phase, and why trainers are absent."""

    checks: Sequence[Outcome]
    trials: Sequence[Outcome]
    rounds: Sequence[Outcome]
    absent: Mapping[str, str]


def write(out: Path, bench: Bench, contenders: Sequence[Contender], found: Found) -> Path:
    """Write both files into `out`, which is made if missing. Returns the path of the Markdown file."""
    now = datetime.now(UTC)
    about = _machine(bench, now) | {"versions": _versions(bench, contenders)}
    tokens = round(sum(step.num_tokens for step in bench.materials.steps) / _num_samples(bench))
    parts = [
        _head(about, bench, tokens),
        _check_table(contenders, found.checks),
        _speed_table(bench, contenders, found.rounds),
        _notes(contenders, found),
        _version_table(about["versions"]),
    ]
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"train-{now:%Y-%m-%d-%H%M}.md"
    path.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")
    figures = {
        **about,
        "flop_shares": scaled_model.flop_shares(tokens),
        "materials": asdict(bench.materials),
        "absent": found.absent,
        "runs": [asdict(outcome) for outcome in (*found.checks, *found.trials, *found.rounds)],
    }
    path.with_suffix(".json").write_text(
        json.dumps(figures, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8"
    )
    return path


def _num_samples(bench: Bench) -> int:
    return len(bench.materials.steps) * bench.materials.global_batch


def _head(about: Mapping[str, Any], bench: Bench, tokens: int) -> str:
    shares = {
        name: ", ".join(f"{part.replace('_', ' ')} {share:.0%}" for part, share in of_model.items())
        for name, of_model in scaled_model.flop_shares(tokens).items()
    }
    labels = sum(step.num_label_tokens for step in bench.materials.steps) / _num_samples(bench)
    return f"""# Training, {about["date"]}

`{about["command"]}`

Commit {about["commit"]}.
{about["processor"]}, {about["cores"]} cores, {about["memory_gib"]} GiB; load {about["load"]} at the end of the run.
{plural(bench.rounds, "round")} of {plural(bench.steps, "step")}, of which the first {bench.warmup} are not timed.
{plural(bench.materials.global_batch, "sample")} per step. The table says how many threads a run had.

The model has 61 M parameters and the classes of Qwen2.5-VL-3B, in NF4 with double quantisation and bf16. The optimiser
is AdamW in 8 bits. A sample has {tokens} tokens, of which {labels:.1f} are labels. FLOPs of its forward pass:
{shares["scaled"]}; in the 3B model {shares["3B"]}."""


def _check_table(contenders: Sequence[Contender], checks: Sequence[Outcome]) -> str:
    """Return the losses of the first and the last step of the check, and how far all its losses are from ours."""
    found = {check.name: check.measured for check in checks if check.measured}
    last = max((len(measured.losses) for measured in found.values()), default=0)
    lines = [
        f"| without dropout | loss, step 1 | loss, step {last} | largest difference | compared with | same tokens |",
        "|---|---:|---:|---:|---|---|",
    ]
    for contender in to_check(contenders):
        if contender.name not in found:
            continue
        measured = found[contender.name]
        other = contender.compared_with if isinstance(contender, Peer) else "ours"
        other = "" if contender.name in (other, ANSWER_MEAN.name) or other not in found else other
        pairs = zip(measured.losses, found[other].losses, strict=True) if other else ()
        apart = f"{max(abs(a - b) / b for a, b in pairs):.2%}" if other else ""
        same = {True: "yes", False: "**no**", None: ""}[measured.same_tokens]
        losses = f"{measured.losses[0]:.4f} | {measured.losses[-1]:.4f}"
        lines.append(f"| {contender.title} | {losses} | {apart} | {other} | {same} |")
    lines += [
        "",
        "Same tokens: every sample's input ids and label ids are those of our template. Hugging Face Trainer averages",
        "the means of its micro-batches for this model, so the loop with one sample in each is compared with our",
        "objective in which every answer counts the same. TRL keeps LoRA in bf16, the loop in float32, and ours in",
        "bf16 with float32 master weights.",
    ]
    return "\n".join(lines) if found else ""


def _speed_table(bench: Bench, contenders: Sequence[Contender], rounds: Sequence[Outcome]) -> str:
    """Return one row for each contender that ran: medians over the rounds, and of the ratios within each round."""
    runs = {c.name: [r for r in rounds if r.name == c.name and not r.error] for c in contenders}
    rates = {name: _median(of_one, lambda run: run.samples_per_s) for name, of_one in runs.items() if of_one}
    best_trl = max((peer.name for peer in TRL if peer.name in rates), key=lambda name: rates[name], default="")
    lines = [
        "| | threads | samples/s: median, least to most | label tokens/s | padding | private MiB | RSS MiB "
        "| × TRL at its best | × hand-written |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for contender in contenders:
        if not (of_one := runs[contender.name]):
            continue
        speeds = [run.samples_per_s for run in of_one]
        way = f" ({contender.way})" if isinstance(contender, Peer) else ""
        cells = [
            contender.title + way,
            str(contender.threads_used(bench.threads)),
            f"{rates[contender.name]:.2f}, {min(speeds):.2f} to {max(speeds):.2f}",
            f"{_median(of_one, lambda run: run.label_tokens_per_s):.1f}",
            f"{_median(of_one, lambda run: run.measured.padding_share if run.measured else 0):.1%}",
            f"{_median(of_one, lambda run: run.peak.private_mib if run.peak else 0):,.0f}",
            f"{_median(of_one, lambda run: run.peak.rss_mib if run.peak else 0):,.0f}",
            *(_ratio(of_one, runs.get(other, ())) for other in (best_trl, HAND_WRITTEN.name)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Memory is the peak of the whole process tree: trainer, loader processes, and with ours also the launcher. It",
        "includes loading the model. RSS counts a page once in each process that maps it. A ratio is the median of the",
        "ratios of the rounds, because the load of a machine varies.",
    ]
    return "\n".join(lines)


def _ratio(runs: Sequence[Outcome], others: Sequence[Outcome]) -> str:
    """Return the median of the speed ratios of all rounds that both ran, or an empty cell if there are none."""
    theirs = {run.phase: run.samples_per_s for run in others}
    ratios = [run.samples_per_s / theirs[run.phase] for run in runs if theirs.get(run.phase)]
    return f"{statistics.median(ratios):.2f}" if ratios else ""


def _median(runs: Sequence[Outcome], figure: Callable[[Outcome], float]) -> float:
    return statistics.median(map(figure, runs))


def _notes(contenders: Sequence[Contender], found: Found) -> str:
    """Return the levers of ours, the trials of the peers' settings, and what failed or is absent."""
    lines = [
        f"- {contender.title}: {shlex.join([*contender.sets, *(f'{k}={v}' for k, v in contender.variables.items())])}"
        for contender in contenders
        if isinstance(contender, Ours) and (contender.sets or contender.variables)
    ]
    for name in dict.fromkeys(trial.name for trial in found.trials):
        tried = [t for t in found.trials if t.name == name]
        results = "; ".join(f"{t.way}: {t.error or f'{min(t.step_s):.2f}'}" for t in tried)
        lines.append(f"- {name}, settings tried, with the seconds of the fastest step: {results}")
    lines += [f"- {run.name} failed ({run.phase}): {run.error}" for run in (*found.checks, *found.rounds) if run.error]
    lines += [f"- {name} is absent: {why}" for name, why in found.absent.items()]
    return "\n".join(lines)


def _machine(bench: Bench, now: datetime) -> dict[str, Any]:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": f"{now:%Y-%m-%d %H:%M} UTC",
        "commit": _commit(),
        "command": shlex.join(["python", *sys.argv]),
        "processor": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30,
        "load": f"{os.getloadavg()[0]:.1f}",
        "threads": bench.threads,
        "rounds": bench.rounds,
        "steps": bench.steps,
        "warmup": bench.warmup,
    }


def _commit() -> str:
    """Return this checkout's commit, and whether files differ from it."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def _versions(bench: Bench, contenders: Sequence[Contender]) -> dict[str, dict[str, str]]:
    """Return the versions of all packages, in our environment and in that of each peer."""
    pythons = {"kfood_dist": Path(sys.executable)}
    for contender in contenders:
        if isinstance(contender, Peer) and (stamp := bench.environments / contender.environment.name / STAMP).is_file():
            pythons[contender.environment.name] = stamp.with_name("bin") / "python"
    return {name: {"python": platform.python_version(), **versions(python)} for name, python in pythons.items()}


def _version_table(found: Mapping[str, Mapping[str, str]]) -> str:
    lines = [f"| package | {' | '.join(found)} |", "|---|" + "---|" * len(found)]
    for package in ("python", *COMMON, *_BESIDE):
        lines.append(f"| {package} | {' | '.join(listed.get(package, '') for listed in found.values())} |")
    return "\n".join(lines)
