"""What a person waits for before anything happens: interpreter, imports, the command's help."""

from __future__ import annotations

import sys

import pyperf

runner = pyperf.Runner()
runner.bench_command("start: python -c pass", [sys.executable, "-c", "pass"])
runner.bench_command("start: import rxlab", [sys.executable, "-c", "import rxlab"])
runner.bench_command("start: rxlab --help", [sys.executable, "-m", "rxlab", "--help"])
