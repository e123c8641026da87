"""`python -m bench WHAT ...`: a bench is a module with `add_arguments(parser)` and `run(arguments) -> exit status`."""

from __future__ import annotations

import argparse
import sys

from bench import dual, ops, report, seeds

BENCHES = {"dual": dual, "ops": ops, "report": report, "seeds": seeds}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measurements; JSON goes to bench/results.")
    what = parser.add_subparsers(dest="what", required=True)
    for name, module in BENCHES.items():
        module.add_arguments(what.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__))
    arguments = parser.parse_args()
    return BENCHES[arguments.what].run(arguments)


if __name__ == "__main__":
    sys.exit(main())
