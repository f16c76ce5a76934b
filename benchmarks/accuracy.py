"""``python -m benchmarks.accuracy``: what every method and the tuned schedules lose on image sets, as a page.

``run`` evaluates on a folder of images, keeps outcomes in ``--work``, and writes the page from all that was measured;
``trained`` adds what weights do after training, on the same images; ``report`` only writes the page. A contract is
tried on random halves of the images: certified on one half, counted on the other.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.suites import FOLDER
from mctf_compile.cli.arguments import positive, readable
from mctf_compile.cli.console import INTERRUPTED, CommandError, report_error, stages
from mctf_compile.cli.evaluate import facts, parse_options
from mctf_compile.evaluating.outcomes import Outcomes
from mctf_compile.tuning.contract import Contract

if TYPE_CHECKING:
    from torch import Tensor

    from mctf_compile.evaluating.run import Evaluation
    from mctf_compile.evaluating.settings import Setting

ACCURACY = FOLDER / "accuracy"
# What is evaluated of each method, without training.
OPTIONS: list[dict[str, Any]] = [
    *({"r": r} for r in (13, 16, 18, 20)),
    *({"r": r, "pooling": "mlerp", "tau_size": 20} for r in (16, 20)),
    *({"method": "tome", "r": r} for r in (13, 16)),
    {"method": "evit", "keep_rate": 0.7},
]
# The contracts that are tried, on so many random halves.
CONTRACTS = [Contract("agreement", 0.1), Contract("agreement", 0.15), Contract("top1", 0.03), Contract("top1", 0.05)]
SPLITS = 20


@dataclass(frozen=True)
class Splits:
    """A contract on random halves.

    ``certified``: the halves by which some schedule was. ``kept``: those of them where the share lost on the other half
    is within the tolerance. ``gmacs``: on average, of the schedule certified.
    """

    measure: str
    tolerance: float
    confidence: float
    halves: int
    certified: int
    kept: int
    gmacs: float | None


def splits(
    contract: Contract, chain: Sequence[tuple[float, Outcomes]], dense: Outcomes, labels: Any, halves: int = SPLITS
) -> Splits:
    """Certify the schedules of a chain on one half of the images, the gentlest first; count on the other half.

    ``chain``: the GMACs of each schedule and its outcomes on all images, which had no part in finding it.
    """
    kept, chosen = 0, []
    for seed in range(halves):
        numbers = list(range(len(labels)))
        random.Random(seed).shuffle(numbers)
        ours, others = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
        passed = None
        for gmacs, found in chain:
            if not contract.verdict(taken(found, ours), taken(dense, ours), labels[ours]).kept:
                break
            passed = gmacs, found
        if passed is not None:
            chosen.append(passed[0])
            lost, won = contract.changed(taken(passed[1], others), taken(dense, others), labels[others])
            kept += (lost - won) / len(others) <= (contract.tolerance or 0)
    gmacs = sum(chosen) / len(chosen) if chosen else None
    return Splits(contract.measure, contract.tolerance or 0, contract.confidence, halves, len(chosen), kept, gmacs)


def taken(outcomes: Outcomes, numbers: Sequence[int]) -> Outcomes:
    """The outcomes of some images."""
    return Outcomes(outcomes.top[list(numbers)], outcomes.confidence[list(numbers)])


def run(args: argparse.Namespace) -> None:
    """Evaluate on a folder, try the contracts where there is a chain, and keep what was found."""
    from mctf_compile.evaluating.result import draw, to_dict
    from mctf_compile.evaluating.settings import Setting
    from mctf_compile.measuring.machine import machine

    tuned = [json.loads(file.read_text()) for file in args.schedules]
    chosen = [Setting.of(options) for options in args.options or OPTIONS]
    chosen += [Setting(schedule["options"]["method"], rest(schedule), name_of(schedule)) for schedule in tuned]
    chain = [Setting.of(options) for options in args.chain]
    chosen += [setting for setting in chain if setting not in chosen]
    with stages() as progress:
        found, outcomes, labels = evaluated(args, chosen, args.work, progress)
    steps = [(row.gmacs or 0, outcomes[row.setting.label]) for row in found.rows if row.setting in chain]
    steps.sort(key=lambda step: -step[0])
    tried = [asdict(splits(c, steps, outcomes["dense"], labels)) for c in CONTRACTS] if steps else []
    ACCURACY.mkdir(exist_ok=True)
    about = {"model": args.model, "set": args.name, "machine": machine(), "splits": tried, "schedules": tuned}
    file = results_of(args.name)
    # What training adds is measured by itself.
    about["trained"] = json.loads(file.read_text()).get("trained", []) if file.exists() else []
    file.write_text(json.dumps({**about, **to_dict(found)}, indent=1) + "\n")
    draw(found, ACCURACY / f"{args.name}.png", f"{args.model}, {len(labels)} images of {args.name}")


def trained(args: argparse.Namespace) -> None:
    """Evaluate weights after training against the dense model before it, and add them to what ``run`` has found."""
    from mctf_compile.evaluating.quality import quality
    from mctf_compile.evaluating.settings import Setting

    file = results_of(args.name)
    if not file.exists():
        raise CommandError(f"{file} is missing: `run` writes it, with the model before training")
    result = json.loads(file.read_text())
    settings = [Setting.of(options) for options in args.options]
    with stages() as progress:
        _, before, labels = evaluated(args, [], args.work / "before", progress)
        args.weights = args.after
        found, after, _ = evaluated(args, settings, args.work / "after", progress)
    confidence = found.confidence
    added = [
        {
            "label": row.setting.label,
            "how": args.how,
            "gmacs": row.gmacs,
            "quality": asdict(quality(after[row.setting.label], before["dense"], labels, confidence)),
        }
        for row in found.rows
        if row.reason is None
    ]
    kept = [row for row in result.get("trained", []) if row["how"] != args.how]
    file.write_text(json.dumps({**result, "trained": kept + added}, indent=1) + "\n")


def results_of(name: str) -> Path:
    """Where the results on a set of images are."""
    return ACCURACY / f"{name}.json"


def evaluated(
    args: argparse.Namespace, settings: Sequence[Setting], work: Path, progress: Any
) -> tuple[Evaluation, dict[str, Outcomes], Tensor]:
    """What the settings do with the model of the command line, their outcomes by label, and the images' labels."""
    import torch

    from mctf_compile.cli.models import load
    from mctf_compile.evaluating.images import Files, Folder
    from mctf_compile.evaluating.outcomes import Kept
    from mctf_compile.evaluating.run import CLEAN, evaluate, key_of
    from mctf_compile.measuring.timm_models import evaluation_transform

    torch.set_num_threads(1)
    args.inner, args.device = "eager", "cpu"
    model = load(args, progress)
    folder = Folder(args.images, model.num_classes)
    transform = evaluation_transform(model, args.img_size)
    images, kept = Files(folder.paths, transform), Kept(work, facts(args, model, folder, transform))
    found = evaluate(model, images, folder.labels, settings, batch=args.batch, rounds=0, keep=kept, progress=progress)
    batches = {r.setting.label: kept.read(f"{key_of(r.setting)} {CLEAN}") for r in found.rows if r.reason is None}
    outcomes = {label: Outcomes.together(parts[i] for i in sorted(parts)) for label, parts in batches.items()}
    return found, outcomes, folder.labels


