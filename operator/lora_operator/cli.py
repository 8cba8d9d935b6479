"""The image's one command: `lora-operator run` is the operator, `fetch` and `evict` are the programs of its Jobs.

Each subcommand imports what it needs by itself: the fetcher must set its environment before huggingface_hub is imported, and must not
load the operator.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="lora-operator", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="run the operator until it is told to stop")
    commands.add_parser("fetch", help="run the download that LORA_OPERATOR_FETCH describes, then exit")
    commands.add_parser("evict", help="run the eviction that LORA_OPERATOR_EVICT describes, then exit")
    chosen = parser.parse_args(argv)
    if chosen.command == "fetch":
        from lora_operator.fetch import download

        download.main_then_exit()
    if chosen.command == "evict":
        from lora_operator.fetch import evict

        return evict.main()
    from lora_operator.main import run

    return run()


if __name__ == "__main__":
    sys.exit(main())
