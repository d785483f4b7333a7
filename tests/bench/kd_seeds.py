"""
Distillation against the same student on text alone, same steps and tokens, over several seeds.

    python tests/bench/kd_seeds.py [seeds]         # after the demo; 3 seeds if not told otherwise

A seed decides on the student's first weights and the order of the data. Runs go to
out/demo/kd_seeds and are not run again. Prints the final validation loss (cross-entropy per token)
of each.
"""

import functools
import statistics
import sys
from pathlib import Path

# the repository's root must be on the path first
sys.path.insert(0, str(Path(__file__).absolute().parents[2]))

from demos.demo import run as demo  # noqa: E402

if __name__ == "__main__":
    demo.begin(demo.OUT)
    seeds = range(1, 1 + int(sys.argv[1] if sys.argv[1:] else 3))
    show = functools.partial(print, end="", flush=True)
    run = functools.partial(demo.run_script, show)
    results = {"alone": [], "taught": []}
    for name, values in results.items():
        for seed in seeds:
            folder = f"kd_seeds/{name}_{seed}"
            values.append(demo.student(run, folder, name == "taught", seed))
    print(f"\nvalidation loss per token, {len(seeds)} seeds")
    for name, values in results.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        each = " ".join(f"{value:.4f}" for value in values)
        print(
            f"{name:<8}{each}   mean {statistics.mean(values):.4f}, standard deviation {spread:.4f}"
        )
    better = [alone - taught for alone, taught in zip(results["alone"], results["taught"])]
    print(
        f"the teacher is worth {statistics.mean(better):.4f} on average, {min(better):.4f} at least"
    )