def rest(schedule: dict[str, Any]) -> dict[str, Any]:
    """The options of a schedule beside its method."""
    return {name: value for name, value in schedule["options"].items() if name != "method"}


def name_of(schedule: dict[str, Any]) -> str:
    return f"tuned for {schedule['gmacs']:.2f} GMACs"


HEAD = """# Accuracy

Written by `python -m benchmarks.accuracy`. Change: of top-1 against the dense model in percent points, with 95 %
confidence, by the images lost and won. Nothing is trained unless a table says so. Lists of `r` were found on other
images than these, by moving tokens from block to block as `mctf tune` does.
"""
COLUMNS = ("setting", "GMACs", "top-1", "change", "lost/won", "agrees with dense", "ECE")
OF_SPLITS = ("lose at most", "confidence", "halves certified", "kept on the other half", "mean GMACs")


def page(results: Sequence[dict[str, Any]]) -> str:
    """The page, in Markdown."""
    return "\n".join([HEAD, *(section(result) for result in results)])


def section(result: dict[str, Any]) -> str:
    """What was measured on one set of images."""
    dense = quality_of(result["rows"][0])
    rows = [
        line(row, quality_of(row), None if row["method"] == "dense" else dense)
        for row in sorted((row for row in result["rows"] if row["reason"] is None), key=lambda row: -row["gmacs"])
    ]
    lines = [f"## {result['model']} on {result['set']}, {result['images']} images", ""]
    lines += [f"![accuracy against multiply-accumulates](accuracy/{result['set']}.png)", "", *markdown(COLUMNS, rows)]
    for schedule in result["schedules"]:
        lines += ["", f"`{name_of(schedule)}`: `{json.dumps(schedule['options'])}`"]
    for how in dict.fromkeys(row["how"] for row in result.get("trained", [])):
        after = [line(row, row["quality"], dense) for row in result["trained"] if row["how"] == how]
        lines += ["", f"After training ({how}), against the dense model before it:", "", *markdown(COLUMNS, after)]
    if result["splits"]:
        said = [
            (
                f"{s['tolerance']:.0%} of {s['measure']}",
                f"{s['confidence']:.0%}",
                f"{s['certified']} of {s['halves']}",
                str(s["kept"]),
                "-" if s["gmacs"] is None else f"{s['gmacs']:.3f}",
            )
            for s in result["splits"]
        ]
        lines += ["", "Contracts, certified on a random half of the images and counted on the other half:", ""]
        lines += markdown(OF_SPLITS, said)
    return "\n".join(lines) + "\n"


