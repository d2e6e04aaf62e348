"""What holds for every test: no network. And `pytest --worst`, which prints the worst differences."""

import os
import socket
from collections import defaultdict

import numpy as np
import parity
import pytest

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before tokenizers is imported, which warns after forks
# before triton is imported: kernels are interpreted, on CPU tensors. What compiles them runs in a subprocess.
os.environ["TRITON_INTERPRET"] = "1"
connect = socket.socket.connect
# (file, dtype, rtol, atol): comparisons, worst difference, its share
worst = defaultdict(lambda: [0, 0.0, 0.0])
# (file, tolerance): (relative difference, what was allowed) of each comparison
relative = defaultdict(list)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Connections that leave this machine fail as they do without a network."""

    def connect_locally(self, address):
        host = address[0] if isinstance(address, tuple) else "localhost"  # a str is a Unix socket's path
        if host not in ("localhost", "127.0.0.1", "::1"):
            raise OSError(f"tests work without a network, but one asked for {host}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)


@pytest.fixture
def run(capsys):
    """Runs a command line: run(*words) -> (exit status, lines of stdout, lines of stderr)."""
    from minidiff.cli import main

    def run(*words):
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return run


@pytest.fixture
def working_folder(tmp_path, monkeypatch):
    """An empty folder, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pytest_addoption(parser):
    parser.addoption(
        "--worst", action="store_true", help="print the worst difference that each file's tests met"
    )


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # of several processes, each for one core
        parity.torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # for what the tests start
    elif config.getoption("--worst") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--worst counts in one process: add -n 0")
    if config.getoption("--worst"):  # before the tests import it by name
        parity.assert_close = recording(parity.assert_close)
        parity.record = lambda difference, tolerance, allowed: relative[test_file(), tolerance].append(
            (difference, allowed)
        )


def test_file():
    return os.environ["PYTEST_CURRENT_TEST"].split("::")[0]


def recording(assert_close):
    """assert_close that also keeps the worst difference in `worst`."""

    def recorded(ours, theirs, rtol=0.0, atol=0.0):
        assert_close(ours, theirs, rtol=rtol, atol=atol)
        a, b = parity._float64(ours), parity._float64(theirs)
        finite = np.isfinite(a) & np.isfinite(b)
        difference, allowed = np.abs(a[finite] - b[finite]), atol + rtol * np.abs(b[finite])
        file = test_file()
        dtype = str(getattr(ours, "dtype", type(ours).__name__)).removeprefix("torch.")
        row = worst[file, dtype, rtol, atol]
        row[0] += 1
        row[1] = max(row[1], difference.max(initial=0))
        row[2] = max(
            row[2], np.divide(difference, allowed, out=0 * difference, where=difference > 0).max(initial=0)
        )

    return recorded


def pytest_terminal_summary(terminalreporter):
    for (file, dtype, rtol, atol), (count, difference, share) in sorted(worst.items()):
        terminalreporter.write_line(
            f"{file:40} {dtype:8} rtol {rtol:<6g} atol {atol:<6g} {count:5} comparisons, "
            f"worst difference {difference:.1e} ({100 * share:.1f} % of the tolerance)"
        )
    for (file, tolerance), rows in sorted(relative.items()):
        well = [difference for difference, allowed in rows if difference <= tolerance]
        ill = [(difference / allowed, difference) for difference, allowed in rows if difference > tolerance]
        worst_ill = f", worst {max(ill)[1]:.1e} ({100 * max(ill)[0]:.0f} % of what is allowed)" if ill else ""
        terminalreporter.write_line(
            f"{file:40} {len(well)} comparisons within {tolerance:g} of the largest value: median "
            f"{np.median(well):.1e}, worst {max(well):.1e}; {len(ill)} ill-conditioned ones{worst_ill}"
        )
