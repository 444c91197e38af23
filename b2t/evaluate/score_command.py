"""`b2t score`: error rates of anyone's outputs, and whether one decoder beats another."""

import argparse
import json
from pathlib import Path
from typing import Any

from b2t.arguments import seed

SUMMARY = "score sentences or phonemes that any decoder wrote, or compare two decoders"
EPILOG = """\
examples:
  b2t score targets.txt outputs.txt
  b2t score true_phonemes.json decoded_phonemes.json
  b2t score targets.jsonl ours.jsonl theirs.jsonl --out comparison.json

Files: .txt (one sentence per line), .jsonl (objects with `row` and `prediction`, `text` or
`target`), .csv (columns id and text), .json (a list of sentences, or of phoneme sequences). Rows
are matched by id where both files have ids, else by their order. Sentences are normalised as
Brain-to-Text '25 scores them; --verbatim takes them as they stand. A third file is compared with
the second on the same trials: paired bootstrap of the difference, and a sign-flip test."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `b2t score`."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("reference", type=Path, help="file of what was meant")
    parser.add_argument("hypothesis", type=Path, help="file of what was said")
    parser.add_argument("other", type=Path, nargs="?", help="another decoder's, to compare")
    parser.add_argument("--verbatim", action="store_true", help="score texts as they stand")
    parser.add_argument("--key", help="field of the text in hypotheses (prediction, text …)")
    parser.add_argument("--reference-key", help="field of the text in the reference (target, text)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of intervals and tests (0)")
    parser.add_argument("--out", type=Path, help="JSON file to write as well")


def run(args: argparse.Namespace) -> int:
    """Score, print, and write where asked."""
    from b2t.evaluate.outputs import paired, read_outputs
    from b2t.records import require_file, write_atomically

    if args.out is not None:
        require_file(args.out, "--out")
    reference = read_outputs(args.reference, args.reference_key or _target_key(args.reference))
    files = [args.hypothesis, *([args.other] if args.other is not None else [])]
    systems = [
        paired(reference, read_outputs(file, args.key), (args.reference, file)) for file in files
    ]
    plain = args.verbatim or reference.phonemes
    record: dict[str, Any] = {"reference": str(args.reference), "verbatim": plain, "systems": {}}
    for file, said in zip(files, systems, strict=True):
        scores = score(reference.rows, said, reference.phonemes, plain, args.seed)
        record["systems"][str(file)] = scores
        print_scores(str(file), scores)
    if len(systems) == 2:
        record["comparison"] = compared(reference.rows, systems, plain, args.seed)
        print_comparison([str(file) for file in files], record["comparison"])
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        print(f"written: {args.out}")
    return 0


def score(
    targets: list[str], said: list[str], phonemes: bool, verbatim: bool, seed: int = 0
) -> dict[str, Any]:
    """Scores of one decoder as JSON values; rates are fractions, overlaps in 0–100."""
    from b2t.evaluate import metrics
    from b2t.evaluate.edits import details
    from b2t.evaluate.significance import permutation_p_value

    meant = targets if verbatim else [metrics.normalise_text(text) for text in targets]
    heard = said if verbatim else [metrics.normalise_text(text) for text in said]
    units = metrics.count_edits(meant, heard, "word")
    found: dict[str, Any] = {
        "rows": len(targets),
        "per" if phonemes else "wer": units.rate(),
        "interval": units.interval(seed=seed),
        "p_permutation": permutation_p_value(meant, heard, seed=seed),
    }
    if not phonemes:
        found["cer"] = metrics.count_edits(meant, heard, "character").rate()
        found["exact"] = sum(a == b for a, b in zip(meant, heard, strict=True)) / len(meant)
        found["bleu"] = metrics.bleu(targets, said)
        found.update(metrics.rouge(targets, said))
    found["details"] = details(meant, heard, [""] * len(meant))
    del found["details"]["by_session"]
    return found


def compared(
    targets: list[str], systems: list[list[str]], verbatim: bool, seed: int = 0
) -> dict[str, Any]:
    """Compare two decoders on the same rows; see `b2t.evaluate.significance.compare_rates`.

    Raises:
        UserError: no target has a word.
    """
    from b2t.errors import UserError
    from b2t.evaluate.metrics import normalise_text
    from b2t.evaluate.significance import compare_texts

    meant, first, second = (
        texts if verbatim else [normalise_text(text) for text in texts]
        for texts in (targets, *systems)
    )
    try:
        return compare_texts(meant, first, second, seed=seed)._asdict()
    except ValueError as error:
        raise UserError(f"nothing to compare: {error}") from None


def print_scores(name: str, scores: dict[str, Any]) -> None:
    """Print the scores of one decoder."""
    unit = "PER" if "per" in scores else "WER"
    rate, kinds = scores.get("per", scores.get("wer")), scores["details"]
    if rate is None:
        print(f"{name} · {scores['rows']:,} rows · no target has a word: nothing to score")
        return
    low, high = scores["interval"]
    print(
        f"{name} · {scores['rows']:,} rows\n{unit} {100 * rate:.2f} % "
        f"({100 * low:.2f} – {100 * high:.2f})"
        + (f" · CER {100 * scores['cer']:.2f} %" if scores.get("cer") is not None else "")
    )
    if "bleu" in scores:
        print(
            f"BLEU {scores['bleu']:.1f} · ROUGE-1 {scores['rouge1']:.1f} · ROUGE-2 "
            f"{scores['rouge2']:.1f} · ROUGE-L {scores['rougeL']:.1f} · without an error "
            f"{100 * scores['exact']:.1f} %"
        )
    total = kinds["hits"] + kinds["substitutions"] + kinds["deletions"]
    print(
        f"{kinds['substitutions']:,} substitutions, {kinds['deletions']:,} deletions, "
        f"{kinds['insertions']:,} insertions in {total:,}"
    )
    confused = ", ".join(f"{a} → {b} {n}×" for a, b, n in kinds["confused"][:8])
    print(f"most confused: {confused or 'nothing'}")
    for group, some in kinds["by_length"].items():
        if some["rate"] is not None:
            print(f"  {group} units: {100 * some['rate']:.1f} % of {some['rows']} rows")
    if scores["p_permutation"] is not None:
        print(f"p of as good a score on other trials: {scores['p_permutation']:.2g}")


def print_comparison(names: list[str], found: dict[str, Any]) -> None:
    """Print which of two decoders is better, and how sure that is."""
    low, high = found["interval"]
    print(
        f"{names[0]} {100 * found['rate_a']:.2f} % → {names[1]} {100 * found['rate_b']:.2f} %: "
        f"{100 * found['difference']:+.2f} points (95 % {100 * low:+.2f} to {100 * high:+.2f}), "
        f"p = {found['p']:.2g}, trials paired"
    )


def _target_key(path: Path) -> str | None:
    """`target` where JSON lines have it: a file of predictions holds what was meant too."""
    if path.suffix != ".jsonl" or not path.is_file():
        return None
    with path.open("rb") as file:
        first = file.readline()
    return "target" if b'"target"' in first else None
