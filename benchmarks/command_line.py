"""How long the commands that import nothing heavy take, at most 0.3 s each."""

import subprocess
import sys
import time

COMMANDS = (["--help"], ["list"], ["search", "overconfident"], ["show", "esd"])


def main() -> None:
    for words in COMMANDS:
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "posterity", *words], stdout=subprocess.DEVNULL, check=True)
            seconds.append(time.perf_counter() - start)
        best, middle = min(seconds), sorted(seconds)[3]
        verdict = "reached" if middle <= 0.3 else "MISSED"
        print(
            f"posterity {' '.join(words)}: median {middle:.3f} s, best {best:.3f} s (target 0.3 s, {verdict})"
        )


if __name__ == "__main__":
    main()
