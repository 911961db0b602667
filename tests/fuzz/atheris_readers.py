"""Coverage-guided fuzzing of both readers with atheris (Linux: ``pip install atheris``).

    python tests/fuzz/atheris_readers.py perfdata -max_total_time=60 [CORPUS_FOLDER] [libFuzzer options]
    python tests/fuzz/atheris_readers.py pcap -runs=20000

Coverage is that of the Python code: the compiled kernels are not instrumented (for them: ``NUMBA_BOUNDSCHECK=1``). A finding
ends the run and leaves its bytes in ``crash-*``. Without a folder the seeds are those of the mutation fuzzers.
"""

from __future__ import annotations

import sys
import tempfile
import types
from pathlib import Path

import atheris

# Numba cannot type instrumented functions.
KERNELS = ["compiler", "flows", "headers", "pcapfile", "pcapng", "perfgather", "perfgroups", "perfrecords", "words"]
with atheris.instrument_imports(include=["rxlab"], exclude=[f"rxlab.read.{name}" for name in KERNELS]):
    from rxlab.read import pcap, perfdata  # noqa: F401

import fuzz_pcap  # noqa: E402
import fuzz_perfdata  # noqa: E402

from rxlab.read.pcapfile import ClassicReader  # noqa: E402
from rxlab.read.pcapng import PcapngReader  # noqa: E402

for reader in (ClassicReader, PcapngReader):
    for name, function in list(vars(reader).items()):
        if isinstance(function, types.FunctionType):
            setattr(reader, name, atheris.instrument_func(function))

TARGETS = {"pcap": fuzz_pcap, "perfdata": fuzz_perfdata}
LIBFUZZER_LIMITS = ["-timeout=20", "-rss_limit_mb=2048", "-max_len=65536"]


def main() -> None:
    """Run libFuzzer on the reader that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: {sys.argv[0]} {{{'|'.join(TARGETS)}}} [FOLDER] [libFuzzer options]")
    target, options = TARGETS[sys.argv[1]], sys.argv[2:]
    with tempfile.TemporaryDirectory() as scratch:
        path, own = Path(scratch) / "mutated", Path(scratch) / "seeds"
        own.mkdir()
        has_folder = any(not option.startswith("-") for option in options)
        for number, seed in enumerate([] if has_folder else target.seeds()):
            (own / str(number)).write_bytes(seed)
        for seed in target.built_seeds():  # compile outside the time limit
            path.write_bytes(seed)
            target.read_all(path, 0)

        def run_one(content: bytes) -> None:
            path.write_bytes(content)
            outcome = target.read_all(path, len(content))
            if outcome.startswith("WRONG"):
                raise AssertionError(outcome)

        folders = [] if has_folder else [str(own)]
        atheris.Setup([sys.argv[0], *LIBFUZZER_LIMITS, *options, *folders], run_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
