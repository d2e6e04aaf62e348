"""Times of functions on a GPU: in turns, with a warm and a cold L2 cache, beside the GPU's own ceilings.

Every function is recorded as a CUDA graph, so that the CPU, which starts kernels in microseconds of its own,
is not what is measured. Functions take turns, ABBA, so that a clock that falls falls for all of them.
"""

import shutil
import subprocess
from collections.abc import Callable

import torch

ROUNDS = 12  # each times every function once, forwards or backwards in turn
CALLS = 20  # in a warm recording, at most
LONG = 5.0  # milliseconds that such a recording may take
WARM_UP = 10
FLUSH = 256 * 2**20  # bytes, several times the L2 cache of every GPU so far
CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw"


def median(times: list[float]) -> tuple[float, float, float]:
    """The median of times, and the quartiles below and above it."""
    low, middle, high = torch.tensor(times, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    return middle.item(), low.item(), high.item()


def turns(names: list[str], rounds: int) -> list[str]:
    """Who runs when: each round all names once, the rounds forwards and backwards in turn (ABBA)."""
    return [name for number in range(rounds) for name in (names if number % 2 == 0 else names[::-1])]


def time_in_turns(functions: dict[str, Callable], rounds=ROUNDS) -> dict[str, dict[str, list[float]]]:
    """{"cold" or "warm": {name: milliseconds of one call, for each round}}.

    cold: the L2 cache holds nothing of the inputs. warm: it holds what a call left there; as many calls in a
    row as take some milliseconds are timed together.
    """
    once = {name: (record(function, 1), 1) for name, function in functions.items()}
    often = {}
    for name, (graph, _) in once.items():
        graph.replay()
        calls = min(CALLS, max(1, int(LONG / milliseconds(graph))))
        often[name] = (record(functions[name], calls, warm_up=1), calls)
    flush = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    return {"cold": _rounds(once, rounds, flush.zero_), "warm": _rounds(often, rounds, None)}


def _rounds(graphs, rounds, flush) -> dict[str, list[float]]:
    """Times the calls of each of graphs, {name: (graph, calls in it)}; flush empties the L2 cache."""
    times = {name: [] for name in graphs}
    for name in turns(list(graphs), rounds):
        graph, calls = graphs[name]
        if flush is None:
            graph.replay()
        else:
            flush()  # takes longer than starting the graph: the events bracket nothing but it
        times[name].append(milliseconds(graph) / calls)
    return times


def milliseconds(graph) -> float:
    """The time of one replay, by the GPU's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def record(function: Callable, calls: int, warm_up=WARM_UP) -> torch.cuda.CUDAGraph:
    """calls calls of function as a CUDA graph, after a warm-up in which kernels are compiled."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(warm_up):
            function()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph


def ceilings(dtype=torch.float16) -> dict[str, float]:
    """What this GPU does at best, now: FLOP/s of a product of 8192³, bytes/s of a copy of 1 GB."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    copy = torch.empty_like(source)
    times = time_in_turns({"product": lambda: a @ b, "copy": lambda: copy.copy_(source)})["cold"]
    return {
        "flops": 2 * 8192**3 / (1e-3 * min(times["product"])),
        "bytes": 2 * 2**30 / (1e-3 * min(times["copy"])),
    }


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """{name: median, its quartiles and the best of the times}, as reports hold them."""
    figures = {}
    for name, values in times.items():
        middle, low, high = median(values)
        figures[name] = {"median": middle, "low": low, "high": high, "best": min(values)}
    return figures


def clocks() -> str:
    """The GPU's clocks, temperature and power as its driver tells, or why it does not."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "not told: no nvidia-smi"
    query = [tool, f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