def line(row: dict[str, Any], found: dict[str, Any], dense: dict[str, Any] | None) -> tuple[str, ...]:
    """The cells of a setting; ``dense``: the quality of what it is compared with, if anything."""
    against = ("", "")
    if dense is not None:
        low, high = (100 * end for end in found["interval"])
        change = f"{100 * (found['top1'] - dense['top1']):+.1f} [{low:+.1f}, {high:+.1f}]"
        against = change, f"{found['lost']}/{found['won']}"
    shares = (f"{found['agreement']:.1%}", f"{found['calibration']:.1%}")
    return f"`{row['label']}`", f"{row['gmacs']:.3f}", f"{found['top1']:.1%}", *against, *shares


def quality_of(row: dict[str, Any]) -> dict[str, Any]:
    """On the images as they are."""
    found: dict[str, Any] = next(iter(row["quality"].values()))
    return found


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(required=True, dest="command")
    commands.add_parser("report", help="write the page")
    first = commands.add_parser("run", help="evaluate on a folder, and write the page")
    later = commands.add_parser("trained", help="evaluate weights after training too, and write the page")
    for command in (first, later):
        command.add_argument("model", metavar="MODEL")
        command.add_argument("images", type=Path, metavar="IMAGES", help="one subfolder for each class")
        command.add_argument("--name", required=True, help="of the set of images")
        command.add_argument("--weights", type=readable, metavar="FILE")
        command.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="where outcomes are kept")
        command.add_argument("--batch", type=positive, default=25)
        command.set_defaults(pretrained=False, img_size=None)
    of_options: dict[str, Any] = {"type": parse_options, "nargs": "+", "metavar": "'KEY=VALUE ...'"}
    first.add_argument("--options", **of_options, help="in the place of those of the page")
    first.add_argument("--schedules", type=readable, nargs="*", default=[], metavar="FILE", help="of mctf tune")
    tried = "what the contracts are tried on, found on other images than these"
    first.add_argument("--chain", **of_options, default=[], help=tried)
    later.add_argument("--options", **of_options, required=True)
    later.add_argument("--after", type=readable, required=True, metavar="FILE", help="the weights after training")
    later.add_argument("--how", required=True, metavar="TEXT", help="how they were trained")
    return top


COMMANDS = {"run": run, "trained": trained}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parser().parse_args(arguments)
    try:
        if args.command in COMMANDS:
            COMMANDS[args.command](args)
        files = sorted(ACCURACY.glob("*.json"))
        if not files:
            raise CommandError(f"{ACCURACY} has no results")
        (FOLDER / "ACCURACY.md").write_text(page([json.loads(file.read_text()) for file in files]))
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        return report_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
