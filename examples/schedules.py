"""What is a learning-rate schedule worth? The ten-digit CNN with constant rates, with warm-up, with decay, with both, and with 1cycle.

    COURSE_SOURCE=real python examples/schedules.py --write                 # all parts; a quarter of an hour of one core
    COURSE_SOURCE=real python examples/schedules.py rates                   # one part: rates, final or budgets

rates: three epochs with each schedule and five peak rates, scored on 10,000 training pictures that are held out.
final: each schedule with the peak rate that was best there, new seeds, all training pictures, scored on the test set.
budgets: 1cycle in 1 to 5 epochs beside constant rates after 1 to 10; of those the best by the test score itself is compared.
`--write` puts the rows into results/schedules.json, which chapter 08 shows.
"""
import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

from course_lib.conv import simple_cnn
from course_lib.dataloader import get_dls
from course_lib.datasets import ImageData, mnist
from course_lib.learner import Learner, accuracy
from course_lib.schedule import combine, one_cycle, sched_cos, sched_lin, sched_no
from course_lib.settings import set_seed

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from common import environment, held_out, print_table, read_results, write_results  # noqa: E402

RESULTS = ROOT / "results" / "schedules.json"
RATES = [.004, .01, .025, .06, .15]
EPOCHS, BUDGETS, BATCH = 3, (1, 2, 3, 5, 10), 512
CONSTANTS = [.001, .002, .004, .01]                     # for longer trainings a lower one may be better

Schedule = Callable[[float], dict]


def phases(pct: float, first: Callable[[float], float], second: Callable[[float], float]) -> Schedule:
    rate = combine([pct, 1 - pct], [first, second])
    return lambda p: {"lr": rate(p)}


SCHEDULES: dict[str, Callable[[float], Schedule]] = {   # from the peak rate; momentum is .9 but for 1cycle
    "constant": lambda m: phases(0, sched_no(m, m), sched_no(m, m)),
    "warm-up, then constant": lambda m: phases(.25, sched_cos(m / 25, m), sched_no(m, m)),
    "cosine decay": lambda m: phases(0, sched_no(m, m), sched_cos(m, m / 1e5)),
    "linear warm-up and decay": lambda m: phases(.25, sched_lin(m / 25, m), sched_lin(m, m / 1e5)),
    "1cycle, momentum .9": lambda m: one_cycle(m, moms=None),
    "1cycle": lambda m: one_cycle(m),
}


def train(schedule: Schedule, data: ImageData, seed: int, n_epoch: int) -> list[float]:
    "Validation accuracy after each epoch"
    set_seed(seed)
    learn = Learner(get_dls(BATCH, data, seed=seed), simple_cnn(), metrics=accuracy, progress=False)
    learn.fit(n_epoch, schedule=schedule)
    return [round(values[2], 4) for values in learn.recorder.values]


def rates(data: ImageData, known: dict) -> list[dict]:
    "Accuracy on pictures held out, for each schedule and peak rate"
    data, seeds = held_out(data), (100, 101)
    return [{"schedule": name, "rate": rate, "accuracy": [train(make(rate), data, s, EPOCHS)[-1] for s in seeds]}
            for name, make in SCHEDULES.items() for rate in RATES]


def best_rate(known: dict, name: str) -> float:
    rows = [r for r in known["rates"]["rows"] if r["schedule"] == name]
    return max(rows, key=lambda r: fmean(r["accuracy"]))["rate"]


def final(data: ImageData, known: dict) -> list[dict]:
    "Accuracy on the test set, each schedule with the rate that was best on pictures held out"
    return [{"schedule": name, "rate": (rate := best_rate(known, name)),
             "accuracy": [train(make(rate), data, s, EPOCHS)[-1] for s in range(5)]} for name, make in SCHEDULES.items()]


def budgets(data: ImageData, known: dict) -> list[dict]:
    "Accuracy on the test set after each number of epochs; the longest is for the constant rates alone"
    rows, seeds = [], range(3)
    for rate in CONSTANTS:
        runs = [train(SCHEDULES["constant"](rate), data, s, BUDGETS[-1]) for s in seeds]
        rows += [{"schedule": "constant", "rate": rate, "epochs": n, "accuracy": [r[n - 1] for r in runs]} for n in BUDGETS]
    rate = best_rate(known, "1cycle")
    return rows + [{"schedule": "1cycle", "rate": rate, "epochs": n,
                    "accuracy": [train(one_cycle(rate), data, s, n)[-1] for s in seeds]} for n in BUDGETS[:-1]]


PARTS = {f.__name__: f for f in (rates, final, budgets)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}; all if not given")
    parser.add_argument("--write", action="store_true", help=f"put the rows into results/{RESULTS.name}")
    args = parser.parse_args()
    data, known = mnist(), read_results(RESULTS)
    for part in args.parts:
        start = time.process_time()
        rows = PARTS[part](data, known)
        seconds = time.process_time() - start
        known[part] = {"rows": rows, "source": data.source, "environment": environment(), "seconds": round(seconds)}
        print_table([(r["schedule"], r["rate"], r.get("epochs", EPOCHS), f"{fmean(r['accuracy']):.4f}", f"{stdev(r['accuracy']):.4f}")
                     for r in rows], ("schedule", "peak rate", "epochs", "accuracy", "spread"))
        print(f"\n{part}: {len(rows[0]['accuracy'])} seeds, {seconds:.0f} s; {environment()}\n", flush=True)
        if args.write:
            write_results(RESULTS, part, known[part])


if __name__ == "__main__":
    main()
