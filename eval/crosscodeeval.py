"""CrossCodeEval on one GPU or CPU: generate, score, compare, report.

python -m eval.crosscodeeval run --base M --adapter A --data F --modes memory,ablation,concat --out DIR
python -m eval.crosscodeeval score --predictions F --data F --out F
python -m eval.crosscodeeval compare DIR_A DIR_B
python -m eval.crosscodeeval report DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from titans_ds.files import check_file, write_json, write_jsonl
from titans_ds.program import program, real_number, whole_number

from .data.benchmark import load_benchmark
from .errors import EvalError
from .reporting.comparison import Settings, compare_arms
from .reporting.tables import contrast_tables, means_table
from .run_folder import read_run
from .scoring.metrics import ES_BACKENDS
from .scoring.postprocess import RULES
from .scoring.predictions import check_complete, load_predictions
from .scoring.score import score_arm, summarise


@program("everything made so far is on disk; a run goes on with --resume")
def main(arguments: list[str]) -> None:
    """Run one command; return 0, 2 after printing what the user can mend, or 130 where the user stopped it."""
    options = _parser().parse_args(arguments)
    options.command(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.crosscodeeval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands.add_parser("run", help="generate completions and target likelihoods"))
    _add_score(commands.add_parser("score", help="score any predictions file"))
    _add_compare(commands.add_parser("compare", help="paired statistics between two run folders"))
    _add_report(commands.add_parser("report", help="HTML and Markdown from a run folder"))
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    from .modes import available_modes
    from .run_command import add_run_arguments, run_command

    add_run_arguments(parser, available_modes())
    _add_scoring_rules(parser)
    parser.set_defaults(command=run_command)


def _add_scoring_rules(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--es-backend", choices=ES_BACKENDS, default="difflib", help="edit similarity (default difflib)"
    )
    parser.add_argument("--postprocess", choices=RULES, default="parity", help="see eval/README.md (default parity)")
    parser.add_argument("--partial", action="store_true", help="score the tasks that both files have")


def _add_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--predictions", type=Path, required=True, help="lines of {task_id, mode, prediction}")
    parser.add_argument("--data", type=Path, required=True, help="the CrossCodeEval file they were made from")
    parser.add_argument("--out", type=Path, required=True, help="where the scores go (JSON)")
    parser.add_argument("--rows-out", type=Path, help="where every sample's scores go (jsonl)")
    parser.add_argument("--language", help="where the file's names do not tell")
    _add_scoring_rules(parser)
    parser.set_defaults(command=_score)


def _score(options: argparse.Namespace) -> None:
    check_file(options.out, rb'"es_backend"')
    if options.rows_out:
        check_file(options.rows_out, rb'\A\{"mode": ')
    rows = load_benchmark(options.data, options.language)
    predictions = load_predictions(options.predictions)
    missing = check_complete(predictions, set(rows), options.partial)
    summaries, lines = {}, []
    for arm, tasks in predictions.items():
        completions = {task: prediction.text for task, prediction in tasks.items()}
        samples = score_arm(rows, completions, options.postprocess, options.es_backend)
        if not samples:
            raise EvalError(
                f"Mode {arm!r} has no prediction for any task of {options.data}; give the data it was made from."
            )
        summaries[arm] = summarise(samples, options.es_backend)
        lines += [{"mode": arm} | sample.to_json() for sample in samples]
        _print_summary(arm, summaries[arm], missing[arm], len(set(tasks) - set(rows)))
    write_json(options.out, next(iter(summaries.values())) if len(summaries) == 1 else summaries)
    if options.rows_out:
        write_jsonl(options.rows_out, lines)


def _print_summary(arm: str, summary: dict[str, float], missing: int, unknown: int) -> None:
    gaps = f", {missing} without a prediction, {unknown} of unknown tasks" if missing or unknown else ""
    print(
        f"{arm}: EM {summary['em']:.2f}  ES {summary['es']:.2f} ({summary['es_backend']})  "
        f"ID-EM {summary['id_em']:.2f}  ID-F1 {summary['id_f1']:.2f}  (n={summary['total']}{gaps})"
    )


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, metavar="DIR_A")
    parser.add_argument("second", type=Path, metavar="DIR_B", help="the same folder compares its modes")
    parser.add_argument("--data", type=Path, help="the benchmark file, where it has moved")
    parser.add_argument("--out", type=Path, help="where the comparison goes (JSON)")
    _add_scoring_rules(parser)
    _add_statistics(parser)
    parser.set_defaults(command=_compare)


def _add_statistics(parser: argparse.ArgumentParser) -> None:
    defaults = Settings()
    parser.add_argument(
        "--alpha",
        type=real_number(0, 1, above=True),
        default=defaults.alpha,
        help="level of tests and intervals (default 0.05)",
    )
    parser.add_argument(
        "--resamples",
        type=whole_number(1, 10**7),
        default=defaults.num_resamples,
        help="bootstrap draws (default 10000)",
    )
    for name, unit in (("em", "points"), ("es", "points"), ("nll", "nats per byte of the target")):
        margin, told = real_number(0, 10**6, above=True), f"largest difference that counts as none, {unit}"
        parser.add_argument(f"--margin-{name}", type=margin, help=told)


def statistics_settings(options: argparse.Namespace) -> Settings:
    """Return the levels and margins that the command line states."""
    defaults = Settings()
    margins = dict(defaults.margins)
    stated = {"em": options.margin_em, "es": options.margin_es, "nll_target": options.margin_nll}
    margins |= {measure: margin for measure, margin in stated.items() if margin is not None}
    if not 0 < options.alpha < 1 or options.resamples < 100:
        raise EvalError("--alpha must lie between 0 and 1 and --resamples be at least 100.")
    return Settings(options.alpha, defaults.power, options.resamples, defaults.seed, margins)


def _compare(options: argparse.Namespace) -> None:
    rule, backend = options.postprocess, options.es_backend
    if options.out:
        check_file(options.out, rb'\A\{\s*"settings"')
    first = read_run(options.first, options.data, options.partial).arms(rule, backend)
    if options.first.resolve() == options.second.resolve():
        comparison = compare_arms(first, statistics_settings(options))
    else:
        second = read_run(options.second, options.data, options.partial).arms(rule, backend)
        arms = {f"A:{name}": arm for name, arm in first.items()} | {f"B:{name}": arm for name, arm in second.items()}
        arms = {label: arm.renamed(label) for label, arm in arms.items()}
        comparison = compare_arms(arms, statistics_settings(options), _across(list(first), list(second)))
    for table in [means_table(comparison, backend, rule), *contrast_tables(comparison)]:
        print(table.to_markdown())
    if options.out:
        write_json(options.out, comparison)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--data", type=Path, help="the benchmark file, where it has moved")
    parser.add_argument(
        "--training-run", type=Path, help="run folder of the training, for the figures of losses and gates"
    )
    _add_scoring_rules(parser)
    _add_statistics(parser)
    parser.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> None:
    from .reporting.command import write_report  # matplotlib takes a second to load

    write_report(
        options.folder,
        options.postprocess,
        options.es_backend,
        statistics_settings(options),
        options.data,
        options.training_run,
        options.partial,
    )


def _across(first: list[str], second: list[str]) -> list[tuple[str, str]]:
    shared = [name for name in first if name in second]
    if not shared and len(first) == len(second) == 1:
        return [(f"A:{first[0]}", f"B:{second[0]}")]
    if not shared:
        raise EvalError(f"The two runs share no mode ({', '.join(first)} against {', '.join(second)}).")
    return [(f"A:{name}", f"B:{name}") for name in shared]


if __name__ == "__main__":
    sys.exit(main())
